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
from mmfm.evaluation.detector import load_detector
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
            data,
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
    path = write_npz(tmp_path / "VIRTUAL.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), mu_s=np.zeros(5))
    found = make((), tmp_path / "reference.safetensors", reference=str(path))
    with np.load(path) as archive:
        assert np.array_equal(found.mu, archive["mu"]) and np.array_equal(found.sigma, archive["sigma"])
    assert found.about["floor"] is None and found.about["n_images"] is None and "VIRTUAL.npz" in found.about["source"]


@pytest.mark.parametrize(
    "content, message",
    [
        ({"d": 48}, "64 features"),
        ({"sigma": -np.eye(64)}, "is not a covariance"),
        ({"mu": np.full(64, np.nan)}, "NaN"),
        ({"sigma": np.array([{}], dtype=object)}, "can't be read"),
    ],
)
def test_refuses_an_npz_that_does_not_fit(content, message, tmp_path, capsys):
    path = write_npz(tmp_path / "bad.npz", **content)
    assert main(arguments((), tmp_path / "reference.safetensors", reference=str(path))) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "reference.safetensors").exists()


def test_refuses_missing_inputs(tmp_path, capsys):
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    for name, message in (("none.npz", "no file"), ("other.npz", "lacks mu"), ("text.npz", "can't be read")):
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
