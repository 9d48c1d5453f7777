"""Training steps of DiTDH-XL in every setting, and faults that a rehearsal has to find."""

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmfm.config import Config
from mmfm.config.choices import SETTINGS
from mmfm.flow import path as flow
from mmfm.infra.distributed import Ranks
from mmfm.models.dit import DiT
from mmfm.models.layers import SwiGLU
from mmfm.training import latents, setup
from mmfm.training.options import Run
from mmfm.training.trainer import Trainer
from support.rehearsal import IMAGES, META, SHAPE, InBf16, Rehearsal, Wait, Waits, network

SHARE = 1024 // 8


@pytest.fixture
def trainer(full, task, tmp_path):
    """Return a function that makes the trainer of a setting, with an eighth of the preset's global batch."""

    def make(setting: str, model: str = "XL") -> Trainer:
        loss = task(setting)
        plan = latents.BatchPlan(0, IMAGES, SHARE, flip=True)
        run = Run("train", network(loss, full.models[model]), loss.losses, plan, tmp_path, Ranks(0, 1, META))
        steps = plan.steps_per_epoch
        return Trainer(run, setup.optimizer_options(loss.config, steps), setup.loop_options(loss.config, steps))

    return make


def inputs(plan: latents.BatchPlan) -> Iterator[tuple[latents.MicroBatch, latents.Inputs]]:
    for micro in plan.micro_batches(0):
        images = len(micro.indices)
        yield (
            micro,
            latents.Inputs(torch.empty(images, *SHAPE, device=META), torch.empty(images, SHAPE[0], device=META)),
        )


def step(trainer: Trainer) -> None:
    with Rehearsal():
        trainer._train_step(trainer.model, inputs(trainer.plan))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_of_every_setting(trainer, setting):
    made = trainer(setting)
    step(made)
    assert made.step == 1 and made.norm.device == META
    moments = [state["exp_avg"] for state in made.optimizer.state.values()]
    assert [m.shape for m in moments] == [t.shape for t in made.division.tensors]


READ = {"flow.source.MixtureSource.draw": Wait("once a micro-batch: the host reads variances of the modes from disk")}


def test_variances_on_disk_cost_a_wait_for_each_micro_batch(full, task, diagonal_source):
    loss, images = replace(task("mode"), source=diagonal_source), 16
    micro = latents.MicroBatch(range(images), torch.arange(images))
    given = latents.Inputs(*(torch.empty(images, *shape, device=META) for shape in (SHAPE, SHAPE[:1])))
    with Rehearsal(READ) as rehearsal:
        loss.losses(network(loss, full.models["S"]), micro, given).sum().backward()
    assert rehearsal.seen == dict.fromkeys(READ, 1)


def test_a_wait_in_a_step_is_found(trainer, monkeypatch):
    interpolate = flow.interpolate

    def waiting(x_data, x_source, t):
        return interpolate(x_data, x_source, t.clamp(max=t.max().item()))

    monkeypatch.setattr(flow, "interpolate", waiting)
    with pytest.raises(Waits, match=r"training\.objective\.FlowMatching\.losses waits .*_local_scalar_dense"):
        step(trainer("uncond", "S"))


def test_a_copy_that_blocks_is_found(trainer, monkeypatch):
    made = trainer("class", "S")
    monkeypatch.setattr(
        type(made.losses.__self__), "labels", lambda self, kind, modes, images, device: images.to(device)
    )
    with pytest.raises(Waits, match="copy to the device"):
        step(made)


def test_a_tensor_on_the_cpu_is_found(trainer, monkeypatch):
    monkeypatch.setattr(flow, "target_velocity", lambda x_data, x_source: x_source - torch.zeros(x_data.shape))
    with pytest.raises(AssertionError, match="mixes tensors of the CPU"):
        step(trainer("uncond", "S"))


def test_a_product_in_float64_is_found(trainer, monkeypatch):
    def doubled(self: SwiGLU, x: torch.Tensor) -> torch.Tensor:
        gate, value = nn.functional.linear(x.double(), self.w12.weight.double()).chunk(2, dim=-1)
        return self.w3((gate * value).float())

    monkeypatch.setattr(SwiGLU, "forward", doubled)
    with pytest.raises(AssertionError, match=r"models\.layers.*in float64"):
        step(trainer("uncond", "S"))


def in_bf16(full: Config, task, setting: str, model: str) -> InBf16:
    """Rehearse the network's passes under bf16 autocast; the loss around it computes in float32."""
    with FakeTensorMode(), mock.patch.object(DiT, "initialize_weights"):
        loss = replace(task(setting), config=replace(full.train, precision="bf16", label_dropout=0.0))
        network, products = setup.model(loss, full.models[model], SHAPE), InBf16()

        def forward(*inputs: torch.Tensor | None) -> torch.Tensor:
            with products:
                return network(*inputs)

        micro = latents.MicroBatch(range(2), torch.arange(2))
        losses = loss.losses(forward, micro, latents.Inputs(torch.empty(2, *SHAPE), torch.empty(2, SHAPE[0])))
        with products:
            losses.sum().backward()
    gradients = {p.grad.dtype for p in network.parameters() if p.requires_grad}
    assert losses.dtype == torch.float32 and gradients == {torch.float32}
    return products


def test_autocast_computes_every_product_in_bf16(full, task):
    seen, sizes = in_bf16(full, task, "uncond", "XL").products, full.models["XL"]
    attention = [count for name, count in seen.items() if name.startswith("_scaled_dot_product")]
    assert attention == [sum(sizes.depth)] * 2, "forward and backward"
    assert seen["mm"] + seen["addmm"] > 3 * 5 * sum(sizes.depth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_that_autocast_does_not_reach_is_found(full, task, dtype, monkeypatch):
    def precise(self: SwiGLU, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            gate, value = nn.functional.linear(x.to(dtype), self.w12.weight.to(dtype)).chunk(2, dim=-1)
            return nn.functional.linear((gate * value).float(), self.w3.weight)

    monkeypatch.setattr(SwiGLU, "forward", precise)
    with pytest.raises(AssertionError, match=rf"models\.layers.*{str(dtype).removeprefix('torch.')}"):
        in_bf16(full, task, "uncond", "S")
