"""Eight and sixteen processes in one: the group is PyTorch's ``fake`` one, which communicates nothing."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from mmfm.infra.distributed import Ranks
from mmfm.models.dit import DiT, DiTConfig
from mmfm.training import latents, setup
from mmfm.training.options import Run
from mmfm.training.trainer import Trainer
from support.rehearsal import IMAGES, META, SHAPE, Rehearsal, network


@pytest.fixture(params=[8, 16])
def world(request) -> Iterator[int]:
    """A world of which this process is the second."""
    dist.init_process_group("fake", rank=1, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def test_the_processes_share_a_step_of_imagenet(full, task, world, tmp_path):
    """Micro-batches, the sums of loss and norm, and the optimiser, at full size; DDP itself is in the test below."""
    loss, train = task("mode"), full.train
    plan = latents.BatchPlan(0, IMAGES, train.global_batch, 1, world, train.micro_batch, flip=True)
    assert plan.micro_batches_per_step == train.global_batch // world // train.micro_batch
    run = Run("train", network(loss, full.models["S"]), loss.losses, plan, tmp_path, Ranks(1, world, META))
    made = Trainer(run, setup.optimizer_options(train, 1251), setup.loop_options(train, 1251))
    given = (
        (micro, latents.Inputs(*(torch.empty(len(micro.indices), *shape, device=META) for shape in (SHAPE, (768,)))))
        for micro in plan.micro_batches(0)
    )
    with Rehearsal():
        made._train_step(made.model, given)
    assert made.step == 1 and next(given, None) is None


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_step_of_divided_training(full, world, sharding, tmp_path):
    """The real wrappers on a small model, with values that mean nothing."""
    model = DiT(DiTConfig(4, 1, 8, (64, 64), (2, 1), (4, 4), 0, 0.0))
    whole = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plan = latents.BatchPlan(0, 1000, 4 * world, 1, world, 2)
    ranks, train = Ranks(1, world, torch.device("cpu")), replace(full.train, sharding=sharding)

    def losses(forward, micro, x):
        return forward(x, x[:, 0, 0, 0]).square().mean((1, 2, 3))

    made = Trainer(
        Run("train", model, losses, plan, tmp_path, ranks),
        setup.optimizer_options(train, 10),
        setup.loop_options(train, 10),
    )
    forward, exchanged = made.division.wrapped(False), []
    if sharding == "ddp":

        def unchanged(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            """Return a bucket as it is, because the fake group's reduction leaves none."""
            exchanged.append(bucket.buffer().numel())
            result: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            result.set_result(bucket.buffer())
            return result

        forward.register_comm_hook(None, unchanged)
    made._train_step(forward, ((m, torch.randn(2, 8, 4, 4)) for m in plan.micro_batches(0)))
    held = sum(t.numel() for t in made.division.tensors)
    moments = sum(state["exp_avg"].numel() for state in made.optimizer.state.values())
    assert held == moments and made.step == 1
    if sharding == "ddp":
        assert held == whole == sum(exchanged), "gradients are exchanged once a step, after the last micro-batch"
        assert not forward.will_sync_module_buffers(), "they are constants"
    else:
        assert whole / world <= held < 1.2 * whole / world
