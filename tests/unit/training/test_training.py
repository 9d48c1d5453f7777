"""The training loop: the same numbers whatever is interrupted, divided or cached."""

import contextlib
import dataclasses
import functools
import gzip
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch.utils._python_dispatch import TorchDispatchMode

from mmfm import config
from mmfm.autoencoder.encoders import Encoder, load_encoder
from mmfm.cli import train as command
from mmfm.cli.__main__ import main
from mmfm.data import Listing
from mmfm.flow.path import target_velocity
from mmfm.flow.source import GaussianSource
from mmfm.infra import distributed, rng, stage_state, store
from mmfm.infra.distributed import Ranks
from mmfm.models.weights import load_ema
from mmfm.training import checkpoint, latents, previews, runlog, setup, trainer
from mmfm.training import history as curve
from mmfm.training.ema import Ema
from mmfm.training.latents import BatchPlan, Inputs, MicroBatch
from mmfm.training.nonfinite import NonFiniteCheck, explanation
from mmfm.training.objective import FlowMatching
from mmfm.training.options import LoopOptions, OptimizerOptions, Run
from mmfm.training.schedule import ConstantThenLinear, Cosine
from support.latent_fills import ALONE, open_cache
from support.tiny import MODES, SECTIONS
from support.train_runs import (
    STEPS_PER_EPOCH,
    arguments,
    assert_equal,
    assert_same,
    history,
    poison,
    run,
    state_of,
    steps_kept,
    weights,
)


@pytest.fixture(scope="session")
def undisturbed(tiny_pipeline, tmp_path_factory) -> Path:
    """Three epochs of setting ``mode``, 15 steps."""
    return run(tiny_pipeline, tmp_path_factory.mktemp("undisturbed"))


def test_outputs_of_a_run(undisturbed, tiny_pipeline):
    assert {path.name for path in undisturbed.glob("*.*")} == {
        "ema.safetensors", "history.jsonl", "curve.png", "preview.png",
    }  # fmt: skip
    assert history(undisturbed, "step") == [(s,) for s in (2, 4, 6, 8, 10, 12, 14, 15)]
    model, metadata = load_ema(undisturbed / "ema.safetensors")
    assert model.config.num_classes == MODES and model.config.label_dropout == 0
    assert model.y_embedder.embedding_table.weight.shape[0] == MODES
    assert (metadata["setting"], metadata["step"], metadata["epochs"], metadata["images_seen"]) == ("mode", 15, 3, 120)
    for name in ("listing", "encoder", "stats", "gmm", "spatial_gmm"):
        assert metadata[f"{name}_digest"]
    assert metadata["gmm_digest"] == store.map_arrays(tiny_pipeline.gmm)[1]["digest"]


def test_the_average_has_left_the_start_and_differs_from_the_model(undisturbed):
    last = checkpoint.find(state_of(undisturbed), 15)
    name = "blocks.0.mlp.w12.weight"
    average, model = last.tensors("ema")[name], last.tensors("model")[name]
    assert torch.equal(average, weights(undisturbed)[name])
    assert not torch.equal(average, model)
    # After 15 steps a start at 0 would leave (1 - 0.9^15) = 79 % of the weights' size.
    assert average.norm() / model.norm() == pytest.approx(1, abs=0.02)


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
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""}
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "mmfm.cli", "train", *arguments(tiny_pipeline, killed, "mode", **long)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not list(killed.glob("state-*/step-*")):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
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
        patch.setattr("mmfm.stages.train.load_encoder", lambda *_: pytest.fail("something is loaded"))
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


@pytest.mark.parametrize("setting", ["uncond", "gmm", "mode"])
def test_micro_batches_and_encoding_at_every_step_change_only_the_rounding(tiny_pipeline, tmp_path, setting):
    losses = [loss for _, loss in history(run(tiny_pipeline, tmp_path / "whole", setting), "step", "loss")]
    uncached = {"latents": {"cache": "off"}, "micro_batch": 5}
    for name, keys in {"micro": {"micro_batch": 3}, "uncached": uncached}.items():
        other = [loss for _, loss in history(run(tiny_pipeline, tmp_path / name, setting, **keys), "step", "loss")]
        assert other == pytest.approx(losses, rel=1e-4)


def test_two_processes_take_the_same_steps_as_one(tiny_pipeline, tmp_path):
    keys = {"epochs": 2, "micro_batch": 3}
    launch = [sys.executable, "-m", "mmfm.infra.launch", "--processes", "2", "--threads", "2", "--", "train"]
    finished = subprocess.run(
        [*launch, *arguments(tiny_pipeline, tmp_path / "two", "mode", **keys)], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    run(tiny_pipeline, tmp_path / "one", **keys)
    for column in ("loss", "grad_norm"):
        ours, theirs = (dict(history(tmp_path / name, "step", column)) for name in ("one", "two"))
        assert theirs == pytest.approx(ours, rel=1e-4)
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("log_every", [1, 100])
def test_a_nan_stops_before_it_reaches_the_weights(tiny_pipeline, undisturbed, tmp_path, monkeypatch, how, log_every):
    plan = BatchPlan(seed=0, n_images=40, global_batch=8)
    image = int(plan.images(range(48, 56))[3])
    with monkeypatch.context() as patch:
        poison(patch, image, how)
        with pytest.raises(ValueError, match="in step 7") as caught:
            run(tiny_pipeline, tmp_path, log_every=log_every)
    if how == "loss":
        assert f"in the loss of image {image} of the listing" in str(caught.value)
    else:  # all losses are finite still: the step was not applied
        assert "in the gradient over images" in str(caught.value)
    assert steps_kept(tmp_path) == [4] and checkpoint.find(state_of(tmp_path), 15).step == 4
    run(tiny_pipeline, tmp_path)
    assert_equal(weights(tmp_path), weights(undisturbed))


@pytest.mark.parametrize(("error", "raised"), [(KeyboardInterrupt, KeyboardInterrupt), (MemoryError, ValueError)])
def test_the_board_is_closed_after_a_stop_and_after_an_error(tiny_pipeline, tmp_path, monkeypatch, error, raised):
    closed = []

    def ends(self, *inputs):
        raise error

    monkeypatch.setattr(trainer.Trainer, "_train_step", ends)
    monkeypatch.setattr("mmfm.training.loggers.NoLogger.close", lambda self: closed.append(True))
    with pytest.raises(raised):
        run(tiny_pipeline, tmp_path)
    assert closed == [True]


@pytest.mark.parametrize(
    ("culprits", "words"),
    [
        ([3], "in the loss of image 3 of the listing."),
        ([3, 5], "in the losses of images 3, 5 of the listing."),
        (list(range(10)), "in the losses of images 0, 1, 2, 3, 4, 5, 6, 7 and 2 more of the listing."),
        ([], "and 4 more of the listing."),
    ],
)
def test_what_is_said_of_a_nan(culprits, words):
    text = explanation(BatchPlan(seed=0, n_images=40, global_batch=12), 6, culprits)
    assert text.startswith("NaN or Inf in step 7, in the ") and words in text
    assert bool(culprits) != ("in the gradient over images " in text)


@pytest.mark.parametrize(("lr", "log_every"), [(1e39, 1), (1e39, 100), (1e20, 100)])
def test_weights_that_overflow_are_not_saved_and_no_image_is_blamed(tiny_pipeline, tmp_path, lr, log_every):
    """The loss and gradient of the step that breaks them are finite."""
    keys = {"keep_checkpoints": 1, "checkpoint_every": 1, "log_every": log_every, "schedule": "cosine"}
    step = trainer.Trainer._train_step

    def broken(self, *inputs):
        if self.step == 3:
            self.optimizer_options = dataclasses.replace(self.optimizer_options, lr=lambda step: lr)
        step(self, *inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_train_step", broken)
        with pytest.raises(ValueError, match=r"weights are NaN, Inf or too large by step .* lower the learning rate"):
            run(tiny_pipeline, tmp_path, **keys)
    kept = checkpoint.find(state_of(tmp_path), 15)
    assert all(tensor.isfinite().all() for part in ("model", "ema") for tensor in kept.tensors(part).values())


def test_weights_that_the_last_step_breaks_are_not_published(tiny_pipeline, tmp_path, monkeypatch):
    step = trainer.Trainer._train_step

    def broken(self, *inputs):
        step(self, *inputs)
        if self.step == 15:
            self.division.averages[0].view(-1)[0] = float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_train_step", broken)
        with pytest.raises(ValueError, match="weights are NaN, Inf or too large by step 15"):
            run(tiny_pipeline, tmp_path)
    assert not (tmp_path / "ema.safetensors").exists() and steps_kept(tmp_path) == [8, 12]
    with monkeypatch.context() as patch:  # as an earlier version might have saved them
        patch.setattr(trainer.Trainer, "_train_step", broken)
        patch.setattr(trainer.Trainer, "_check_weights", lambda self: None)
        run(tiny_pipeline, tmp_path)
    (tmp_path / "ema.safetensors").unlink()
    shutil.rmtree(state_of(tmp_path) / "finished")
    with pytest.raises(ValueError, match=r"the weights in .*step-00000015' are not finite; remove it"):
        run(tiny_pipeline, tmp_path)


def test_previews_are_drawn_as_training_goes(tiny_pipeline, tmp_path):
    preview = {**SECTIONS["train"]["preview"], "every": 5}
    run(tiny_pipeline, tmp_path, preview=preview)
    names = sorted(path.name for path in state_of(tmp_path).glob("*.png"))
    assert names == ["curve.png", "preview-00000005.png", "preview-00000010.png"]
    assert (tmp_path / "preview.png").stat().st_size > 1000


def test_the_main_process_says_whether_there_is_a_decoder(tiny_pipeline, tmp_path, monkeypatch):
    """It may appear while processes start: previews are collective, so all must draw them or none."""
    found = []

    class Second(Ranks):
        def from_main(self, make):
            return None  # the main process came before the decoder

    monkeypatch.setattr(
        "mmfm.infra.distributed.process_group", lambda: contextlib.nullcontext(Second(1, 2, torch.device("cpu")))
    )
    monkeypatch.setattr("mmfm.stages.train.train", lambda config, files, *_: found.append(files.decoder))
    assert command.main(arguments(tiny_pipeline, tmp_path, "mode")) == 0
    assert found == [None]


def test_an_impossible_batch_is_refused(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="global_batch is 41, but there are only 40 images"):
        run(tiny_pipeline, tmp_path, global_batch=41)
    with pytest.raises(ValueError, match=r"nearest that they can: 126 or 129 .* or start 2 processes"):
        BatchPlan(seed=0, n_images=1000, global_batch=128, rank=0, world=3)
    with pytest.raises(ValueError, match=r"nearest that they can: 30 \(other numbers\), or start 3 processes"):
        BatchPlan(seed=0, n_images=39, global_batch=39, rank=0, world=10)


def test_inputs_that_do_not_belong_together_are_refused(tiny_pipeline, tmp_path):
    given = arguments(tiny_pipeline, tmp_path / "out", "mode")
    without = [
        part for pair in zip(given[::2], given[1::2], strict=True) if pair[0] != "--spatial-gmm" for part in pair
    ]
    with pytest.raises(ValueError, match="give --spatial-gmm"):
        command.main(without)
    arrays, metadata = store.map_arrays(tiny_pipeline.gmm)
    for change, message in (
        ({"listing_digest": "0" * 64}, r"gmm.safetensors was made from another listing .* run .*fit_gmm"),
        ({"weights": arrays["weights"] * [0.5, 1.5, 1, 1]}, r"spatial_gmm.zarr was made from another mixture than"),
    ):
        other = {name: change.pop(name, array) for name, array in arrays.items()}
        store.write_arrays(tmp_path / "gmm.safetensors", other, {**metadata, **change})
        changed = [str(tmp_path / "gmm.safetensors") if part == str(tiny_pipeline.gmm) else part for part in given]
        with pytest.raises(ValueError, match=message):
            command.main(changed)
    shutil.copy(tiny_pipeline.stats, tmp_path / "stats.pt")
    about = store.read_json(tiny_pipeline.stats.with_suffix(".json"))
    store.write_json(tmp_path / "stats.json", {**about, "encoder_digest": "0" * 64})
    changed = [str(tmp_path / "stats.pt") if part == str(tiny_pipeline.stats) else part for part in given]
    with pytest.raises(ValueError, match=r"stats.pt was made from another encoder than"):
        command.main(changed)


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 0), (4, 0), (2, 3), (8, 1)])
def test_every_place_is_taken_once_whatever_the_processes(world, micro_batch):
    alone = BatchPlan(seed=3, n_images=43, global_batch=8)
    shares = [BatchPlan(3, 43, 8, rank, world, micro_batch) for rank in range(world)]
    for step in (0, 4, 5, 11):
        parts = [part for plan in shares for part in plan.micro_batches(step)]
        assert [key for part in parts for key in part.keys] == list(range(8 * step, 8 * step + 8))
        assert torch.equal(torch.cat([part.indices for part in parts]), alone.images(range(8 * step, 8 * step + 8)))
        assert all(len(p.micro_batches(step)) == p.micro_batches_per_step for p in shares)


def test_an_epoch_visits_no_image_twice_and_the_next_in_another_order():
    plan = BatchPlan(seed=0, n_images=43, global_batch=8, flip=True)
    assert plan.steps_per_epoch == 5
    first, second = ([i for s in range(5 * e, 5 * e + 5) for i in plan.images(range(8 * s, 8 * s + 8)).tolist()]
                     for e in (0, 1))  # fmt: skip
    assert len(set(first)) == len(set(second)) == 40 and first != second
    assert plan.flips(torch.arange(4000)).float().mean().item() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("shape", [(3, 2, 2), (32, 4, 4)])
def test_the_loss_is_a_mean_over_the_latents_elements(shape):
    """So that one learning rate and one clipping norm fit latents of every size."""
    train = config.build(config.Train, SECTIONS["train"], "train")
    task = FlowMatching("uncond", GaussianSource(), None, train, 1.0)
    micro = MicroBatch(range(8, 11), torch.arange(3))
    noise = rng.normal(0, "train/noise", torch.arange(8, 11), shape)
    data = torch.arange(3.0).view(3, 1, 1, 1).expand(3, *shape)
    error = torch.tensor([0.0, 1.0, -2.0]).view(3, 1, 1, 1).repeat(1, *shape)
    error[:, :, : shape[1] // 2] = 0
    loss = task.losses(lambda *_: target_velocity(data, noise) + error, micro, Inputs(data, torch.zeros(3, shape[0])))
    assert loss.tolist() == pytest.approx([0.0, 0.5, 2.0], abs=1e-5)


def test_learning_rates():
    lr = ConstantThenLinear(lr=2e-4, final_lr=2e-5, constant_steps=40, end_step=800)
    assert [lr(s) for s in (0, 40)] == [2e-4, 2e-4]
    assert lr(420) == pytest.approx((2e-4 + 2e-5) / 2)
    assert [lr(s) for s in (800, 10_000)] == pytest.approx([2e-5, 2e-5])
    cosine = Cosine(lr=1e-3, final_lr=0.0, constant_steps=0, end_step=100)
    assert [cosine(s) for s in (0, 50, 100, 200)] == pytest.approx([1e-3, 5e-4, 0, 0])
    cosine = Cosine(lr=1e-3, final_lr=1e-4, constant_steps=20, end_step=100)
    assert [cosine(s) for s in (0, 20, 60, 100, 200)] == pytest.approx([1e-3, 1e-3, 5.5e-4, 1e-4, 1e-4])


def test_the_schedule_is_a_setting(tiny_pipeline, tmp_path):
    run(tiny_pipeline, tmp_path, "uncond", schedule="cosine", log_every=1)
    rates = [lr for (lr,) in history(tmp_path, "lr")]
    expected = Cosine(1e-3, 1e-4, STEPS_PER_EPOCH, 3 * STEPS_PER_EPOCH)
    assert rates == [expected(step) for step in range(3 * STEPS_PER_EPOCH)]


def test_milestones_stay_so_that_a_lowered_budget_finds_them(tiny_pipeline, tmp_path):
    run(tiny_pipeline, tmp_path, "uncond", milestones=[1, 2], keep_checkpoints=1, checkpoint_every=4)
    assert steps_kept(tmp_path) == [5, 10, 12, 15]
    run(tiny_pipeline, tmp_path, "uncond", epochs=2)
    assert history(tmp_path, "step")[-1] == (10,)


def test_milestones_that_are_not_reached_are_named(tiny_pipeline, tmp_path, caplog):
    run(tiny_pipeline, tmp_path, "uncond", epochs=1, milestones=[1, 2, 99])
    assert "the milestones at steps [10, 495] are not reached: training ends at step 5" in caplog.text


def test_an_image_size_that_the_decoder_does_not_make_is_refused(tiny_pipeline, tmp_path):
    """Else `sample` would find out, after the training."""
    line = arguments(tiny_pipeline, tmp_path, "mode")
    with pytest.raises(ValueError, match=r"makes images of 32 pixels, but image.size is 30; change image.size, or use"):
        command.main([*line, "image.size=30"])
    decoder = line.index("--decoder")
    assert command.main([*line[:decoder], *line[decoder + 2 :], "image.size=30", "train.epochs=1"]) == 0


class _Operations(TorchDispatchMode):
    """Collects the names of the operations that wait for a device."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        name = str(operation)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")):
            self.waits.append(name)
        return operation(*arguments, **(keywords or {}))


def test_nothing_in_a_step_waits_for_the_device(tiny_pipeline, tmp_path, monkeypatch):
    step, seen = trainer.Trainer._train_step, []

    def watched(self, *inputs):
        with _Operations() as operations:
            step(self, *inputs)
            seen.append(list(operations.waits))
            self.norm.item()
        assert len(operations.waits) == len(seen[-1]) + 1, "the watch sees no waits at all"

    monkeypatch.setattr(trainer.Trainer, "_train_step", watched)
    run(tiny_pipeline, tmp_path, "mode", micro_batch=4, epochs=1)
    assert seen == [[]] * STEPS_PER_EPOCH


def test_a_fill_for_which_memory_does_not_suffice_says_what_to_set(tiny_pipeline, tmp_path, monkeypatch):
    def full(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Encoder, "forward", full)
    with pytest.raises(ValueError, match=r"out of memory .* Set latents\.cache to off"):
        run(tiny_pipeline, tmp_path, latents={"cache": "on", "folder": str(tmp_path / "latents")})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_on_a_gpu_never_waits(tiny_pipeline, tmp_path, monkeypatch, compiled):
    step = trainer.Trainer._train_step

    def watched(self, *inputs):
        torch.cuda.set_sync_debug_mode("error" if self.step else "default")  # the first step may compile and allocate
        step(self, *inputs)
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer.Trainer, "_train_step", watched)
    run(tiny_pipeline, tmp_path, "mode", micro_batch=4, compile=compiled)
    assert (tmp_path / "ema.safetensors").exists()


def test_some_steps_are_profiled(tiny_pipeline, undisturbed, tmp_path, capsys):
    run(tiny_pipeline, tmp_path, profile=[3, 4])
    profile = state_of(tmp_path) / "profile"
    assert "aten::addmm" in (profile / "table-0.txt").read_text()
    with gzip.open(profile / "trace-0.json.gz") as trace:
        assert json.load(trace)["traceEvents"]
    assert f"profile of steps 3 to 4: '{profile}'" in capsys.readouterr().err
    assert_same(tmp_path, undisturbed)


@pytest.mark.parametrize("steps", [[3], [0, 4], [4, 3]])
def test_a_profile_needs_a_first_and_a_last_step(tiny_pipeline, tmp_path, steps):
    with pytest.raises(ValueError, match=r"'train.profile' is .*; give the first and the last step"):
        run(tiny_pipeline, tmp_path, profile=steps)


def test_the_history_says_how_long_steps_wait_for_data(tiny_pipeline, tmp_path, monkeypatch):
    images, batches = latents.TrainingBatches.batches, []

    def slow(self, *steps):
        for batch in images(self, *steps):
            time.sleep(0.02)
            batches.append(batch)
            yield batch

    monkeypatch.setattr(latents.TrainingBatches, "batches", slow)
    run(tiny_pipeline, tmp_path, epochs=1)
    assert batches and all(0 < share <= 1 for (share,) in history(tmp_path, "data_wait"))


def test_checkpointed_activations_change_only_the_rounding(tiny_pipeline, undisturbed, tmp_path):
    run(tiny_pipeline, tmp_path, checkpoint_activations=True)
    assert [v for (v,) in history(tmp_path, "loss")] == pytest.approx([v for (v,) in history(undisturbed, "loss")])


def test_an_image_is_encoded_once_a_view_with_a_cache_and_once_a_step_without(tiny_pipeline, tmp_path, monkeypatch):
    forward, seen = Encoder.forward, []
    monkeypatch.setattr(Encoder, "forward", lambda self, images: (seen.append(len(images)), forward(self, images))[1])
    cache = {"cache": "on", "folder": str(tmp_path / "latents")}
    run(tiny_pipeline, tmp_path / "cached", "mode", epochs=4, latents=cache)
    assert sum(seen) == 2 * 40
    seen.clear()
    run(tiny_pipeline, tmp_path / "other", "uncond", epochs=1, latents=cache)
    assert sum(seen) == 0, "the cache is shared"
    run(tiny_pipeline, tmp_path / "uncached", "mode", epochs=1, latents={"cache": "off"})
    assert sum(seen) == STEPS_PER_EPOCH * 8


@pytest.mark.parametrize(
    ("where", "remedy"),
    [
        ("mmfm.training.setup.source_for", "set train.means_device to host"),
        ("mmfm.training.trainer.Ema", "train.sharding to fsdp"),
        ("mmfm.training.previews.image_grid", "Lower train.preview.n_images"),
    ],
)
def test_out_of_memory_outside_the_steps_says_what_to_change(tiny_pipeline, tmp_path, monkeypatch, where, remedy):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(where, full)
    with pytest.raises(ValueError, match=f"out of memory .*{remedy}"):
        run(tiny_pipeline, tmp_path, "mode", preview={**SECTIONS["train"]["preview"], "every": 3})


def test_a_finished_run_is_published_without_a_picture_that_does_not_fit(
    tiny_pipeline, undisturbed, tmp_path, monkeypatch, caplog
):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mmfm.training.previews.image_grid", full)
    (tmp_path / "preview.png").write_text("of other weights")
    run(tiny_pipeline, tmp_path)
    assert_same(tmp_path, undisturbed)
    assert not (tmp_path / "preview.png").exists()
    assert "without preview.png: out of memory" in caplog.text and "Lower train.preview.n_images" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate\nmore"),
        MemoryError("Unable to allocate 8. EiB for an array"),  # NumPy's
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_says_what_to_lower(tiny_pipeline, undisturbed, tmp_path, monkeypatch, error):
    step = trainer.Trainer._train_step

    def full(self, *inputs):
        if self.step == 6:
            raise error
        step(self, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_train_step", full)
        with pytest.raises(ValueError, match=r"out of memory .*Lower train.micro_batch.*checkpoint_activations"):
            run(tiny_pipeline, tmp_path)
    assert_same(run(tiny_pipeline, tmp_path, micro_batch=0), undisturbed)


def test_a_compiled_run_moves_the_average_and_keeps_the_losses(tiny_pipeline, undisturbed, tmp_path, monkeypatch):
    # Traced as for the usual backend, but without its minutes in a C++ compiler.
    monkeypatch.setattr(
        torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    )
    run(tiny_pipeline, tmp_path, compile=True)
    assert [v for (v,) in history(tmp_path, "loss")] == pytest.approx(
        [v for (v,) in history(undisturbed, "loss")], 1e-3
    )
    for name, tensor in weights(undisturbed).items():
        torch.testing.assert_close(weights(tmp_path)[name], tensor, atol=1e-3, rtol=1e-2)


def test_the_average_follows_a_compiled_model():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    start = model.weight.detach().clone()
    ema = Ema(model)
    ema.follow([ema.module.weight], [model.weight])
    model.compile(backend="eager")
    optimizer = torch.optim.SGD([model.weight], lr=1.0)
    expected = start
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        ema.update(0.9)
        expected = 0.9 * expected + 0.1 * model.weight.detach()
    torch.testing.assert_close(ema.module.weight, expected)
    assert not torch.equal(ema.module.weight, start) and torch.equal(ema.module.bias, model.bias)


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


class Points:
    """Batches of rows of a table."""

    def __init__(self, plan: BatchPlan, table: torch.Tensor) -> None:
        self.plan, self.table = plan, table

    def batches(self, first_step, stop_step):
        for step in range(first_step, stop_step):
            for micro in self.plan.micro_batches(step):
                yield micro, self.table[micro.indices]


def a_trainer(state: Path, micro_batch: int = 0, ema_decay: float | None = 0.9, **options) -> tuple:
    """A trainer of a linear map to (x, y) -> x + 2 y, in 8 of 20 places a step, and its batches."""
    table = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(0.5)
    plan = BatchPlan(seed=1, n_images=20, global_batch=8, micro_batch=micro_batch)
    state.mkdir(exist_ok=True)
    given = {"checkpoint_every": 100, "log_every": 3, "keep_checkpoints": 2, "logger": "none", **options}
    decay = None if ema_decay is None else lambda step: ema_decay
    optimizer = OptimizerOptions(lambda step: 0.1 / (1 + step), (0.9, 0.95), 0.01, 0.5, decay)
    run = Run("test", model, squared_errors, plan, state, Ranks(0, 1, torch.device("cpu")))
    made = trainer.Trainer(run, optimizer, LoopOptions(**given))
    return made, Points(plan, table)


def squared_errors(model, micro, inputs):
    return (model(inputs)[:, 0] - inputs @ torch.tensor([1.0, 2.0])).square()


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_the_loop_is_the_textbooks(tmp_path, micro_batch):
    """Mean loss of the batch, clipped gradient, AdamW with the rate of the step, average; logged as the mean since."""
    made, points = a_trainer(tmp_path / "state", micro_batch)
    made.run(7, points)

    model, plan = a_trainer(tmp_path / "other")[0].model, points.plan
    average = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
    losses, norms, rates = [], [], []
    for step in range(7):
        inputs = points.table[plan.images(range(8 * step, 8 * step + 8))]
        loss = squared_errors(model, None, inputs).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        rates.append(0.1 / (1 + step))
        optimizer.param_groups[0]["lr"] = rates[-1]
        optimizer.step()
        average = [0.9 * a + 0.1 * p.detach() for a, p in zip(average, model.parameters(), strict=True)]
        losses.append(loss.item())
    torch.testing.assert_close(list(made.model.parameters()), list(model.parameters()))
    torch.testing.assert_close([p.data for p in made.average().parameters()], average)
    assert not any(p.requires_grad for p in made.average().parameters()), "nothing is differentiated through it"
    lines = history(tmp_path / "state", "step", "epoch", "loss", "grad_norm", "lr")
    assert [line[:2] for line in lines] == [(3, 1.5), (6, 3.0), (7, 3.5)], "20 images make 2 steps of 8"
    expected = [sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]]
    assert [line[2] for line in lines] == pytest.approx(expected, rel=1e-4)
    assert [line[3] for line in lines] == pytest.approx([norms[2], norms[5], norms[6]], rel=1e-4)
    assert [line[4] for line in lines] == pytest.approx([rates[2], rates[5], rates[6]])


def test_a_run_asks_for_the_room_that_its_checkpoints_take(tmp_path, monkeypatch):
    """Two that stay, one being written and the milestones to come, each of weights, average and two moments."""
    asked = []
    monkeypatch.setattr(trainer.disk, "require", lambda *given: asked.append(given[2:]))
    one, weights = 4 * 3 * 4, 3 * 4  # bytes of two weights and a bias in float32
    for milestones, target, n in (((), 9, 1), ((4, 9), 9, 2), ((4, 12), 9, 2), ((4, 6), 9, 3)):
        a_trainer(tmp_path / "state", milestones=frozenset(milestones))[0].resume(target)
        assert asked.pop() == ((2 + n + 1) * one + weights, 0), milestones
    a_trainer(tmp_path / "state", ema_decay=None)[0].resume(9)
    assert asked.pop() == (4 * 3 * 3 * 4 + weights, 0), "without an average"
    made, points = a_trainer(tmp_path / "state", milestones=frozenset({4}))
    made.run(4, points)
    made, points = a_trainer(tmp_path / "state", milestones=frozenset({4, 6}))
    assert not made.resume(9) and made.step == 4
    assert asked.pop()[0] == (2 + 2 + 1) * one + weights, "the milestone of step 4 is there"
    assert made.resume(4) and not asked


def test_a_run_saves_and_shows_at_its_intervals(tmp_path):
    shown = []
    made, points = a_trainer(
        tmp_path / "state", checkpoint_every=2, keep_checkpoints=9, preview_every=3, milestones=frozenset({5})
    )
    made.preview = lambda average, step: shown.append(step)
    made.run(9, points)
    assert shown == [3, 6], "the last one is the stage's"
    found = {step: checkpoint._is_milestone(path) for step, path in checkpoint._candidates(tmp_path / "state")}
    assert found == {2: False, 4: False, 5: True, 6: False, 8: False, 9: True}


def test_the_clock_counts_training_alone(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: now[0])
    clock = runlog.Clock(step=10, seconds=50.0)
    now[0] += 8
    assert clock.seconds == 58 and clock.steps_per_second(14) == 0.5
    now[0] += 2
    with clock.stopped():
        now[0] += 1000
    now[0] += 2
    assert clock.seconds == 62 and clock.steps_per_second(16) == 0.5


def test_the_first_step_that_is_not_finite_is_named():
    for bad_loss, bad_norm in ((float("nan"), 1.0), (1.0, float("inf"))):
        check = NonFiniteCheck("cpu")
        check.start(7)
        for _ in range(3):
            check.note(torch.tensor(1.0), torch.tensor(2.0))
        assert check.first_broken() is None and check.broken.item() == 0
        check.note(torch.tensor(bad_loss), torch.tensor(bad_norm))
        check.note(torch.tensor(1.0), torch.tensor(2.0))
        assert check.first_broken() == 10 and check.broken.item() == 1, "steps 7, 8 and 9 were good"


def test_the_schedules_fall_at_every_step_between_their_ends():
    for make in (ConstantThenLinear, Cosine):
        lr = make(lr=1.0, final_lr=0.1, constant_steps=3, end_step=11)
        rates = [lr(step) for step in range(15)]
        assert rates[:4] == [1.0] * 4 and rates[11:] == pytest.approx([0.1] * 4)
        assert rates[3:12] == sorted(set(rates[3:12]), reverse=True)
        for i in range(9):  # symmetric about the middle
            assert rates[3 + i] + rates[11 - i] == pytest.approx(1.1)
    assert Cosine(1.0, 0.0, 0, 8)(2) == pytest.approx(math.cos(math.pi / 8) ** 2)


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_latents_from_the_cache_are_those_of_the_images_of_a_step(tiny_pipeline, tmp_path, flip, wanted):
    """To the last bit, and the images are those of the latents, flipped where they are."""
    plan = BatchPlan(seed=0, n_images=tiny_pipeline.n_images, global_batch=8, micro_batch=3, flip=flip)
    encoder, device = load_encoder("dinov2", tiny_pipeline.encoder, 32), torch.device("cpu")
    cache = open_cache(tmp_path)
    cache.fill(tiny_pipeline.listing, encoder, ALONE, stage="train", views=plan.views)
    reader = cache.reader(Listing.open(tiny_pipeline.listing), plan.views)
    sources = [latents.TrainingImages(tiny_pipeline.listing, 32, encoder, read, 0, wanted) for read in (None, reader)]
    found = [list(latents.TrainingBatches(plan, source, device).batches(2, 6)) for source in sources]
    assert len(found[0]) == 4 * 3
    for (micro, fresh), (same, cached) in zip(*found, strict=True):
        assert micro.keys == same.keys and torch.equal(micro.indices, same.indices)
        assert torch.equal(fresh.latent, cached.latent) and torch.equal(fresh.token, cached.token)
        assert (cached.images is None) != wanted
        assert not wanted or torch.equal(fresh.images, cached.images)
        assert torch.equal(encoder(fresh.images).latent, fresh.latent)


def test_the_class_of_every_image_is_one_of_the_listing():
    def listing(labels, classes=("a", "b", "c")):
        return types.SimpleNamespace(labels=np.array(labels, np.int32), classes=classes, root="images")

    labels, count = setup.image_classes(listing([2, 0, 1]))
    assert labels.tolist() == [2, 0, 1] and labels.dtype == torch.int64 and count == 3
    assert setup.image_classes(listing([0, 1], ("a", "b")))[1] == 2
    for wrong, message in (([0, 3, -1], "image 1 .* label 3"), ([0, 1, -1], "image 2 .* label -1")):
        with pytest.raises(ValueError, match=message + ".*labels 0 to 2"):
            setup.image_classes(listing(wrong))
    with pytest.raises(ValueError, match="one class"):
        setup.image_classes(listing([0, 0], ("a",)))


@pytest.fixture
def axis():
    return Figure().add_subplot()


def lines_of(losses) -> list[dict]:
    return [{"step": 10 * i, "loss": loss, "lr": 0.1} for i, loss in enumerate(losses, 1)]


def test_few_losses_are_drawn_as_they_are_and_many_with_a_running_mean(axis):
    curve._draw_loss(axis, lines_of([3.0, 2.0, 1.5]))
    (line,) = axis.lines
    assert line.get_xydata().tolist() == [[10, 3], [20, 2], [30, 1.5]] and line.get_marker() == "."
    assert axis.get_yscale() == "linear"
    losses = np.random.default_rng(0).uniform(1, 2, 103)
    axis.clear()
    curve._draw_loss(axis, lines_of(losses))
    raw, mean = (line.get_ydata() for line in axis.lines)
    assert np.array_equal(raw, losses)
    window = int(axis.lines[1].get_label().rsplit(" ", 1)[1])
    expected = [losses[max(0, i - window + 1) : i + 1].mean() for i in range(103)]
    assert 1 < window < 10 and np.allclose(mean, expected)


def test_a_loss_over_orders_of_magnitude_is_drawn_on_a_logarithm(axis):
    for losses, scale in (([100.0, 1.0], "log"), ([3.0, 2.0], "linear"), ([100.0, 0.0], "linear"), ([], "linear")):
        axis.clear()
        curve._draw_loss(axis, lines_of(losses))
        assert axis.get_yscale() == scale, losses


def test_only_distances_that_compare_are_joined(axis):
    about = {"measure": "FID", "n_images": 5000, "time_points": 25, "detector_digest": "d", "reference_digest": "r"}

    def draw(*distances):
        axis.clear()
        curve._draw_distances(axis, [{**about, "step": s, "distance": d, **other} for s, d, other in distances])
        return [line.get_xydata().tolist() for line in axis.lines]

    found = draw((5, 8.0, {}), (5, 4.0, {"n_images": 100}), (10, 6.0, {}))
    assert found == [[[5, 8], [10, 6]], [[5, 4]]]
    assert [line.get_label().split(",")[0] for line in axis.lines] == ["5", "100 images"]
    assert "last 6" in axis.lines[0].get_label() and axis.get_ylabel() == "FID"
    low, high = axis.get_ylim()
    assert axis.get_yscale() == "linear" and low == 0 and 8 < high < 12
    assert len(draw((5, 8.0, {}), (10, 6.0, {"reference_digest": "s"}))) == 2
    draw((5, 80.0, {}), (10, 6.0, {}))
    assert axis.get_yscale() == "log"
    draw((5, 0.0, {}))
    assert axis.get_ylim()[1] > 0


@pytest.mark.parametrize("measured", [False, True])
def test_the_curve_has_a_part_for_each_of_its_quantities(tmp_path, monkeypatch, measured):
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    about = {"measure": "FID", "n_images": 9, "time_points": 5, "detector_digest": "d", "reference_digest": "r"}
    distances = [{**about, "step": 20, "distance": 3.0}] if measured else []
    curve.draw_curve(lines_of([3.0, 2.0]), tmp_path / "curve.png", "a run", distances)
    axes = figures[0].axes
    assert [axis.get_ylabel() for axis in axes] == ["loss", *["FID"] * measured, "learning rate"]
    axes[0].set_xlim(0, 77)
    assert axes[-1].get_xlim() == (0, 77), "the parts share their steps"
    assert axes[0].get_title() == "a run" and axes[-1].get_xlabel() == "step"
    assert axes[-1].lines[0].get_xydata().tolist() == [[10, 0.1], [20, 0.1]] and axes[-1].get_ylim()[0] == 0
    tall = [axis.get_window_extent().height for axis in axes]
    assert tall == sorted(tall, reverse=True) and (tmp_path / "curve.png").stat().st_size > 1000
    monkeypatch.undo()
    plt.close(figures[0])


def test_records_are_read_up_to_a_step_and_up_to_where_a_kill_cut_them(tmp_path):
    path = tmp_path / "history.jsonl"
    for step in (2, 6, 4):
        curve.append_line(path, {"step": step, "loss": 1.0})
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')
    assert [line["step"] for line in curve.read_history(path)] == [2, 6, 4]
    assert [line["step"] for line in curve._until(path, 4)] == [2, 4]
    curve.keep_until(path, 4)
    assert [line["step"] for line in curve.read_history(path)] == [2, 4] and path.read_text().endswith("}\n")
    assert curve.read_history(tmp_path / "none") == []
