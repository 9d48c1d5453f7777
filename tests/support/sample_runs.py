"""The command ``sample`` on the tiny pipeline, with weights whose velocities are far from zero."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfm.autoencoder.decoder import load_decoder, save_decoder
from mmfm.cli.__main__ import main
from mmfm.config.choices import SETTINGS
from mmfm.infra import npz, store
from mmfm.mixture.spatial import SpatialMixture
from mmfm.models.dit import DiT, DiTConfig
from mmfm.models.weights import save_ema
from support.tiny import CHANNELS, GRID, MODES, SECTIONS, Pipeline

SAMPLE = SECTIONS["sample"]


CLASSES = 3


def write_ema(
    path: Path, files: Pipeline, setting: str, draw: int = 0, recorded: dict | None = None, model: dict | None = None
) -> Path:
    """Write a DiT whose velocities are far from zero; an untrained one's are zero."""
    generator = torch.Generator().manual_seed(draw)
    classes = {"mode": MODES, "class": CLASSES, "class_gmm": CLASSES}.get(setting, 0)
    dropout = 0.1 if setting.startswith("class") else 0.0
    sizes = {"classes": classes, "dropout": dropout, "channels": CHANNELS, **(model or {})}
    network = DiT(
        DiTConfig(GRID, 1, sizes["channels"], (32, 32), (1, 1), (2, 2), sizes["classes"], sizes["dropout"]),
        generator=generator,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
        if setting.startswith("class") and network.y_embedder is not None:
            network.y_embedder.embedding_table.weight.mul_(20)  # labels that can be seen
    about = {
        "setting": setting, "encoder": {"family": "dinov2"}, "step": 7, "epochs": 1.5, "seed": 3, "images_seen": 56,
        "stats_digest": store.file_digest(files.stats), "encoder_digest": store.folder_digest(files.encoder),
    }  # fmt: skip
    if SETTINGS[setting].mixture:
        about["spatial_gmm_digest"] = SpatialMixture.open(files.spatial_gmm).attributes["digest"]
    save_ema(path, network, {**about, **(recorded or {})})
    return path


@pytest.fixture(scope="module")
def files(tiny_pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The tiny pipeline with a decoder whose images use the whole range of pixel values."""
    decoder = load_decoder(tiny_pipeline.decoder)
    with torch.no_grad():
        decoder.decoder_pred.weight.mul_(4)
    path = tmp_path_factory.mktemp("decoder") / "decoder.safetensors"
    save_decoder(decoder, path)
    return replace(tiny_pipeline, decoder=path)


@pytest.fixture(scope="module")
def weights(files: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """EMA weights of every setting, and a guide of the setting mode."""
    root = tmp_path_factory.mktemp("weights")
    made = {s: write_ema(root / f"{s}.safetensors", files, s) for s in SETTINGS}
    return {**made, "guide": write_ema(root / "guide.safetensors", files, "mode", draw=9)}


def arguments(files: Pipeline, ema: Path, out: Path, *more: str, **changes: object) -> list[str]:
    sections = {"image": SECTIONS["image"], "encoder": SECTIONS["encoder"], "sample": {**SAMPLE, **changes}}
    return [
        "sample", "--settings", json.dumps(sections), "--ema", str(ema), "--decoder", str(files.decoder), "--stats",
        str(files.stats), "--encoder-weights", str(files.encoder), "--spatial-gmm", str(files.spatial_gmm),
        "--out-dir", str(out), *more,
    ]  # fmt: skip


def run(files: Pipeline, ema: Path, out: Path, *more: str, **changes: object) -> tuple[np.ndarray, dict]:
    """Return the images and their description, without the time, in which equal runs differ."""
    assert main(arguments(files, ema, out, *more, **changes)) == 0
    about = store.read_json(out / "samples.json")
    return npz.map_array(out / "images.npz"), {name: value for name, value in about.items() if name != "seconds"}
