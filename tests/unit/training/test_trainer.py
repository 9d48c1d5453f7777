"""The parts of the loop, without a stage around them: batches, loss, schedules, steps, clock, average."""

import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfm import config
from mmfm.autoencoder.encoders import load_encoder
from mmfm.data import Listing
from mmfm.flow.path import target_velocity
from mmfm.flow.source import GaussianSource
from mmfm.infra import rng
from mmfm.infra.distributed import Ranks
from mmfm.training import checkpoint, latents, runlog, setup, trainer
from mmfm.training.ema import Ema
from mmfm.training.latents import BatchPlan, Inputs, MicroBatch
from mmfm.training.nonfinite import NonFiniteCheck
from mmfm.training.objective import FlowMatching
from mmfm.training.options import LoopOptions, OptimizerOptions, Run
from mmfm.training.schedule import ConstantThenLinear, Cosine
from support.latent_fills import ALONE, open_cache
from support.tiny import SECTIONS
from support.train_runs import history


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
