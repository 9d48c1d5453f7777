"""The embedded demo: what is committed is whole, documented, and loads through the pipeline's own code."""

import dataclasses
import gzip
import re
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mmfm import config
from mmfm.autoencoder.decoder import load_decoder
from mmfm.autoencoder.encoders import load_encoder
from mmfm.data.fashion_mnist import CLASSES, pad_to_rgb, read_idx, unpack
from mmfm.evaluation.detector import load_detector
from mmfm.infra import store
from mmfm.workflow import checks
from support.places import DEFAULTS, DEMO, ROOT


def images(n=8):
    return torch.from_numpy(pad_to_rgb(read_idx(DEMO / "fashion-mnist" / "t10k-images-idx3-ubyte.gz")[:n]))


def test_the_readme_lists_every_file_with_its_digest():
    table = dict(re.findall(r"\| `([^`]+)` \| [\d,]+ \| `([0-9a-f]{64})` \|", (DEMO / "README.md").read_text()))
    files = {str(p.relative_to(DEMO)): p for p in DEMO.rglob("*") if p.is_file() and p.suffix not in (".md", "")}
    assert set(table) == set(files)
    for name, path in files.items():
        assert store.file_digest(path) == table[name], name
    assert sum(p.stat().st_size for p in files.values()) < 25e6


@pytest.mark.parametrize(
    "name", ["encoder/model", "siglip2/model", "mae/model", "detector/detector", "decoder/decoder"]
)
def test_weights_say_how_they_were_made(name):
    with safe_open(DEMO / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
    text = " ".join(f"{key} {value}" for key, value in metadata.items())
    for word in ("settings", "seed", "steps"):
        assert word in text, f"{name} does not say its {word}"
    assert re.search("tools/|train_decoder", text) and re.search("[0-9a-f]{64}", text)


@pytest.mark.parametrize(("family", "folder"), [("dinov2", "encoder"), ("siglip2", "siglip2"), ("mae", "mae")])
def test_encoder(family, folder):
    encoder = load_encoder(family, DEMO / folder, 32)
    assert 4e5 <= sum(p.numel() for p in encoder.parameters()) <= 2e6
    latent, token = encoder(images().float() / 255)
    assert latent.shape == (8, 96, 4, 4) and token.shape == (8, 96)
    assert latent.isfinite().all() and token.std(0).min() > 1e-3
    blank = encoder(torch.full((1, 3, 32, 32), 0.5)).latent
    assert blank.flatten(2).std(2).mean() > 1e-2, "equal patches differ by their positions"


def test_three_encoders_are_a_configuration_of_their_own():
    """Results of the first cost the same with the others: the same parameters but for the decoder's."""
    own, all_three = (config.load([DEFAULTS, *files]) for files in ([], [ROOT / "config" / "demo-encoders.yaml"]))
    assert list(own.encoders) == ["dinov2"] and list(all_three.encoders) == ["dinov2", "siglip2", "mae"]
    assert dataclasses.replace(all_three, encoders=own.encoders, decoder=own.decoder) == own
    for name, about in all_three.encoders.items():
        checks.encoder(name, about)


def test_all_that_is_committed_stays_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    if not files:
        pytest.skip("no checkout of git")
    binary = (path for path in files if path.suffix in (".safetensors", ".gz", ".png", ".ipynb", ".zarr", ".npz"))
    assert sum(path.stat().st_size for path in binary if path.exists()) < 30e6


def test_decoder_draws_what_the_encoder_saw():
    encoder = load_encoder("dinov2", DEMO / "encoder", 32)
    decoder = load_decoder(DEMO / "decoder" / "decoder.safetensors", latent_dim=96)
    pixels = images(64).float() / 255
    with torch.no_grad():
        drawn = decoder(encoder(pixels).latent.flatten(2).transpose(1, 2))
    drawn = drawn * encoder.image_std[:, None, None] + encoder.image_mean[:, None, None]
    assert (drawn - pixels).abs().mean() < 0.05


def test_detector_tells_the_classes_apart():
    detector = load_detector("fashion", DEMO / "detector" / "detector.safetensors", torch.device("cpu"))
    features = detector.features(images(1000)).double()
    labels = torch.from_numpy(read_idx(DEMO / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz")[:1000].astype(np.int64))
    centres = torch.stack([features[:500][labels[:500] == c].mean(0) for c in range(10)])
    nearest = torch.cdist(features[500:], centres).argmin(1)
    assert (nearest == labels[500:]).double().mean() > 0.85


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x0d\x01\0\0\0\2ab", b"\0\0\x08\x01\0\0\0\5ab", gzip.compress(b"x" * 99, mtime=0)[:-9]]
)
def test_a_broken_idx_file_is_named(tmp_path, content):
    (tmp_path / "broken.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.gz"):
        read_idx(tmp_path / "broken.gz")


def test_unpacked_images_are_grey_with_a_black_border(tmp_path):
    pixels = np.random.default_rng(0).integers(1, 256, (2, 28, 28), np.uint8)
    for name, array in (("t10k-images-idx3", pixels), ("t10k-labels-idx1", np.array([7, 0], np.uint8))):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        (tmp_path / f"{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    unpack(tmp_path, tmp_path / "images")
    written = sorted((tmp_path / "images").rglob("*.png"), key=lambda path: path.name)
    assert [path.parent.name for path in written] == [CLASSES[7], CLASSES[0]]
    for path, expected in zip(written, pixels, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.pad(expected, 2))
    np.testing.assert_array_equal(
        pad_to_rgb(pixels), np.pad(pixels[:, None].repeat(3, 1), ((0, 0), (0, 0), (2, 2), (2, 2)))
    )
