"""The reference of the Frechet distance: the same for any restart, batch and process count; imports are checked."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfm import config, data
from mmfm.cli.__main__ import main
from mmfm.data import Listing
from mmfm.evaluation.detector import Detector, Outputs, load_detector
from mmfm.evaluation.frechet import frechet_distance
from mmfm.evaluation.reference import Reference
from mmfm.infra.distributed import Ranks
from mmfm.stages import fid_reference as stage
from support.places import DETECTOR
from support.tiny import write_images, write_listing

FID = {"detector": "fashion", "weights": str(DETECTOR), "reference": "train", "batch_size": 8, "workers": 0}


@pytest.fixture(scope="module")
def listings(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Listings of 40 training and 17 held-out images."""
    root = tmp_path_factory.mktemp("listings")
    other = write_images(root / "other", 17, seed=5)
    return write_listing(root / "train.safetensors", tiny_images), write_listing(root / "heldout.safetensors", other)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(stage, "_SHARD_IMAGES", 7)


def arguments(listings: tuple[Path, ...], out: Path, **changes: object) -> list[str]:
    flags = ("--train-listing", "--heldout-listing")
    names = [part for pair in zip(flags, map(str, listings), strict=False) for part in pair]
    settings = json.dumps({"image": {"size": 32}, "fid": {**FID, **changes}})
    return ["fid_reference", "--settings", settings, *names, "--detector-weights", str(DETECTOR), "--out", str(out)]


def make(listings: tuple[Path, ...], out: Path, **changes: object) -> Reference:
    assert main(arguments(listings, out, **changes)) == 0
    return Reference.open(out)


def features(listing: Path) -> np.ndarray:
    images = next(data.image_batches(listing, 32, [range(len(Listing.open(listing)))]))[1]
    return load_detector("fashion", DETECTOR).features(images).double().numpy()


def test_moments_are_those_of_all_images_at_once(listings, tmp_path):
    found = make(listings, tmp_path / "reference.safetensors")
    train, heldout = (features(path) for path in listings)
    assert np.allclose(found.mu, train.mean(0), rtol=1e-6, atol=1e-7)
    assert np.allclose(found.sigma, np.cov(train, rowvar=False), rtol=1e-5, atol=1e-7), "unbiased"
    about = found.about
    floor = frechet_distance(train.mean(0), np.cov(train.T), heldout.mean(0), np.cov(heldout.T))
    assert about["floor"] == pytest.approx(floor, rel=1e-4)
    assert (about["n_images"], about["floor_n_images"], about["image_size"]) == (40, 17, 32)
    assert "40 training images" in about["source"] and "not comparable" in about["detector"]
    assert [p.name for p in tmp_path.glob("*.*")] == ["reference.safetensors"]


def test_no_floor_without_heldout_images(listings, tmp_path):
    about = make(listings[:1], tmp_path / "reference.safetensors").about
    assert about["floor"] is None and about["floor_n_images"] is None


def test_batch_size_changes_rounding_at_most(listings, tmp_path):
    first, second = (make(listings, tmp_path / str(size) / "reference.safetensors", batch_size=size) for size in (8, 3))
    assert np.allclose(first.sigma, second.sigma, rtol=1e-5, atol=1e-6)


def test_a_restart_makes_only_what_is_missing(listings, tmp_path, monkeypatch):
    undisturbed = make(listings, tmp_path / "undisturbed" / "reference.safetensors")
    out, count = tmp_path / "reference.safetensors", 0
    write = stage.store.write_arrays

    def die_at_the_fourth(path, *rest):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stage.store, "write_arrays", die_at_the_fourth)
        assert main(arguments(listings, out)) == 130
    (state,) = tmp_path.glob("state-*")
    shards = sorted(state.glob("*.safetensors"))
    assert [s.name for s in shards] == [f"shard-{i:05d}.safetensors" for i in range(3)] and not out.exists()
    shards[1].write_bytes(shards[1].read_bytes()[:-50])
    seen = []
    load = data.image_batches
    with monkeypatch.context() as patch:
        patch.setattr(
            data.loader,
            "image_batches",
            lambda path, size, batches, *a, **k: (seen.extend(batches), load(path, size, batches, *a, **k))[1],
        )
        resumed = make(listings, out)
    assert seen == [range(7, 14), range(21, 28), range(28, 35), range(35, 40), range(0, 7), range(7, 14), range(14, 17)]
    assert np.array_equal(resumed.mu, undisturbed.mu) and np.array_equal(resumed.sigma, undisturbed.sigma)
    assert resumed.about == undisturbed.about


def test_a_million_images_have_few_shards(monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "_SHARD_IMAGES", 1000)
    for n, expected in ((1, 1), (1000, 1), (1001, 2), (10_000, 10), (1_281_167, 128)):
        monkeypatch.setattr(stage.data.Listing, "open", lambda path, n=n: range(n))
        shards = stage.cut("shard", tmp_path, tmp_path)
        assert len(shards) == expected and sum(map(len, shards)) == n


def write_npz(path: Path, d: int = 64, **other: np.ndarray) -> Path:
    factor = np.random.default_rng(0).normal(size=(d, 3 * d))
    np.savez(path, **{"mu": factor.mean(1), "sigma": np.cov(factor), **other})
    return path


def test_import_of_an_npz(tmp_path):
    """Like ADM's file: more arrays than needed, no listing, no floor."""
    path = write_npz(
        tmp_path / "VIRTUAL.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), mu_s=np.zeros(5), sigma_s=np.eye(5)
    )
    found = make((), tmp_path / "reference.safetensors", reference=str(path))
    with np.load(path) as archive:
        assert np.array_equal(found.mu, archive["mu"]) and np.array_equal(found.sigma, archive["sigma"])
    assert found.about["floor"] is None and found.about["n_images"] is None and "VIRTUAL.npz" in found.about["source"]


def test_features_of_single_images_are_kept_if_a_metric_needs_them(listings, tmp_path):
    """Every third of 40 images and no others; the moments stay those of all."""
    plain = make(listings, tmp_path / "plain" / "reference.safetensors")
    asked = {"metrics": ["frechet", "kid", "precision"], "reference_images": 13}
    found = make(listings, tmp_path / "bank" / "reference.safetensors", **asked)
    assert plain.bank is None and found.bank.dtype == np.float32 and found.spatial is None
    assert np.array_equal(found.mu, plain.mu) and np.array_equal(found.sigma, plain.sigma)
    assert np.allclose(found.bank, features(listings[0])[[i * 40 // 13 for i in range(13)]], rtol=1e-4, atol=1e-5)
    assert len(make(listings, tmp_path / "all" / "r.safetensors", metrics=["frechet", "recall"]).bank) == 40


def test_metrics_that_need_the_same_of_the_reference_share_it():
    def identity(**keys: object) -> dict:
        values = {"image": {"size": 32}, "fid": {**FID, "detector": "inception", **keys}}
        return config.StageConfig.build("fid_reference", values).identity()

    before = identity()
    assert "metrics" not in before["fid"] and "reference_images" not in before["fid"]
    assert identity(metrics=["frechet", "inception_score"], reference_images=50) == before
    kid, recall = (identity(metrics=["frechet", name], reference_images=50) for name in ("kid", "recall"))
    assert kid == recall != before and identity(metrics=["frechet", "sfid"]) != before
    assert identity(metrics=["frechet", "kid"], reference_images=51) != kid


def network(images: torch.Tensor) -> Outputs:
    """Means of coarse and of fine cells, standing for features and spatial ones."""
    coarse, fine = (torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, n).flatten(1) for n in (2, 3))
    return Outputs(coarse, fine)


CELLS = Detector(
    "cells", "c" * 64, 12, False, lambda images: network(images).features, torch.device("cpu"), run_all=network,
    spatial_dimension=27,
)  # fmt: skip
ALONE = Ranks(0, 1, torch.device("cpu"))


def section(**keys: object) -> config.Fid:
    values = {"image": {"size": 32}, "fid": {**FID, "detector": "inception", **keys}}
    return config.StageConfig.build("fid_reference", values).fid


def test_spatial_moments_of_the_training_images(listings, tmp_path):
    keys = {**FID, "detector": "inception", "metrics": ["frechet", "sfid", "kid"], "reference_images": 10}
    sections = config.StageConfig.build("fid_reference", {"image": {"size": 32}, "fid": keys})
    stage.fid_reference(sections, CELLS, *listings, tmp_path / "reference.safetensors", ALONE)
    found = Reference.open(tmp_path / "reference.safetensors")
    images = next(data.image_batches(listings[0], 32, [range(40)]))[1]
    fine = network(images).spatial.double().numpy()
    assert np.allclose(found.spatial.mean, fine.mean(0)) and found.bank.shape == (10, 12)
    assert np.allclose(found.spatial.covariance, np.cov(fine, rowvar=False), rtol=1e-5, atol=1e-8)


def test_an_npz_serves_every_metric_that_it_can(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    outputs = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    moments = {"mu": np.full(12, 0.5), "sigma": np.eye(12)}
    spatial = {"mu_s": np.full(27, 0.25), "sigma_s": 2 * np.eye(27)}
    out = tmp_path / "r.safetensors"

    def read(arrays: dict, *metrics: str, images_kept: int = 10) -> Reference:
        np.savez(tmp_path / "real.npz", **arrays)
        asked = section(metrics=["frechet", *metrics], reference_images=images_kept)
        stage.import_npz(tmp_path / "real.npz", CELLS, out, asked, 32, ALONE)
        return Reference.open(out)

    whole = read({**moments, **spatial, "arr_0": images}, "sfid", "kid", "inception_score")
    assert np.array_equal(whole.mu, moments["mu"]) and np.array_equal(whole.spatial.covariance, spatial["sigma_s"])
    assert np.allclose(whole.bank, outputs.features[[i * 24 // 10 for i in range(10)]]) and len(whole.bank) == 10
    assert whole.about["n_images"] is None and whole.about["image_size"] == 32
    alone = read({"arr_0": images}, "sfid", "recall", images_kept=30)
    assert np.allclose(alone.mu, outputs.features.mean(0)) and alone.about["n_images"] == 24
    assert np.allclose(alone.spatial.mean, outputs.spatial.mean(0)) and len(alone.bank) == 24
    assert read({**moments, **spatial, "arr_0": images}).bank is None
    with pytest.raises(
        ValueError, match=r"lacks the images \(arr_0\) from which .* what sfid need.* that fid.metrics has"
    ):
        read(moments, "sfid", "inception_score")
    # The stage knows the kind of statistics alone: the error must not name a metric that nobody asked for as asked for.
    with pytest.raises(ValueError, match=r"what precision, recall, density, coverage, kid need; set fid\.reference to"):
        read(moments, "recall")
    with pytest.raises(ValueError, match=r"has images of 16 x 16 pixels, but image\.size is 32"):
        read({**moments, "arr_0": images[:, :16, :16]}, "kid")
    with pytest.raises(ValueError, match=r"has mu_s \(5,\), but the detector has 27 features"):
        read({**moments, "mu_s": np.zeros(5), "sigma_s": np.eye(5)}, "sfid")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"d": 48}, "64 features"),
        ({"sigma": -np.eye(64)}, "is not a covariance"),
        ({"mu": np.full(64, np.nan)}, "NaN"),
        ({"sigma": np.array([{}], dtype=object)}, "can't be read"),
        ({"arr_0": np.zeros((3, 8, 8, 3), np.float32)}, "holds float32"),
    ],
)
def test_refuses_an_npz_that_does_not_fit(content, message, tmp_path, capsys):
    path = write_npz(tmp_path / "bad.npz", **content)
    assert main(arguments((), tmp_path / "reference.safetensors", reference=str(path))) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "reference.safetensors").exists()


def test_refuses_missing_inputs(tmp_path, capsys):
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    cases = {"none.npz": "no file", "other.npz": "neither mu and sigma nor", "text.npz": "not an .npz"}
    for name, message in cases.items():
        assert main(arguments((), tmp_path / "r.safetensors", reference=str(tmp_path / name))) == 2
        assert message in capsys.readouterr().err
    assert main(arguments((), tmp_path / "r.safetensors")) == 2
    assert "--train-listing" in capsys.readouterr().err


def test_other_detectors_have_other_state(listings, tmp_path):
    """The fingerprint covers the detector's weights, not only their path."""
    detector = load_detector("fashion", DETECTOR)
    sections = config.StageConfig.build("fid_reference", {"image": {"size": 32}, "fid": FID})
    states = set()
    for digest in ("a" * 64, "b" * 64):
        other, ranks = replace(detector, digest=digest, run=stop), Ranks(0, 1, torch.device("cpu"))
        with pytest.raises(RuntimeError, match="stop"):
            stage.fid_reference(sections, other, *listings, tmp_path / "r.safetensors", ranks)
        states = set(tmp_path.glob("state-*"))
    assert len(states) == 2


def stop(images: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("stop")
