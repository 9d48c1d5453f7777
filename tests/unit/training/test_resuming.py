"""Runs that are stopped, killed, continued or repeated end like undisturbed ones."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmfm.cli.__main__ import main
from mmfm.infra import distributed, stage_state
from mmfm.training import previews, trainer
from support import processes
from support.train_runs import (
    STEPS_PER_EPOCH,
    arguments,
    assert_equal,
    assert_same,
    history,
    run,
    state_of,
    steps_kept,
    weights,
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_the_same_command_goes_on(tiny_pipeline, undisturbed, tmp_path, monkeypatch, number):
    step = trainer.Trainer._train_step

    def interrupted(self, *inputs):
        step(self, *inputs)
        if self.step == 7:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_pipeline, tmp_path)
    assert steps_kept(tmp_path) == [4, 7] and not (tmp_path / "ema.safetensors").exists()
    assert_same(run(tiny_pipeline, tmp_path), undisturbed)


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGUSR1), (signal.SIGINT, signal.SIGINT),
        (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM),
    ],
)  # fmt: skip
def test_a_request_that_arrives_twice_is_one_request(tiny_pipeline, tmp_path, monkeypatch, capfd, numbers):
    """SLURM signals every process, and torchrun passes on what it got itself."""
    step = trainer.Trainer._train_step

    def interrupted(self, *inputs):
        if self.step == 6:
            for number in numbers:
                os.kill(os.getpid(), number)
        step(self, *inputs)

    monkeypatch.setattr(trainer.Trainer, "_train_step", interrupted)
    assert main(["train", *arguments(tiny_pipeline, tmp_path, "mode")]) == 130
    assert steps_kept(tmp_path) == [4, 7]
    assert "step 7 is saved" in capfd.readouterr().err


def test_a_second_ctrl_c_after_a_while_does_not_wait_for_a_checkpoint(tiny_pipeline, tmp_path, monkeypatch, capfd):
    step = trainer.Trainer._train_step

    def interrupted(self, *inputs):
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(distributed, "_PATIENCE", 0.0)  # as if that time had passed
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("it waited")
        step(self, *inputs)

    monkeypatch.setattr(trainer.Trainer, "_train_step", interrupted)
    assert main(["train", *arguments(tiny_pipeline, tmp_path, "mode")]) == 130
    assert steps_kept(tmp_path) == [4]
    errors = capfd.readouterr().err
    assert "stopped at once" in errors and "saved" not in errors


def test_kill_9_in_the_middle_changes_nothing(tiny_pipeline, tmp_path):
    long = {"epochs": 24, "decay_end_epoch": 24, "checkpoint_every": 10, "log_every": 3}
    killed = tmp_path / "killed"
    line = ["train", *arguments(tiny_pipeline, killed, "mode", **long)]
    command = processes.start(line, tmp_path / "errors", watch=processes.Watch(killed, rest_at="/step-"))
    while command.processes[0].is_alive() and not list(killed.glob("state-*/step-*")):
        time.sleep(0.002)
    command.kill()
    assert command.wait() == -signal.SIGKILL, command.errors.read_text()
    assert max(steps_kept(killed)) < 24 * STEPS_PER_EPOCH
    run(tiny_pipeline, killed, **long)
    assert_same(killed, run(tiny_pipeline, tmp_path / "undisturbed", **long))


@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_the_readers_to_the_main_process(tiny_pipeline, tmp_path):
    """Ctrl-C and schedulers signal every process: the reading ones must not die before the checkpoint is saved."""
    long = {"epochs": 400, "decay_end_epoch": 400, "checkpoint_every": 5, "workers": 1, "latents": {"cache": "off"}}
    process = subprocess.Popen(
        [sys.executable, "-m", "mmfm.cli", "train", *arguments(tiny_pipeline, tmp_path, "uncond", **long)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and not list(tmp_path.glob("state-*/step-*")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130, errors
    assert "run the same command to resume" in errors and "DataLoader worker" not in errors
    deadline = time.monotonic() + 30
    while True:  # readers notice within seconds that the main process is gone
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "a process of the stage outlived it"
        time.sleep(0.1)


def test_a_run_resumed_behind_a_damaged_checkpoint_is_the_same(tiny_pipeline, undisturbed, tmp_path, caplog):
    run(tiny_pipeline, tmp_path, epochs=2)
    file = state_of(tmp_path) / "step-00000010" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert_same(run(tiny_pipeline, tmp_path), undisturbed)
    assert "skipping checkpoint" in caplog.text and "step-00000010" in caplog.text


def test_more_epochs_continue_and_fewer_take_what_was_kept(tiny_pipeline, undisturbed, tmp_path):
    run(tiny_pipeline, tmp_path, epochs=1)
    one_epoch = weights(tmp_path)
    run(tiny_pipeline, tmp_path)
    assert_equal(weights(tmp_path), weights(undisturbed))
    assert steps_kept(tmp_path) == [5, 8, 12, 15]
    with pytest.raises(ValueError, match=r"step 10 was not kept \(there are: 5, 8, 12, 15\)"):
        run(tiny_pipeline, tmp_path, epochs=2)
    run(tiny_pipeline, tmp_path, epochs=1)
    assert_equal(weights(tmp_path), one_epoch)
    assert history(tmp_path, "step") == [(2,), (4,), (5,)]


def test_a_finished_run_only_publishes(tiny_pipeline, undisturbed, tmp_path, monkeypatch):
    shutil.copytree(state_of(undisturbed), tmp_path / state_of(undisturbed).name)
    monkeypatch.setattr(trainer.Trainer, "run", lambda *_: pytest.fail("trained again"))
    run(tiny_pipeline, tmp_path)
    assert_same(tmp_path, undisturbed)
    assert (tmp_path / "preview.png").read_bytes() == (undisturbed / "preview.png").read_bytes()


def test_a_finished_run_whose_outputs_are_in_place_does_nothing(tiny_pipeline, tmp_path, monkeypatch):
    run(tiny_pipeline, tmp_path)
    paths = sorted(tmp_path.glob("*.*"))
    for path in paths:
        os.utime(path, (0, 0))
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in paths}
    with monkeypatch.context() as patch:
        patch.setattr("mmfm.stages.train.configured_encoder", lambda *_: pytest.fail("something is loaded"))
        run(tiny_pipeline, tmp_path)
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in paths} == before
    assert all(path.stat().st_mtime > 0 for path in paths)  # newer than the inputs, as Snakemake wants it


@pytest.mark.parametrize("name", ["ema.safetensors", "history.jsonl", "preview.png"])
def test_an_output_that_was_lost_or_changed_is_made_again(tiny_pipeline, tmp_path, name):
    run(tiny_pipeline, tmp_path, epochs=1)
    good = (tmp_path / name).read_bytes()
    for damage in (Path.unlink, lambda path: path.write_bytes(good[:-1])):
        damage(tmp_path / name)
        run(tiny_pipeline, tmp_path, epochs=1)
        assert (tmp_path / name).read_bytes() == good


def test_other_settings_do_not_meet_the_state(tiny_pipeline, undisturbed, tmp_path):
    shutil.copytree(state_of(undisturbed), tmp_path / state_of(undisturbed).name)
    run(tiny_pipeline, tmp_path, lr=5e-4)
    run(tiny_pipeline, tmp_path, "gmm", log_every=15)
    assert len(list(tmp_path.glob("state-*"))) == 3


def test_the_state_is_nobody_elses_until_the_picture_is_published(tiny_pipeline, tmp_path, monkeypatch):
    """A second run in between would put its weights beside the picture of these."""
    held, draw = [], previews.image_grid

    def watched(*arguments, **keys):
        held.append(state_of(tmp_path) in stage_state._locks)
        return draw(*arguments, **keys)

    monkeypatch.setattr(previews, "image_grid", watched)
    run(tiny_pipeline, tmp_path, epochs=1)
    assert held == [True] and state_of(tmp_path) not in stage_state._locks


def test_an_unreadable_manifest_costs_a_publication(tiny_pipeline, tmp_path):
    run(tiny_pipeline, tmp_path, epochs=1)
    good = (tmp_path / "ema.safetensors").read_bytes()
    manifest = state_of(tmp_path) / "finished" / "manifest.json"
    for damage in (Path.unlink, lambda path: path.write_text("")):
        damage(manifest)
        run(tiny_pipeline, tmp_path, epochs=1)
        assert (tmp_path / "ema.safetensors").read_bytes() == good and manifest.stat().st_size


def test_what_a_kill_left_of_earlier_outputs_goes(tiny_pipeline, tmp_path):
    """At full size these are gigabytes of weights."""
    run(tiny_pipeline, tmp_path, epochs=1)
    left = state_of(tmp_path) / ".finished.old"
    shutil.copytree(left.with_name("finished"), left)
    run(tiny_pipeline, tmp_path, epochs=1)
    assert not left.exists() and steps_kept(tmp_path)
