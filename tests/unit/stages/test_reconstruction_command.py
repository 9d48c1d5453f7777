"""Reconstructions: the numbers, which images they are of, the picture, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmfm import data
from mmfm.autoencoder import rae
from mmfm.autoencoder.decoder import load_decoder, save_decoder
from mmfm.autoencoder.encoders import load_encoder
from mmfm.cli.__main__ import main
from mmfm.config import STAGES
from mmfm.evaluation.detector import load_detector
from mmfm.evaluation.frechet import frechet_distance
from mmfm.evaluation.reconstruction import psnr, ssim
from mmfm.infra import store
from mmfm.stages import reconstruction as stage
from support.places import DETECTOR
from support.tiny import SECTIONS, SIZE, Pipeline, write_encoder, write_images, write_listing

FID = {"detector": "fashion", "weights": str(DETECTOR), "reference": "train", "batch_size": 4, "workers": 0}


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Listing of 17 images that are not among the training images."""
    root = tmp_path_factory.mktemp("heldout")
    return write_listing(root / "heldout.safetensors", write_images(root / "images", 17, seed=5))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(stage, "_SHARD_IMAGES", 7)


def arguments(pipeline: Pipeline, out: Path, heldout: Path | None, files: dict | None = None, **fid: object) -> list:
    sections = {**SECTIONS, "fid": {**FID, **fid}}
    settings = json.dumps({name: sections[name] for name in STAGES["reconstruction"].sections})
    paths = {
        "--train-listing": pipeline.listing, "--encoder-weights": pipeline.encoder, "--decoder": pipeline.decoder,
        "--detector-weights": DETECTOR, **({"--heldout-listing": heldout} if heldout else {}),
        **{f"--out-{kind}": out / f"dinov2.{kind}" for kind in ("txt", "json", "png")}, **(files or {}),
    }  # fmt: skip
    return ["reconstruction", "--settings", settings, *(str(word) for pair in paths.items() for word in pair)]


def run(pipeline: Pipeline, out: Path, heldout: Path | None, files: dict | None = None, **fid: object) -> dict:
    assert main(arguments(pipeline, out, heldout, files, **fid)) == 0
    return store.read_json(out / "dinov2.json")


def pairs(pipeline: Pipeline, listing: Path, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Originals and reconstructions, all in one batch."""
    images = next(data.image_batches(listing, SIZE, [rows]))[1]
    encoder = load_encoder("dinov2", pipeline.encoder, SIZE)
    with torch.no_grad():
        latent, _ = encoder(data.to_float(images, torch.device("cpu")))
        return images, rae.to_uint8(rae.RAE(encoder, load_decoder(pipeline.decoder)).decode(latent))


def distance(images: torch.Tensor, decoded: torch.Tensor) -> float:
    detector, found = load_detector("fashion", DETECTOR), []
    for part in (decoded, images):
        features = detector.features(part).double().numpy()
        found += [features.mean(0), np.cov(features, rowvar=False)]
    return frechet_distance(*found)


def test_numbers_of_the_held_out_images(tiny_pipeline, heldout, tmp_path):
    result = run(tiny_pipeline, tmp_path, heldout)
    originals, decoded = pairs(tiny_pipeline, heldout, list(range(17)))
    assert result["frechet_distance"] == pytest.approx(distance(originals, decoded), rel=1e-4)
    assert result["metrics"]["psnr"] == pytest.approx(psnr(originals, decoded).mean().item(), rel=1e-4)
    assert result["metrics"]["ssim"] == pytest.approx(ssim(originals, decoded).mean().item(), rel=1e-4)
    assert (result["images"]["set"], result["images"]["n_images"]) == ("held-out", 17)
    text = (tmp_path / "dinov2.txt").read_text()
    first = text.partition("\n")[0]
    assert first == f"Frechet distance of decoded and original images (not an rFID): {result['frechet_distance']:.4f}"
    assert f"SSIM              {result['metrics']['ssim']:.4f}" in text
    assert "17 held-out images of 32 x 32 pixels, of which the decoder's file does not say" in text
    assert "17 images are too few for 64 features" in text and "(data.holdout, data.heldout_root)" in text
    assert "NOT an rFID" in text and result["decoder"]["digest"] == store.file_digest(tiny_pipeline.decoder)


def test_batches_change_only_the_rounding(tiny_pipeline, heldout, tmp_path):
    one, other = (run(tiny_pipeline, tmp_path / str(batch), heldout, batch_size=batch) for batch in (3, 64))
    assert one["frechet_distance"] == pytest.approx(other["frechet_distance"], rel=1e-4)
    assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-4)
    assert one["configuration_digest"] == other["configuration_digest"]


def test_without_held_out_images_some_of_the_training_images(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "PUBLISHED_IMAGES", 15)
    empty = tmp_path / "empty.safetensors"
    none = np.empty(0, np.int64)
    data.write_listing(empty, tmp_path, "heldout", ["class0"], [], none, none)
    result = run(tiny_pipeline, tmp_path / "out", empty)
    originals, decoded = pairs(tiny_pipeline, tiny_pipeline.listing, [i * 40 // 15 for i in range(15)])
    assert result["metrics"]["psnr"] == pytest.approx(psnr(originals, decoded).mean().item(), rel=1e-4)
    text = (tmp_path / "out" / "dinov2.txt").read_text()
    assert "15 training images of 32 x 32 pixels, evenly spaced among 40" in text
    assert "These are training images" in text and "Set data.holdout" in text
    assert run(tiny_pipeline, tmp_path / "none", None) == result


@pytest.mark.parametrize(
    "recorded, with_heldout, words",
    [
        ("own", True, "on which the decoder was not trained"),
        ("own", False, "on which the decoder was trained"),
        ("another", True, "does not say on which images it was trained; if these were among them"),
    ],
)
def test_whether_the_decoder_has_seen_the_images(tiny_pipeline, heldout, tmp_path, recorded, with_heldout, words):
    known = {"own": data.Listing.open(tiny_pipeline.listing).digest, "another": "0" * 64}[recorded]
    about = {"digests": {"listing": known, "encoder": store.folder_digest(tiny_pipeline.encoder)}, "steps": 1234}
    decoder = tmp_path / "decoder.safetensors"
    save_decoder(load_decoder(tiny_pipeline.decoder), decoder, about)
    run(tiny_pipeline, tmp_path / "out", heldout if with_heldout else None, {"--decoder": decoder})
    text = (tmp_path / "out" / "dinov2.txt").read_text()
    assert words in text and "1,234 steps" in text


def test_the_picture_has_originals_above_their_reconstructions(tiny_pipeline, heldout, tmp_path):
    run(tiny_pipeline, tmp_path, heldout)
    originals, decoded = pairs(tiny_pipeline, heldout, [i * 17 // 16 for i in range(16)])
    with Image.open(tmp_path / "dinov2.png") as picture:
        pixels = np.asarray(picture)
    tile, gap = 64, 2  # enlarged to 64 pixels
    assert pixels.shape == (4 * tile + 3 * gap, 8 * tile + 7 * gap, 3)
    for place, image in ((0, originals[0]), (1, decoded[0]), (2, originals[8]), (3, decoded[8])):
        top = place * (tile + gap)
        found = pixels[top : top + tile : 2, 5 * (tile + gap) : 5 * (tile + gap) + tile : 2]
        shown = (originals, decoded)[place % 2][8 * (place // 2) + 5]
        assert np.abs(found.astype(int) - shown.permute(1, 2, 0).numpy()).max() <= 1
        found = pixels[top : top + tile : 2, :tile:2]
        assert np.abs(found.astype(int) - image.permute(1, 2, 0).numpy()).max() <= 1


def test_progress_says_how_long_it_takes(tiny_pipeline, heldout, tmp_path, capsys):
    run(tiny_pipeline, tmp_path, heldout)
    captured = capsys.readouterr()
    assert "reconstruction: 17/17 images" in captured.err and "left" in captured.err
    assert captured.out == (tmp_path / "dinov2.txt").read_text()


def test_what_does_not_belong_together_is_refused(tiny_pipeline, heldout, tmp_path, capsys):
    about = {"digests": {"encoder": "0" * 64}}
    save_decoder(load_decoder(tiny_pipeline.decoder), tmp_path / "alien.safetensors", about)
    single = write_listing(tmp_path / "one.safetensors", write_images(tmp_path / "one", 1))
    for files, listing, message in (
        ({"--decoder": tmp_path / "alien.safetensors"}, heldout, "trained with another encoder"),
        ({"--decoder": tmp_path / "absent.safetensors"}, heldout, "absent.safetensors"),
        ({"--decoder": DETECTOR}, heldout, "the decoder file"),
        ({"--encoder-weights": tmp_path / "nowhere"}, heldout, "nowhere"),
        ({}, single, "lists 1 image, a covariance needs at least 2; hold more out"),
    ):
        assert main(arguments(tiny_pipeline, tmp_path / "out", listing, files)) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error and error.startswith("reconstruction: error:")
    assert not list((tmp_path / "out").glob("dinov2.*"))


def test_an_encoder_that_the_decoder_does_not_fit(tiny_pipeline, heldout, tmp_path, capsys):
    line = [*arguments(tiny_pipeline, tmp_path / "out", heldout), "image.size=48"]
    assert main(line) == 2
    assert "makes images of 32 pixels, but image.size is 48" in capsys.readouterr().err
    other = write_encoder(tmp_path / "other", seed=1)
    assert run(tiny_pipeline, tmp_path / "other-out", heldout, {"--encoder-weights": other})["frechet_distance"] > 0
