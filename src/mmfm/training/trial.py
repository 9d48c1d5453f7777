"""A trainer on random latents, to measure steps without images, encoder or mixture."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mmfm.config import Model, Train
from mmfm.flow.path import time_shift
from mmfm.flow.source import GaussianSource
from mmfm.infra import rng
from mmfm.infra.distributed import Ranks
from mmfm.models.dit import DiT
from mmfm.training import latents, setup
from mmfm.training.objective import FlowMatching
from mmfm.training.options import Run
from mmfm.training.trainer import Trainer

_IMAGES = 1 << 14


class RandomLatents:
    """Random latents of the given shape (C, H, W) in place of those of images."""

    def __init__(self, plan: latents.BatchPlan, device: torch.device, shape: tuple[int, int, int]) -> None:
        self.plan, self.device, self.shape = plan, device, shape

    def batches(self, first_step: int, stop_step: int) -> Iterator[tuple[latents.MicroBatch, latents.Inputs]]:
        """Yield the micro batches of steps [first_step, stop_step)."""
        for step in range(first_step, stop_step):
            for micro in self.plan.micro_batches(step):
                keys = micro.key_tensor(self.device)
                yield micro, latents.Inputs(rng.normal(0, "trial/latent", keys, self.shape), keys)


def labelled(train: Train, labels: int, shape: tuple[int, int, int]) -> FlowMatching:
    """Return the loss of a model that sees a label, with a Gaussian source."""
    classes = torch.arange(_IMAGES) % labels
    section = replace(train, label_dropout=0.0)
    return FlowMatching("class", GaussianSource(), None, section, time_shift(shape), (classes, labels))


def trainer(
    task: FlowMatching,
    model: DiT | Model,
    shape: tuple[int, int, int],
    global_batch: int,
    state: Path,
    ranks: Ranks,
) -> Trainer:
    """Return a trainer of whole shares, without logger.

    Args:
        task: see :func:`labelled`.
        model: a network on its device, or the sizes of a new one.
        shape: of a latent, (C, H, W).
        state: where checkpoints would go.
    """
    section = replace(task.config, global_batch=global_batch, micro_batch=0, logger="none")
    plan = latents.BatchPlan(0, _IMAGES, global_batch, ranks.rank, ranks.world)
    network = setup.model(task, model, shape).to(ranks.device) if isinstance(model, Model) else model
    run = Run("train", network, task.losses, plan, state, ranks)
    optimizer = setup.optimizer_options(section, plan.steps_per_epoch)
    return Trainer(run, optimizer, setup.loop_options(section, plan.steps_per_epoch))
