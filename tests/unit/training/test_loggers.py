"""Boards: event files without duplicate steps; see test_wandb.py for the other one."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mmfm.infra.distributed import Ranks
from mmfm.training import loggers
from mmfm.training.history import preview_file, read_history
from mmfm.training.runlog import RunLog
from support import train_runs
from support.fid_curves import scalars
from support.tiny import SECTIONS
from support.tiny_training import STEPS, run


def test_event_files_hold_the_history_once(tmp_path):
    state, alone = tmp_path / "state-x", Ranks(0, 1, torch.device("cpu"))
    run(state, alone, "ddp", logger="tensorboard")
    lines = read_history(state / "history.jsonl")
    left = loggers.open_logger("tensorboard", state, lines[:3])  # resumed at step 3
    for line in lines[3:]:
        left.write(line)
    found = scalars(state / "tensorboard")  # of a run that was killed: nothing was closed
    assert found["train/loss"] == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    assert len(lines) == STEPS and {"train/grad_norm", "train/images_per_second", "train/lr"} <= found.keys()


def pictures(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return {e.step: np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in events.Images("preview/images")}


def test_previews_are_shown_once_in_a_resumed_run(tiny_pipeline, tmp_path):
    keys = {"logger": "tensorboard", "preview": {**SECTIONS["train"]["preview"], "every": 3}}
    train_runs.run(tiny_pipeline, tmp_path, epochs=2, **keys)
    state = train_runs.state_of(tmp_path)
    shutil.rmtree(state / "step-00000010")  # goes on from 8
    train_runs.run(tiny_pipeline, tmp_path, **keys)
    shown = pictures(state / "tensorboard")
    assert list(shown) == [3, 6, 9, 12]
    for step, pixels in shown.items():
        with Image.open(preview_file(state, step)) as picture:
            assert np.array_equal(pixels, np.asarray(picture))


@pytest.mark.parametrize(("step", "shown"), [(6, [3, 6]), (None, [3, 6, 9])])
def test_a_board_is_given_the_previews_up_to_the_step_that_a_run_goes_on_from(tmp_path, monkeypatch, step, shown):
    for drawn in (3, 6, 9):
        preview_file(tmp_path, drawn).touch()
    given = []
    monkeypatch.setattr("mmfm.training.runlog.open_logger", lambda logger, state, lines: given.extend(lines))
    RunLog(tmp_path, "tensorboard", step, Ranks(0, 1, torch.device("cpu")))
    assert given == [{"step": n, "preview/images": preview_file(tmp_path, n)} for n in shown]


def test_a_board_that_fails_ends_no_training(tmp_path, monkeypatch, caplog):
    class Failing(loggers.NoLogger):
        def write(self, line):
            raise ConnectionResetError("Connection lost")

    monkeypatch.setattr("mmfm.training.runlog.open_logger", lambda *_: Failing())
    record = RunLog(tmp_path, "wandb", None, Ranks(0, 1, torch.device("cpu")))
    for step in (1, 2):
        record.add({"step": step, "loss": 0.5})
    record.close()
    assert [line["step"] for line in read_history(tmp_path / "history.jsonl")] == [1, 2]
    assert caplog.text.count("Connection lost") == 1


def test_an_unknown_logger_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of tensorboard, wandb, none"):
        loggers.open_logger("aim", tmp_path, [])
