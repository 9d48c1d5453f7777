"""Boards: event files without duplicate steps, wandb with and without a network."""

import sys

import pytest
from divided import STEPS, run

from mmfm.infra.distributed import Ranks
from mmfm.training import board
from mmfm.training.history import read_history


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_event_files_hold_the_history_once(tmp_path):
    import torch

    state, alone = tmp_path / "state-x", Ranks(0, 1, torch.device("cpu"))
    run(state, alone, "ddp", logger="tensorboard")
    lines = read_history(state / "history.jsonl")
    left = board.open_board("tensorboard", state, "train", lines[:3])  # resumed at step 3
    for line in lines[3:]:
        left.write(line)
    found = scalars(state / "tensorboard")  # of a run that was killed: nothing was closed
    assert found["train/loss"] == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    assert len(lines) == STEPS and {"train/grad_norm", "train/images_per_second", "train/lr"} <= found.keys()


STUB = """
calls = []
class _Run:
    def log(self, values, step): calls.append((step, values))
    def finish(self): calls.append("finish")
def init(**options):
    calls.append(options)
    return _Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A module with the three functions of wandb that are called; the real one is no dependency."""
    (tmp_path / "wandb.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    yield __import__("wandb")
    del sys.modules["wandb"]


def test_wandb_goes_on_offline(wandb, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(board, "_WANDB_HOST", ("127.0.0.1", 9))  # nobody listens to this port
    opened = board.open_board("wandb", tmp_path / "state-x", "train", [])
    opened.write({"step": 3, "loss": 0.5})
    opened.close()
    options, *calls = wandb.calls
    assert options["mode"] == "offline" and options["id"] == "state-x" and options["resume"] == "allow"
    assert calls == [(3, {"loss": 0.5}), "finish"] and "records offline" in caplog.text


def test_wandb_that_is_not_installed_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        board.open_board("wandb", tmp_path, "train", [])


def test_an_unknown_logger_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of tensorboard, wandb, none"):
        board.open_board("aim", tmp_path, "train", [])
