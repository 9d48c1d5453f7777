"""ADM's reference files: what is read, and what is refused."""

import os
from pathlib import Path

import numpy as np
import pytest

from mmfm.evaluation.adm import AdmFile


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "mu": generator.normal(size=6).astype(np.float32),
        "sigma": np.eye(6),
        "mu_s": generator.normal(size=5),
        "sigma_s": 2 * np.eye(5),
        "arr_0": generator.integers(0, 256, (4, 8, 8, 3), np.uint8),
    }


def write(path: Path, arrays: dict[str, np.ndarray], *names: str) -> Path:
    np.savez(path, **({name: arrays[name] for name in names} if names else arrays))
    return path


def test_reads_everything(arrays, tmp_path):
    found = AdmFile.open(write(tmp_path / "all.npz", arrays))
    assert np.array_equal(found.gaussian.mean, arrays["mu"]) and found.gaussian.mean.dtype == np.float64
    assert np.array_equal(found.spatial.covariance, arrays["sigma_s"])
    assert isinstance(found.images, np.memmap) and np.array_equal(found.images, arrays["arr_0"])


@pytest.mark.parametrize("names", [("mu", "sigma"), ("mu_s", "sigma_s"), ("arr_0",)])
def test_reads_what_there_is(arrays, tmp_path, names):
    found = AdmFile.open(write(tmp_path / "some.npz", arrays, *names))
    assert (found.gaussian is None, found.spatial is None, found.images is None) == (
        "mu" not in names, "mu_s" not in names, "arr_0" not in names,
    )  # fmt: skip


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def test_python_objects_are_refused_and_not_run(arrays, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mu", "arr_0"):
        path = write(tmp_path / "bomb.npz", {**arrays, name: np.array([Bomb()], dtype=object)})
        with pytest.raises(ValueError, match=r"bomb\.npz"):
            AdmFile.open(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated(arrays, tmp_path, share):
    path = write(tmp_path / "cut.npz", arrays)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"cut\.npz' is truncated or not an \.npz file .*download it again"):
        AdmFile.open(path)


def test_a_damaged_member(arrays, tmp_path):
    path = write(tmp_path / "damaged.npz", arrays, "mu", "sigma")
    content = bytearray(path.read_bytes())
    content[content.index(np.float64(1.0).tobytes()) + 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"'.*damaged\.npz' can't be read as numbers"):
        AdmFile.open(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sigma": None}, "has only one of mu and sigma"),
        ({"sigma": np.eye(5)}, r"mu \(6,\) and sigma \(5, 5\)"),
        ({"mu": np.zeros((2, 3))}, r"mu \(2, 3\)"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.float32)}, r"float32 \(4, 8, 8, 3\), but images are uint8"),
        ({"arr_0": np.zeros((4, 8, 8, 1), np.uint8)}, r"\(4, 8, 8, 1\)"),
        ({"arr_0": np.zeros((8, 8, 3), np.uint8)}, r"\(8, 8, 3\)"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "holds 0 images; at least 2"),
    ],
)
def test_other_arrays_are_refused(arrays, tmp_path, change, message):
    changed = {name: array for name, array in {**arrays, **change}.items() if array is not None}
    with pytest.raises(ValueError, match=message):
        AdmFile.open(write(tmp_path / "other.npz", changed))


def test_two_images_are_enough(arrays, tmp_path):
    two = {"arr_0": arrays["arr_0"][:2]}
    assert len(AdmFile.open(write(tmp_path / "two.npz", two)).images) == 2


def test_a_file_with_nothing_useful_and_no_file(arrays, tmp_path):
    with pytest.raises(ValueError, match="has labels, but neither mu and sigma nor arr_0"):
        AdmFile.open(write(tmp_path / "labels.npz", {"labels": np.zeros(3)}))
    with pytest.raises(FileNotFoundError, match=r"no file '.*nowhere"):
        AdmFile.open(tmp_path / "nowhere.npz")


def test_compressed_images_are_left_aside_where_there_are_moments(arrays, tmp_path):
    path = tmp_path / "compressed.npz"
    np.savez_compressed(path, **arrays)
    found = AdmFile.open(path)
    assert found.images is None and np.array_equal(found.gaussian.mean, arrays["mu"])
    np.savez_compressed(path, arr_0=arrays["arr_0"])
    with pytest.raises(ValueError, match="compressed"):
        AdmFile.open(path)
