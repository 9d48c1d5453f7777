"""Distances during training: they change nothing, none is missing or twice, and no wrong number is written."""

import copy
import os
import shutil
import signal
import time
import types
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmfm import config
from mmfm.autoencoder import rae
from mmfm.autoencoder.decoder import load_decoder
from mmfm.autoencoder.encoders import load_encoder
from mmfm.cli.__main__ import main
from mmfm.data.moments import CovarianceMoments
from mmfm.evaluation.detector import Detector, load_detector
from mmfm.evaluation.frechet import frechet_distance
from mmfm.evaluation.reference import Reference
from mmfm.flow.path import time_grid, time_shift
from mmfm.flow.solver import euler
from mmfm.flow.source import source_for
from mmfm.generation.generator import Generator
from mmfm.infra import rng, stage_state, store
from mmfm.infra.distributed import Ranks
from mmfm.models.weights import load_ema
from mmfm.stages.provenance import reference_for
from mmfm.training import checkpoint
from mmfm.training.fid_curve import FidCurve
from mmfm.training.history import read_history
from mmfm.training.latents import BatchPlan
from mmfm.training.parallel import Whole
from mmfm.training.trainer import Trainer
from support import processes
from support.fid_curves import SHAPE, N, distances, measured, preview, reference, scalars, with_distances  # noqa: F401 (fixtures)
from support.places import DETECTOR
from support.train_runs import (
    STEPS_PER_EPOCH,
    arguments,
    assert_equal,
    assert_same,
    poison,
    run,
    state_of,
    steps_kept,
    weights,
)


@pytest.fixture(scope="module")
def undisturbed(tiny_pipeline, reference, tmp_path_factory) -> Path:
    """Three epochs, measured at steps 4, 8, 12 and 15."""
    out = tmp_path_factory.mktemp("measured")
    return run(with_distances(tiny_pipeline, reference), out, preview=preview(), logger="tensorboard")


def test_nothing_else_changes(tiny_pipeline, undisturbed, tmp_path):
    run(tiny_pipeline, tmp_path)
    assert_same(tmp_path, undisturbed)
    assert not (tmp_path / "fid.jsonl").exists() and not list(state_of(tmp_path).glob("fid*"))
    with Image.open(tmp_path / "curve.png") as without, Image.open(undisturbed / "curve.png") as with_panel:
        assert with_panel.height > without.height
    kept = [checkpoint.find(state_of(out), 15) for out in (tmp_path, undisturbed)]
    for part in ("model", "ema"):
        assert_equal(*(found.tensors(part) for found in kept))


def test_the_distance_is_that_of_the_average_at_the_step(undisturbed, tiny_pipeline, reference):
    assert [step for step, _ in distances(undisturbed)] == [4, 8, 12, 15]
    model, _ = load_ema(undisturbed / "ema.safetensors")
    source, numbers = source_for("mode", tiny_pipeline.spatial_gmm, "cpu"), torch.arange(N)
    modes = source.draw_modes(rng.uniform(0, "fid_curve/mode", numbers))
    x = source.draw(modes, rng.normal(0, "fid_curve/noise", numbers, SHAPE))
    latents = euler(lambda x, t: model(x, t, modes), x, time_grid(3, time_shift(SHAPE)))
    encoder = load_encoder("dinov2", tiny_pipeline.encoder, 32)
    decode = rae.RAE(encoder, load_decoder(tiny_pipeline.decoder), *rae.load_statistics(tiny_pipeline.stats)).decode
    detector, real = load_detector("fashion", DETECTOR), Reference.open(reference)
    with torch.no_grad():
        moments = CovarianceMoments.zeros(64).update(detector.features(rae.to_uint8(decode(latents))))
    expected = frechet_distance(moments.mean, moments.covariance(), real.mu, real.sigma)
    line = read_history(undisturbed / "fid.jsonl")[-1]
    assert line["distance"] == pytest.approx(expected, rel=1e-4)
    assert (line["measure"], line["n_images"], line["time_points"]) == ("Frechet distance", N, 3)
    assert 0 < line["seconds"] < 60
    assert (line["detector_digest"], line["reference_digest"]) == (detector.digest, real.about["digest"])


def test_the_board_shows_them(undisturbed):
    found = scalars(state_of(undisturbed) / "tensorboard")["preview/fid"]
    assert found == [(step, pytest.approx(value)) for step, value in distances(undisturbed)]


def test_no_step_is_missing_or_twice_after_kill_9(measured, tmp_path):
    long = {"epochs": 8, "decay_end_epoch": 8, "checkpoint_every": 7, "preview": preview(fid_every=2)}
    killed = tmp_path / "killed"
    line = ["train", *arguments(measured, killed, "mode", **long)]
    command = processes.start(line, tmp_path / "errors", watch=processes.Watch(killed, rest_at="/step-"))
    # Beyond a checkpoint, so that steps with lines are taken again; it rests before the next one.
    while command.processes[0].is_alive() and not any(
        len(read_history(p)) > 5 for p in killed.glob("state-*/fid.jsonl")
    ):
        time.sleep(0.01)
    command.kill()
    assert command.wait() == -signal.SIGKILL, command.errors.read_text()
    assert max(steps_kept(killed)) < 8 * STEPS_PER_EPOCH
    run(measured, killed, **long)
    run(measured, tmp_path / "whole", **long)
    assert [step for step, _ in distances(killed)] == list(range(2, 41, 2))
    assert distances(killed) == distances(tmp_path / "whole")
    assert_same(killed, tmp_path / "whole")


def test_lines_of_steps_that_are_taken_again_are_dropped(measured, tiny_pipeline, undisturbed, tmp_path):
    run(measured, tmp_path, epochs=2, preview=preview())
    assert [step for step, _ in distances(tmp_path)] == [4, 8, 10]
    shutil.rmtree(state_of(tmp_path) / "step-00000010")  # goes on from 8, without the key
    run(tiny_pipeline, tmp_path)
    assert distances(tmp_path) == distances(undisturbed)[:2]
    assert_equal(weights(tmp_path), weights(undisturbed))


@pytest.mark.parametrize("step", [4, 12, 15], ids=["saved", "another-saved", "last"])
def test_a_measurement_that_was_killed_is_made_when_the_run_goes_on(measured, undisturbed, tmp_path, monkeypatch, step):
    measure = FidCurve.measure

    def killed(self, model, at, *rest):
        if at == step:
            raise SystemExit
        return measure(self, model, at, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(FidCurve, "measure", killed)
        with pytest.raises(SystemExit):
            run(measured, tmp_path, preview=preview())
    assert max(steps_kept(tmp_path)) == step and not (tmp_path / "ema.safetensors").exists()
    stage_state.unlock(state_of(tmp_path))
    run(measured, tmp_path, preview=preview(), logger="tensorboard")
    assert distances(tmp_path) == distances(undisturbed)
    assert_same(tmp_path, undisturbed)
    assert [s for s, _ in scalars(state_of(tmp_path) / "tensorboard")["preview/fid"]] == [4, 8, 12, 15]


@pytest.mark.parametrize(("keys", "step"), [({"checkpoint_every": 5}, 8), ({}, 15)])
def test_a_signal_does_not_wait_for_the_measurement(measured, undisturbed, tmp_path, monkeypatch, keys, step):
    features, seen = Detector.features, []

    def interrupted(self, images):
        seen.append(len(images))
        if len(seen) == {8: 5 + 2, 15: 5 * 3 + 2}[step]:  # the second of five batches
            os.kill(os.getpid(), signal.SIGTERM)
        return features(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Detector, "features", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(measured, tmp_path, preview=preview(), **keys)
    assert len(seen) % 5 == 2 and max(steps_kept(tmp_path)) == step
    run(measured, tmp_path, preview=preview(), **keys)
    assert distances(tmp_path) == distances(undisturbed)
    assert_same(tmp_path, undisturbed)


def test_a_reference_may_come_during_training(tiny_pipeline, reference, undisturbed, tmp_path, monkeypatch, capsys):
    late, measure = tmp_path / "reference.safetensors", FidCurve.measure

    def arrives(self, model, step, *rest):
        if step == 12:
            shutil.copy(reference, late)
        return measure(self, model, step, *rest)

    monkeypatch.setattr(FidCurve, "measure", arrives)
    run(with_distances(tiny_pipeline, late), tmp_path / "out", preview=preview())
    assert distances(tmp_path / "out") == distances(undisturbed)[2:]
    said = capsys.readouterr().err
    assert said.count(f"no reference at '{late}'; run the stage fid_reference. Training goes on") == 1
    assert "step 15: Frechet distance " in said and f"({N} images)" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detector_digest": "0" * 64}, "was made with another detector"),
        ({"listing_digest": "0" * 64}, "was made from the images of another listing"),
        ({"image_size": 64}, "the decoder's images are 32 pixels wide, those of the reference 64"),
        (None, "truncated"),
    ],
)
def test_a_reference_that_does_not_fit_gives_no_number(
    tiny_pipeline, reference, tmp_path, capsys, change, message
):  # fmt: skip
    other = tmp_path / "reference.safetensors"
    if change is None:
        other.write_bytes(reference.read_bytes()[:2000])
    else:
        arrays, about = store.map_arrays(reference)
        store.write_arrays(other, arrays, {**about, **change})
    run(with_distances(tiny_pipeline, other), tmp_path / "out", "uncond", preview=preview())
    said = capsys.readouterr().err
    assert said.count(message) == 1 and "no Frechet distance at step 4" in said
    assert not (tmp_path / "out" / "fid.jsonl").exists()


def test_a_missing_detector_stops_the_stage_before_it_begins(tiny_pipeline, reference, tmp_path, capsys):
    files = with_distances(tiny_pipeline, reference, tmp_path / "absent.safetensors")
    assert main(["train", *arguments(files, tmp_path / "out", "uncond", preview=preview())]) == 2
    assert "no weights of the fashion detector at" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/state-*/step-*"))
    assert main(["train", *arguments(tiny_pipeline, tmp_path / "out", "uncond", preview=preview())]) == 2
    assert "train.preview.fid_every is 4: give --decoder, --detector" in capsys.readouterr().err
    line = arguments(files, tmp_path / "out", "uncond", preview=preview())
    place = line.index("--decoder")
    assert main(["train", *line[:place], *line[place + 2 :]]) == 2
    assert "train.preview.fid_every is 4: give --decoder, --detector" in capsys.readouterr().err
    assert main(["train", *arguments(files, tmp_path / "out", "uncond", epochs=1)]) == 0  # off: nobody asks for it


def test_latents_that_are_not_finite_give_no_number(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Generator, "latents", lambda self, *_: (torch.full((4, *SHAPE), float("nan")), 1))
    run(measured, tmp_path, "uncond", epochs=1, preview=preview())
    assert "no Frechet distance at step 4: the flow ends in NaN or Inf" in capsys.readouterr().err
    assert not (tmp_path / "fid.jsonl").exists()


def test_weights_that_stand_still_behind_a_nan_are_not_measured(measured, tmp_path, monkeypatch):
    """A NaN in step 7, which nothing asks for before step 8 is measured."""
    poison(monkeypatch, int(BatchPlan(seed=0, n_images=40, global_batch=8).images(range(48, 56))[3]), "loss")
    with pytest.raises(ValueError, match="in step 7"):
        run(measured, tmp_path, log_every=100, checkpoint_every=100, preview=preview())
    assert [line["step"] for line in read_history(state_of(tmp_path) / "fid.jsonl")] == [4]


def test_weights_that_stand_still_behind_a_nan_are_not_shown(tiny_pipeline, tmp_path, monkeypatch):
    poison(monkeypatch, int(BatchPlan(seed=0, n_images=40, global_batch=8).images(range(48, 56))[3]), "loss")
    with pytest.raises(ValueError, match="in step 7"):
        run(tiny_pipeline, tmp_path, log_every=100, checkpoint_every=100, preview=preview(every=4, fid_every=0))
    assert [path.name for path in state_of(tmp_path).glob("preview-*")] == ["preview-00000004.png"]


def test_a_distance_that_cannot_be_computed_stops_no_training(measured, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")

    monkeypatch.setattr("mmfm.training.fid_curve.frechet_distance", fails)
    run(measured, tmp_path, "uncond", epochs=1, preview=preview())
    assert "no Frechet distance at step 4: linalg.svd: the algorithm failed" in capsys.readouterr().err


def test_too_little_memory_stops_no_training(measured, tmp_path, monkeypatch, capsys):
    def full(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Detector, "features", full)
    run(measured, tmp_path, "uncond", epochs=1, preview=preview())
    assert "Lower train.preview.fid_batch_size" in capsys.readouterr().err


def test_a_finished_run_is_measured_when_asked_and_trains_nothing(tiny_pipeline, reference, tmp_path, monkeypatch):
    run(tiny_pipeline, tmp_path, epochs=2)
    run(tiny_pipeline, tmp_path)
    before = weights(tmp_path)
    monkeypatch.setattr("mmfm.training.trainer.Trainer._train_step", lambda *_: pytest.fail("trained again"))
    run(with_distances(tiny_pipeline, reference), tmp_path, preview=preview())
    assert [step for step, _ in distances(tmp_path)] == [15]
    assert_equal(before, weights(tmp_path))
    run(with_distances(tiny_pipeline, reference), tmp_path, epochs=2, preview=preview())  # a kept checkpoint
    assert [step for step, _ in distances(tmp_path)] == [10]
    run(tiny_pipeline, tmp_path)
    assert [step for step, _ in distances(tmp_path)] == [10, 15]
    assert_equal(before, weights(tmp_path))


def test_distances_of_other_weights_do_not_stay(measured, tiny_pipeline, tmp_path):
    run(measured, tmp_path, "uncond", epochs=1, preview=preview())
    assert (tmp_path / "fid.jsonl").exists()
    run(tiny_pipeline, tmp_path, "uncond", epochs=1, lr=5e-4)
    assert not (tmp_path / "fid.jsonl").exists()


def test_a_gathered_average_is_gone_when_training_goes_on(measured, tmp_path, monkeypatch):
    """With `fsdp` it is a whole model more on a GPU."""
    gathered, step = [], Trainer._train_step

    def gather(self, everywhere=False):
        gathered.append(weakref.ref(whole := copy.deepcopy(self.average)))
        return whole

    def watched(self, *inputs):
        assert not any(average() for average in gathered)
        step(self, *inputs)

    monkeypatch.setattr(Whole, "whole_average", gather)
    monkeypatch.setattr(Trainer, "_train_step", watched)
    for epochs in (1, 2):
        run(measured, tmp_path, "uncond", epochs=epochs, preview=preview(every=3))
    assert len(gathered) > 6


@pytest.mark.parametrize("setting", ["uncond", "class_gmm"])
def test_every_setting_is_measured(measured, tmp_path, setting):
    run(measured, tmp_path, setting, epochs=1, preview=preview())
    assert [step for step, _ in distances(tmp_path)] == [4, 5]


def test_processes_share_the_images_whole_or_in_shards(measured, tmp_path):
    """An uneven share: 70 images in batches of 16, or 24, 23 and 23 in batches of 23."""

    def found(name: str, world: int, batch: int, sharding: str) -> list[tuple[int, float]]:
        keys = {"global_batch": 6, "epochs": 1, "sharding": sharding, "preview": preview(fid_batch_size=batch)}
        line = ["train", *arguments(measured, tmp_path / name, "mode", **keys)]
        processes.run(line, tmp_path / f"{name}.errors", world=world)
        return distances(tmp_path / name)

    alone = found("one", 1, 16, "ddp")
    assert [step for step, _ in alone] == [4, 6]
    for name, world, batch, sharding in (("two", 2, 16, "ddp"), ("three", 3, 23, "ddp"), ("shards", 2, 16, "fsdp")):
        others = found(name, world, batch, sharding)
        assert [step for step, _ in others] == [4, 6]
        assert [value for _, value in others] == pytest.approx([value for _, value in alone], rel=1e-3), name


def test_a_signal_in_shards_ends_all_processes(measured, tmp_path):
    keys = {"global_batch": 8, "epochs": 400, "decay_end_epoch": 400, "sharding": "fsdp", "checkpoint_every": 10_000}
    keys |= {"preview": preview(fid_every=1, fid_batch_size=2)}
    line = ["train", *arguments(measured, tmp_path / "out", "mode", **keys)]
    command = processes.start(line, tmp_path / "errors", world=2)
    while command.processes[0].is_alive() and not list(tmp_path.glob("out/state-*/fid.jsonl")):
        time.sleep(0.01)
    command.kill(signal.SIGTERM)
    assert command.wait() == 130, command.errors.read_text()
    (step,) = steps_kept(tmp_path / "out")
    assert len(read_history(state_of(tmp_path / "out") / "fid.jsonl")) in (step - 1, step)


def test_what_is_said_of_a_distance(reference, tmp_path):
    """FID is the name of the standard detector's distances; few images are said to be few, once."""

    def noise(model: torch.nn.Module, numbers: range) -> torch.Tensor:
        return (256 * rng.uniform(0, "noise", torch.tensor(list(numbers)), (3, 32, 32))).to(torch.uint8)

    listing_digest = Reference.open(reference).about["listing_digest"]
    keys = config.build(config.Preview, preview(fid_images=40), "preview")
    ranks, detector = Ranks(0, 1, torch.device("cpu")), replace(load_detector("fashion", DETECTOR), standard=True)

    def open_reference() -> Reference:
        return reference_for(reference, detector, 32, "the decoder's images", listing_digest)

    curve, said = FidCurve(detector, open_reference, noise, keys, tmp_path, "train", ranks), []
    for step in (4, 8):
        assert curve.due(step, last=False)
        line = curve.measure(torch.nn.Identity(), step, lambda: False, said.append)
        assert line["measure"] == "FID" and not curve.due(step, last=True)
    assert said[0] == f"step 4: FID {line['distance']:.4g} (40 images)" and said[2].startswith("step 8: FID ")
    assert len(said) == 3 and said[1].startswith("40 images are too few for 64 features: compare these distances only")
    assert not curve.due(0, last=False) and not curve.due(5, last=False) and curve.due(5, last=True)


@pytest.mark.parametrize("n, turns", [(9, 2), (8, 1), (10, 2), (3, 1)])
def test_a_process_with_a_batch_less_asks_as_often_whether_to_stop(tmp_path, n, turns):
    """Both must meet in as many collective calls; together they generate every image once."""

    class OneOfTwo(Ranks):
        def gather(self, value):
            return [value]

    keys = config.build(config.Preview, preview(fid_images=n, fid_batch_size=4), "preview")
    detector = types.SimpleNamespace(dimension=2, features=lambda images: images)
    generated, asked = [], []
    for rank in range(2):

        def generate(model, numbers):
            generated.extend(numbers)
            return torch.tensor([[float(i), 1.0] for i in numbers])

        curve = FidCurve(detector, None, generate, keys, tmp_path, "train", OneOfTwo(rank, 2, torch.device("cpu")))
        first = len(generated)
        moments, problem = curve._moments(None, lambda rank=rank: asked.append(rank) or False, print)
        assert problem is None and moments.mean.tolist() == pytest.approx([np.mean(generated[first:]), 1.0])
    assert sorted(generated) == list(range(n)) and asked == [0] * turns + [1] * turns
