"""Encoders that no code names, one of transformers and one of timm, through the whole workflow from local folders."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from transformers import IJepaConfig, IJepaModel, ViTMSNConfig, ViTMSNModel

from support.checkout import link_workflow
from support.encoders import scramble, write_hf, write_timm
from support.places import ROOT
from support.stage_commands import Stage, digests
from support.tiny import write_images, write_listing

SIZES = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "patch_size": 8}
LATENTS = {"msn": [40, 6, 6], "eva": [24, 4, 4]}
SMALL = {
    "gpus": 0,
    "data": {"root": "images"},
    "image": {"size": 48},
    "encoders": {
        "msn": {"family": "hf", "weights": "msn", "input_size": 48, "norm_affine": True},
        "eva": {"family": "timm", "weights": "eva", "input_size": 32, "precision": "bf16"},
    },
    "models": {"small": {"hidden_size": [32, 32], "depth": [1, 1], "num_heads": [2, 2]}},
    "gmm": {"n_components": 3},
    "decoder": {
        "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "num_layers": 1, "global_batch": 8, "horizon": 2,
        "steps": 2,
    },
    "train": {
        "model": "small", "epochs": 1, "constant_epochs": 0, "decay_end_epoch": 1, "global_batch": 8,
        "preview": {"n_images": 4, "time_points": 3},
    },
    "guide": {"model": "small"},
    "sample": {"n_images": 50, "time_points": 3, "batch_size": 25},
    "sweep": {"modes": [2, 3]},
}  # fmt: skip


def snakemake(
    folder: Path, *words: str, input_size: int = 32, files: Sequence[str] = ("mine.yaml",)
) -> subprocess.CompletedProcess:
    eva = {**SMALL["encoders"]["eva"], "input_size": input_size}
    keys = {**SMALL, "encoders": {**SMALL["encoders"], "eva": eva}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(keys))
    line = [sys.executable, "-m", "snakemake", *words, "--cores", "1", "--configfile", *files]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_from_weights_in_a_folder_to_a_distance(tmp_path):
    """With latents of two shapes, neither of them the paper's, and the models' own global tokens as features."""
    write_images(link_workflow(tmp_path) / "images", 48, size=56)
    write_hf(tmp_path / "msn", scramble(ViTMSNModel(ViTMSNConfig(**SIZES, image_size=32))))
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
    write_timm(tmp_path / "eva", "eva02_tiny_patch14_224", **sizes)
    targets = [f"results/fid/{name}_mode.txt" for name in LATENTS]
    done = snakemake(tmp_path, *targets)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    for name, shape in LATENTS.items():
        about = json.loads((tmp_path / "results" / "latent_stats" / name / "stats.json").read_text())
        assert about["latent_shape"] == shape
        (result,) = (tmp_path / "results" / "fid").glob(f"{name}_mode.seed*.json")
        assert f"{shape[0]} features" in result.read_text()
    assert "Nothing to be done" in snakemake(tmp_path, *targets, "-n").stdout


def test_a_dry_run_says_what_is_no_encoder(tmp_path):
    write_images(link_workflow(tmp_path) / "images", 4)
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8}
    write_timm(tmp_path / "eva", "eva02_tiny_patch14_224", **sizes)
    write_hf(tmp_path / "msn", IJepaModel(IJepaConfig(**SIZES, image_size=[32, 64])))
    for name, said in (
        (
            "msn",
            "'encoders.msn.weights' holds a 'ijepa' model with a grid of 4 x 8 patches; give one with square patches",
        ),
        ("eva", "'encoders.eva.input_size' is 36, no multiple of the encoder's patch size 8; take 32 or 40"),
    ):
        done = snakemake(tmp_path, f"results/fid/{name}_mode.txt", "-n", input_size=36)
        assert done.returncode and said in done.stdout + done.stderr


def test_models_of_the_hub_are_fetched_with_the_files_that_their_library_has(tmp_path):
    write_images(link_workflow(tmp_path) / "images", 4)
    wanted = {"msn": ("hf", "some/vit@v1.2", 3), "eva": ("timm", "timm/eva02.some", 2)}
    keys = {
        **SMALL,
        "encoders": {n: {"family": f, "weights": f"hf:{i}", "input_size": 48} for n, (f, i, _) in wanted.items()},
    }
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump(keys))
    for name, (family, model, files) in wanted.items():
        done = snakemake(tmp_path, f"results/latent_stats/{name}/stats.pt", "-n", files=["hub.yaml"])
        assert done.returncode == 0, done.stdout + done.stderr
        rule = {"hf": "fetch_encoder", "timm": "fetch_timm_encoder"}[family]
        (made,) = re.findall(rf"rule {rule}:\n\s+output: (.*)", done.stdout)
        assert len(made.split(", ")) == files and f"published/models/{model}/config.json" in made


@pytest.mark.slow
def test_any_number_of_processes_makes_the_same_tokens(tmp_path):
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8}
    folder = write_timm(tmp_path / "siglip", "vit_base_patch16_siglip_224", **sizes)
    listing = write_listing(tmp_path / "listing", write_images(tmp_path / "images", 47))
    outputs = {"--out-tokens": "cls_tokens.zarr", "--out-moments": "moments.safetensors"}
    stage = Stage("extract", {"--listing": listing, "--encoder-weights": folder}, outputs, tmp_path / "1")
    made = []
    for world in (1, 2, 3):
        stage.run(tmp_path / str(world), world=world, encoder={"family": "timm", "precision": "bf16"})
        made.append(digests(tmp_path / str(world)))
    assert made[0] and made[1:] == made[:1] * 2
