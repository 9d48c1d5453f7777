"""What a trainer is given: the run, its batches, and how to optimise, save and log."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from mmfm.infra.distributed import Ranks
from mmfm.training.latents import BatchPlan, MicroBatch
from mmfm.training.usage import Stopwatch

Losses = Callable[[nn.Module, MicroBatch, Any], Tensor]
"""(model, micro batch, its inputs) -> (b,) float32, one loss per image."""


class Batches(Protocol):
    """Yields the micro batches of consecutive steps with their inputs."""

    def batches(self, first_step: int, stop_step: int) -> Iterator[tuple[MicroBatch, Any]]:
        """Yield the micro batches of steps [first_step, stop_step) with their inputs."""


class Callback(Protocol):
    """State besides the weights that changes with every step and is saved in the checkpoints."""

    def after_step(self, ranks: Ranks, step: int) -> None:
        """Called by all processes after ``step`` steps were taken; must not wait for the device."""

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values."""

    def load(self, state: dict[str, Any], step: int) -> None:
        """Restore :meth:`state` from the checkpoint of ``step``."""


@dataclass(frozen=True)
class Run:
    """A training run: what to train, on which images, and where to keep its state.

    Attributes:
        stage: name for messages.
        model: on its device, with the same initial weights in all processes.
        losses: see :data:`Losses`.
        plan: the images of every step.
        state: directory of the checkpoints.
        callback: see :class:`Callback`.
        flops: operations per image of the model's forward pass; 0 if unknown.
        encoding: the time that the frozen encoder takes; None if it isn't measured.
    """

    stage: str
    model: nn.Module
    losses: Losses
    plan: BatchPlan
    state: Path
    ranks: Ranks
    callback: Callback | None = None
    flops: float = 0.0
    encoding: Stopwatch | None = None


@dataclass(frozen=True)
class OptimizerOptions:
    """Options of AdamW (Loshchilov and Hutter 2019) and of the average.

    Attributes:
        lr: learning rate of a step, counted from 0.
        betas, weight_decay: of AdamW.
        clip_norm: maximal norm of the whole gradient; 0 for no clipping.
        ema_decay: decay of the moving average of the weights in a step, counted from 0; None for no average.
    """

    lr: Callable[[int], float]
    betas: tuple[float, float]
    weight_decay: float
    clip_norm: float
    ema_decay: Callable[[int], float] | None


@dataclass(frozen=True)
class LoopOptions:
    """Options of the loop that do not affect the results.

    Attributes:
        checkpoint_every, log_every: intervals in steps.
        keep_checkpoints: how many of the newest checkpoints to keep.
        preview_every: interval of previews in steps; 0 for none.
        compile: use torch.compile.
        sharding: see :mod:`mmfm.training.parallel`.
        milestones: steps whose checkpoints are never removed.
        logger: see :mod:`mmfm.training.loggers`.
        profile: first and last step to profile; empty for none.
        remedy: advice for when memory runs out.
    """

    checkpoint_every: int
    log_every: int
    keep_checkpoints: int
    preview_every: int = 0
    compile: bool = False
    sharding: str = "ddp"
    milestones: frozenset[int] = frozenset()
    logger: str = "tensorboard"
    profile: tuple[int, ...] = ()
    remedy: str = "lower the micro batch"
