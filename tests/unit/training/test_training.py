"""Runs of the training stage: what they make, and that division, caching and speed-ups change only the rounding."""

import contextlib
import functools
import gzip
import json
import subprocess
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmfm.autoencoder.encoders import Encoder
from mmfm.cli import train as command
from mmfm.infra import store
from mmfm.infra.distributed import Ranks
from mmfm.models.weights import load_ema
from mmfm.training import checkpoint, latents, trainer
from mmfm.training.schedule import Cosine
from support.tiny import MODES, SECTIONS
from support.train_runs import STEPS_PER_EPOCH, arguments, assert_same, history, run, state_of, steps_kept, weights


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
