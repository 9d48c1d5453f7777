"""config/imagenet256.yaml on a GPU, from pictures to distances: networks of the real sizes, random, and few steps.

It takes eight minutes on an H100.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mmfm import config
from mmfm.workflow import facts
from mmfm.workflow.resources import Estimator
from support.checkout import link_workflow
from support.inception import write_lively_inception
from support.places import ROOT
from support.tiny import write_images

pytestmark = [
    pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]  # fmt: skip

FEW = {
    "encoders": {"dinov2": {"weights": "encoder"}},
    "data": {"root": "images", "holdout": 128, "workers": 0},
    "latents": {"cache": "off"},
    "extract": {"shard_size": 256, "batch_size": 128, "workers": 4},
    "spatial_gmm": {"batch_size": 128, "workers": 0},
    "latent_stats": {"weights": "compute"},
    "gmm": {"n_components": 32},
    "decoder": {"weights": "train", "global_batch": 32, "horizon": 4, "steps": 2, "workers": 0},
    "train": {"global_batch": 64, "steps": 24, "milestone_steps": [], "workers": 4, "log_every": 4},
    "guide": {"steps": 6},
    "sample": {"n_images": 256, "shard_size": 128},
    "fid": {"weights": "inception.pth", "reference": "train", "workers": 0},
}
"""What replaces the preset's keys: nothing published, no cache, few of everything. Networks and micro-batches stay."""

TARGETS = [
    "fid/dinov2_mode_ag.txt",
    "reconstruction/dinov2.txt",
    "mode_quality/dinov2_mode_ag.png",
    "memorisation/dinov2_mode_ag.png",
]


def write_encoder(folder: Path) -> None:
    """Write DINOv2-base with registers and random weights."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(image_size=518, patch_size=14)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))


def test_the_preset_makes_its_results(tmp_path):
    write_images(link_workflow(tmp_path) / "images", 768, size=288)
    write_encoder(tmp_path / "encoder")
    write_lively_inception(tmp_path / "inception.pth")
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(FEW))
    results = tmp_path / "results" / "imagenet256"
    line = [sys.executable, "-m", "snakemake", *(f"results/imagenet256/{target}" for target in TARGETS)]
    line += ["--cores", "8", "--configfile", "config/imagenet256.yaml", "few.yaml"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}

    def run(*more: str) -> str:
        done = subprocess.run([*line, *more], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        return done.stdout + done.stderr

    run()
    assert "Nothing to be done" in run("-n")
    (history,) = (results / "train" / "dinov2_mode").glob("*.XL.*/history.jsonl")
    lines = [json.loads(text) for text in history.read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] and all(0 < entry["encoder_share"] < 1 for entry in lines)

    files = [ROOT / "config" / "config.yaml", ROOT / "config" / "imagenet256.yaml", tmp_path / "few.yaml"]
    read = config.load(files)
    estimated = Estimator(read, "dinov2", 1, True, facts.gather(read, results)).stages()["train"].device / 1e9
    measured = max(entry["peak_gb"] for entry in lines)
    assert 0.5 * estimated < measured < estimated, "torch.compile keeps fewer activations than are counted"
