"""Digests, whole files, memory-mapped arrays."""

import errno
import os
import time

import numpy as np
import pytest

from mmfm.infra import disk, store


def test_arrays_round_trip_memory_mapped(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float64).reshape(2, 3), "empty": np.empty((0, 4), np.int32)}
    digest = store.write_arrays(tmp_path / "x.safetensors", arrays, {"listing": "abc", "n": 3})
    mapped, metadata = store.map_arrays(tmp_path / "x.safetensors")
    assert metadata == {"listing": "abc", "n": 3, "digest": digest}
    for name, array in arrays.items():
        np.testing.assert_array_equal(mapped[name], array)
        assert mapped[name].dtype == array.dtype
    assert not mapped["a"].flags.writeable


@pytest.mark.parametrize("size", [0, 4, 40, -1])
def test_a_truncated_file_is_named(tmp_path, size):
    path = tmp_path / "x.safetensors"
    store.write_arrays(path, {"a": np.ones(100)}, {})
    os.truncate(path, path.stat().st_size - 8 if size < 0 else size)
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        store.map_arrays(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    store.write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), store.whole_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert store.read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_digest_sees_shape_dtype_and_values():
    base = np.arange(4, dtype=np.float32)
    others = [base.reshape(2, 2), base.astype(np.float64), base + 1]
    assert len({store.array_digest(a) for a in [base, *others]}) == 4


def test_publish_replaces_a_directory(tmp_path):
    for text in ("one", "two"):
        (tmp_path / "partial").mkdir()
        (tmp_path / "partial" / "f").write_text(text)
        store.publish_directory(tmp_path / "partial", tmp_path / "final")
        assert (tmp_path / "final" / "f").read_text() == text
    assert not (tmp_path / "partial").exists()


def test_canonical_json_ignores_the_order_of_keys():
    assert (
        store.canonical_json({"b": 1, "a": [1.0]}) == store.canonical_json({"a": [1.0], "b": 1}) == '{"a":[1.0],"b":1}'
    )


def test_leftovers_of_killed_writers_are_removed(tmp_path, monkeypatch):
    """On a shared file system, another host's process is not in this host's list; nor is there a host in old names."""
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-1")
    dead, live = 999999999, os.getppid()
    left = {f"gpu-1-{dead}": 0, f"gpu-2-{dead}": 90_000, f"{dead}": 90_000}
    kept = {f"gpu-1-{live}": 90_000, f"gpu-2-{dead}0": 80_000, f"1-{dead}": 0, f"{live}": 0}
    for owner, age in (left | kept).items():
        path = tmp_path / f".x.partial-{owner}.json"
        path.touch()
        os.utime(path, 2 * (time.time() - age,))
    store.write_json(tmp_path / "x.json", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", *(f".x.partial-{owner}.json" for owner in kept)}


def test_a_host_of_any_name_can_write(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "../rack 1/node")
    with store.whole_file(tmp_path / "x.npz") as partial:
        assert partial.parent == tmp_path and partial.suffix == ".npz"
        np.savez(partial, a=np.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_a_model_is_known_by_the_files_that_are_loaded(tmp_path):
    for name in store.MODEL_FILES:
        (tmp_path / name).write_text(name)
    before = store.folder_digest(tmp_path)
    (tmp_path / "README.md").write_text("a note")
    assert store.folder_digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_text("other")
    assert store.folder_digest(tmp_path) != before
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        store.folder_digest(tmp_path)


def test_a_folder_that_may_not_be_written_to_is_named_itself(tmp_path):
    with pytest.raises(PermissionError) as raised, store.whole_file(tmp_path / "a.yaml") as partial:
        raise PermissionError(errno.EACCES, "Permission denied", str(partial))
    assert raised.value.filename == str(tmp_path) and "partial" not in disk.explain(raised.value)
