"""Images cropped to ``image.size`` and resized, or cropped to the encoder's input size itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from mmfm import data
from mmfm.autoencoder.encoders import Encoder, load_encoder
from mmfm.cli.__main__ import main
from mmfm.config import STAGES
from mmfm.data.tokens import TokenStore
from mmfm.infra import store
from support.tiny import SECTIONS, write_listing

N, INPUT = 9, 24
"""The tiny encoder takes 24 pixels here, the images are cropped to 32."""


@pytest.fixture(scope="module")
def listing(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(N):
        pixels = generator.integers(0, 255, (40, 56, 3), np.uint8)
        (root / f"class{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / f"class{i % 2}" / f"{i}.png")
    return write_listing(root / "listing.train.safetensors", root)


@pytest.fixture(scope="module")
def encoder(tiny_encoder) -> Encoder:
    return load_encoder("dinov2", tiny_encoder, INPUT)


def command(stage: str, folder: Path, crop: str, *arguments: object) -> None:
    """Run a stage with a crop; all share one folder of latent caches."""
    sections = {name: SECTIONS[name] for name in STAGES[stage].sections}
    if "encoder" in sections:
        sections["encoder"] = {**sections["encoder"], "input_size": INPUT}
        sections[stage] = {**sections[stage], "crop": crop}
        sections["latents"] = {"cache": "on", "folder": str(folder / "latents")}
    assert main([stage, "--settings", json.dumps(sections), *map(str, arguments)]) == 0


def extract(listing: Path, encoder: Path, folder: Path, crop: str) -> np.ndarray:
    """Return the tokens (N, C) of a crop."""
    out = folder / crop
    files = ("--listing", listing, "--encoder-weights", encoder, "--out-tokens", out / "cls_tokens.zarr")
    command("extract", folder, crop, *files, "--out-moments", out / "moments.safetensors")
    return TokenStore.open(out / "cls_tokens.zarr").read(0, N)


def literal(encoder: Encoder, listing: Path, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents and tokens of the images cropped to ``size`` pixels."""
    listed = data.Listing.open(listing)
    images = [np.asarray(data.center_crop(Image.open(listed.path(i)), size)) for i in range(N)]
    return encoder(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255)


def test_tokens_are_those_of_the_crop_and_caches_do_not_mix(listing, tiny_encoder, encoder, tmp_path):
    for crop, size in (("image", 32), ("encoder", INPUT), ("image", 32)):
        tokens = torch.from_numpy(extract(listing, tiny_encoder, tmp_path, crop))
        torch.testing.assert_close(tokens, literal(encoder, listing, size)[1], rtol=1e-4, atol=1e-5)
    sizes = {store.read_json(path)["image_size"] for path in (tmp_path / "latents").glob("*/about.json")}
    assert sizes == {32, INPUT}
    assert (literal(encoder, listing, 32)[1] - literal(encoder, listing, INPUT)[1]).abs().max() > 0.01


def test_spatial_moments_are_those_of_the_crop(listing, tiny_encoder, encoder, tmp_path):
    """Tokens of one crop, moments of the other."""
    extract(listing, tiny_encoder, tmp_path, "image")
    made = tmp_path / "image"
    command("latent_stats", tmp_path, "", "--moments", made / "moments.safetensors", "--out", made / "stats.pt",
            "--out-json", made / "stats.json")  # fmt: skip
    command("fit_gmm", tmp_path, "", "--tokens", made / "cls_tokens.zarr", "--out-dir", made)
    files = ("--listing", listing, "--encoder-weights", tiny_encoder, "--stats", made / "stats.pt")
    files += ("--gmm", made / "gmm.safetensors", "--assignment", made / "assignment.safetensors")
    stats = torch.load(made / "stats.pt", weights_only=True)
    labels = store.map_arrays(made / "assignment.safetensors")[0]["labels"]
    mode = np.bincount(labels).argmax()
    for crop, size in (("image", 32), ("encoder", INPUT)):
        out = tmp_path / f"spatial-{crop}" / "spatial_gmm.zarr"
        command("spatial_gmm", tmp_path, crop, *files, "--out", out)
        latents = (literal(encoder, listing, size)[0] - stats["mean"]) / (stats["var"] + 1e-5).sqrt()
        mean = latents[torch.from_numpy(labels == mode)].mean(0)
        found = torch.from_numpy(zarr.open_group(out, mode="r")["means"][mode])
        torch.testing.assert_close(found, (mean + mean.flip(-1)) / 2, rtol=1e-4, atol=1e-4)
