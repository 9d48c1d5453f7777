"""Runs that can't go on or can't begin: NaN, too little memory, inputs that do not fit. Each says what to change."""

import dataclasses
import shutil

import pytest
import torch

from mmfm.autoencoder.encoders import Encoder
from mmfm.cli import train as command
from mmfm.infra import store
from mmfm.training import checkpoint, trainer
from mmfm.training.latents import BatchPlan
from mmfm.training.nonfinite import explanation
from support.tiny import SECTIONS
from support.train_runs import arguments, assert_equal, assert_same, poison, run, state_of, steps_kept, weights


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


def test_an_image_size_that_the_decoder_does_not_make_is_refused(tiny_pipeline, tmp_path):
    """Else `sample` would find out, after the training."""
    line = arguments(tiny_pipeline, tmp_path, "mode")
    with pytest.raises(ValueError, match=r"makes images of 32 pixels, but image.size is 30; change image.size, or use"):
        command.main([*line, "image.size=30"])
    decoder = line.index("--decoder")
    assert command.main([*line[:decoder], *line[decoder + 2 :], "image.size=30", "train.epochs=1"]) == 0


@pytest.mark.parametrize("steps", [[3], [0, 4], [4, 3]])
def test_a_profile_needs_a_first_and_a_last_step(tiny_pipeline, tmp_path, steps):
    with pytest.raises(ValueError, match=r"'train.profile' is .*; give the first and the last step"):
        run(tiny_pipeline, tmp_path, profile=steps)


def test_a_fill_for_which_memory_does_not_suffice_says_what_to_set(tiny_pipeline, tmp_path, monkeypatch):
    def full(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Encoder, "forward", full)
    with pytest.raises(ValueError, match=r"out of memory .* Set latents\.cache to off"):
        run(tiny_pipeline, tmp_path, latents={"cache": "on", "folder": str(tmp_path / "latents")})


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
