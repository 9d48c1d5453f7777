"""Checkpoints: whole or skipped, kept or pruned; published weights."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from mmfm.infra import store
from mmfm.models.dit import DiT, DiTConfig
from mmfm.models.weights import load_ema, save_ema
from mmfm.training import checkpoint

SIZES = DiTConfig(4, 1, 8, (16, 16), (1, 1), (2, 2), 3, 0.0)


def write(state: Path, step: int, *, milestone: bool = False, keep: int = 10) -> Path:
    model = {"weight": torch.full((4,), float(step))}
    optimizer = {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]}
    return checkpoint.save(
        state, step, {"model": model, "ema": model}, optimizer, {"seconds": 1 / 3}, milestone=milestone, keep=keep
    )


def steps(state: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in state.glob("step-*"))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state-0123456789abcdef"
    path.mkdir()
    return path


def test_what_is_read_is_what_was_written(state):
    write(state, 5)
    found = checkpoint.find(state, 10)
    assert found.step == 5 and found.values == {"seconds": 1 / 3}
    assert found.tensors("model")["weight"].tolist() == [5.0] * 4
    assert found.optimizer()["param_groups"][0]["betas"] == (0.9, 0.95)


def test_an_empty_state_has_none(state):
    assert checkpoint.find(state, 10) is None


def truncate(path: Path) -> None:
    file = path / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def lose_a_file(path: Path) -> None:
    (path / "optimizer.pt").unlink()


def lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def break_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"run": ')


def come_from_another_run(path: Path) -> None:
    manifest = store.read_json(path / "manifest.json")
    store.write_json(path / "manifest.json", {**manifest, "run": "state-fedcba9876543210"})


def pose_as_another_step(path: Path) -> None:
    shutil.move(path, path.with_name("step-00000009"))


@pytest.mark.parametrize(
    "damage",
    [
        truncate, flip_a_bit, lose_a_file, lose_the_manifest, break_the_manifest, come_from_another_run,
        pose_as_another_step,
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_checkpoint_is_passed_over_with_a_warning(state, damage, caplog):
    write(state, 4)
    damage(write(state, 8))
    assert checkpoint.find(state, 10).step == 4
    assert "skipping checkpoint" in caplog.text


def test_the_newest_stay_and_milestones_too(state):
    write(state, 1, milestone=True)
    for step in (2, 3, 4, 5):
        write(state, step, keep=2)
    assert steps(state) == [1, 4, 5]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_a_file, lose_the_manifest, break_the_manifest])
def test_a_damaged_checkpoint_pushes_out_no_good_one_and_goes_with_the_next(state, damage):
    write(state, 8, keep=2)
    damage(write(state, 9, keep=2))
    assert checkpoint.find(state, 100).step == 8
    write(state, 10, keep=2)
    assert [path.name for path in sorted(state.iterdir())] == ["step-00000008", "step-00000010"]


def test_what_has_no_readable_manifest_goes_whenever_it_broke(state):
    break_the_manifest(write(state, 8))
    lose_the_manifest(write(state, 9))
    write(state, 10, keep=1)
    assert [path.name for path in state.iterdir()] == ["step-00000010"]


def test_one_that_cannot_be_read_now_stays(state, monkeypatch):
    write(state, 4)
    write(state, 8)

    def unreadable(path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(store, "file_digest", unreadable)
        assert checkpoint.find(state, 10) is None
    assert checkpoint.find(state, 10).step == 8


def test_leftovers_of_killed_processes_go_with_the_next_checkpoint(state):
    (state / ".partial-1-step-00000003").mkdir()
    (state / ".step-00000003.old").mkdir()
    write(state, 4)
    assert [path.name for path in state.iterdir()] == ["step-00000004"]


def test_a_kept_checkpoint_of_the_target_wins_over_newer_ones(state):
    for step in (4, 8):
        write(state, step)
    assert checkpoint.find(state, 4).step == 4


def test_going_back_to_a_step_that_was_not_kept_names_those_that_were(state):
    for step in (4, 8):
        write(state, step)
    with pytest.raises(ValueError, match=r"already at step 8, and step 6 was not kept \(there are: 4, 8\)"):
        checkpoint.find(state, 6)


def test_published_weights_come_back_with_sizes_and_provenance(tmp_path):
    model = DiT(SIZES)
    digest = save_ema(tmp_path / "ema.safetensors", model, {"setting": "mode", "step": 7})
    loaded, metadata = load_ema(tmp_path / "ema.safetensors")
    assert loaded.config == SIZES
    assert metadata["digest"] == digest and metadata["setting"] == "mode" and metadata["step"] == 7
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_weights_that_are_missing_or_no_dit_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="run train"):
        load_ema(tmp_path / "ema.safetensors")
    arrays = {"weight": torch.zeros(3).numpy()}
    store.write_arrays(tmp_path / "other.safetensors", arrays, {"model": {**json.loads(json.dumps(SIZES.__dict__))}})
    with pytest.raises(ValueError, match="don't match its metadata"):
        load_ema(tmp_path / "other.safetensors")
    store.write_arrays(tmp_path / "bare.safetensors", arrays, {})
    with pytest.raises(ValueError, match="no metadata of a DiT"):
        load_ema(tmp_path / "bare.safetensors")


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def test_an_optimizer_that_holds_code_is_not_run(state, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = write(state, 5)
    torch.save({"state": Bomb()}, path / "optimizer.pt")
    manifest = store.read_json(path / "manifest.json")
    manifest["files"]["optimizer.pt"] = store.file_digest(path / "optimizer.pt")
    store.write_json(path / "manifest.json", manifest)
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.find(state, 10).optimizer()
    assert not (tmp_path / "exploded").exists()
