"""What a trainer is given: the losses, what feeds them, what moves with them, and the settings."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from mmfm.infra.distributed import Ranks
from mmfm.training.latents import MicroBatch

Losses = Callable[[nn.Module, MicroBatch, Any], Tensor]
"""(model, micro batch, its inputs) -> (b,) float32, the loss of every image."""


class Batches(Protocol):
    """Gives the micro batches of consecutive steps, each with its inputs."""

    def batches(self, first_step: int, stop_step: int) -> Iterator[tuple[MicroBatch, Any]]:
        """Yield the micro batches of steps [first_step, stop_step) with their inputs."""


class Callback(Protocol):
    """What moves with the steps besides the weights, and is kept in the checkpoints."""

    def after_step(self, ranks: Ranks, step: int) -> None:
        """Called by all processes after optimiser step ``step``; must not wait for the device."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON values."""

    def load(self, state: dict[str, Any], step: int) -> None:
        """Take up what a checkpoint of ``step`` keeps."""


@dataclass(frozen=True)
class OptimizerOptions:
    """What the optimiser does: AdamW (Loshchilov and Hutter 2019).

    Attributes:
        lr: learning rate of a step, counted from 0.
        betas, weight_decay: of AdamW.
        clip_norm: largest norm of the whole gradient; 0 for no clipping.
        ema_decay: of the average; None for none.
    """

    lr: Callable[[int], float]
    betas: tuple[float, float]
    weight_decay: float
    clip_norm: float
    ema_decay: float | None


@dataclass(frozen=True)
class LoopOptions:
    """How often a run does what changes no number; all in steps.

    Attributes:
        checkpoint_every, log_every: intervals.
        keep_checkpoints: newest checkpoints that stay.
        preview_every: interval of previews; 0 for none.
        compile: use torch.compile.
        sharding: how the model is divided among processes; see :mod:`mmfm.training.parallel`.
        milestones: steps whose checkpoints stay for ever.
        logger: where the run is shown; see :mod:`mmfm.training.loggers`.
        remedy: what to do when memory runs out.
    """

    checkpoint_every: int
    log_every: int
    keep_checkpoints: int
    preview_every: int = 0
    compile: bool = False
    sharding: str = "ddp"
    milestones: frozenset[int] = frozenset()
    logger: str = "tensorboard"
    remedy: str = "lower the micro batch"
