"""Shared by the training benchmarks: the stages before training on some of the demo's images, and command lines."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmfm.cli import extract, fit_gmm, latent_stats, list_images, spatial_gmm
from mmfm.data.fashion_mnist import pad_to_rgb, read_idx

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ENCODER = ROOT / "resources" / "demo" / "encoder"
SMALL = ("models.tiny.hidden_size=[48,48]", "models.tiny.depth=[2,1]", "models.tiny.num_heads=[3,3]")
"""Overrides for a model whose step takes milliseconds."""


def prepare(folder: Path, n_images: int, modes: int = 8) -> list[str]:
    """Run the stages before training on some of the demo's images.

    Returns:
        the arguments of ``mmfm train``, except setting, output folder and overrides.
    """
    (packed,) = (ROOT / "resources" / "demo").rglob("t10k-images*")
    for i, image in enumerate(pad_to_rgb(read_idx(packed)[:n_images])):
        path = folder / "images" / "all" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(path)
    common = ["--config", str(ROOT / "config" / "config.yaml")]
    listing, stats, gmm = folder / "listing.safetensors", folder / "stats.pt", folder / "gmm"
    encoder = ["--listing", str(listing), "--encoder-weights", str(ENCODER)]
    tokens, moments, spatial = folder / "tokens.zarr", folder / "moments.safetensors", folder / "spatial.zarr"
    mixture = ["--gmm", str(gmm / "gmm.safetensors")]
    assignment = ["--assignment", f"{gmm}/assignment.safetensors"]
    listings = ["--train", str(listing), "--heldout", f"{folder}/heldout.safetensors"]
    stages: tuple[tuple[Any, list[str], list[str]], ...] = (
        (list_images, ["--root", f"{folder}/images", *listings], ["data.holdout=0"]),
        (extract, [*encoder, "--out-tokens", str(tokens), "--out-moments", str(moments)], []),
        (latent_stats, ["--moments", str(moments), "--out", str(stats), "--out-json", f"{folder}/stats.json"], []),
        (fit_gmm, ["--tokens", str(tokens), "--out-dir", str(gmm)], [f"gmm.n_components={modes}"]),
        (spatial_gmm, [*encoder, *mixture, *assignment, "--stats", str(stats), "--out", str(spatial)], []),
    )
    with contextlib.redirect_stderr(io.StringIO()):
        for stage, arguments, overrides in stages:
            stage.main([*arguments, *common, *overrides])
    return [*common, *encoder, "--stats", str(stats), *mixture, "--spatial-gmm", str(spatial)]


def command(files: list[str], out: Path, overrides: list[str], processes: int = 1, setting: str = "mode") -> list[str]:
    """Return the command line of a training run with one thread per process."""
    stage = ["train", *files, "--setting", setting, "--out-dir", str(out), "train.logger=none", *overrides]
    if processes == 1:
        return [sys.executable, "-m", "mmfm.cli", *stage]
    launch = [sys.executable, "-m", "mmfm.infra.launch", "--processes", str(processes), "--threads", str(processes)]
    return [*launch, "--", *stage]


def environment() -> dict[str, str]:
    """Return an environment with one thread per process, no GPU, and the package of this checkout."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **threads, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


def train(files: list[str], out: Path, overrides: list[str], processes: int = 1) -> list[dict[str, Any]]:
    """Run a training and return the lines of its history."""
    line = command(files, out, overrides, processes)
    subprocess.run(line, env=environment(), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return [json.loads(text) for text in (out / "history.jsonl").read_text().splitlines()]


def publish(name: str, found: dict[str, Any], markdown: str, folder: Path = RESULTS) -> None:
    """Write ``name.json`` and ``name.md``, and print the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    (folder / f"{name}.md").write_text(markdown)
    print(markdown)
