"""Schedules of learning rate and EMA decay: functions of the step alone, so that checkpoints hold no schedule state."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ConstantThenLinear:
    """Constant, then linear decay, then constant again.

    Attributes:
        lr: learning rate before the decay.
        final_lr: learning rate from ``end_step`` on.
        constant_steps: steps before the decay.
        end_step: step at which the decay ends; above ``constant_steps``.
    """

    lr: float
    final_lr: float
    constant_steps: int
    end_step: int

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        share = (step - self.constant_steps) / (self.end_step - self.constant_steps)
        return self.lr + (self.final_lr - self.lr) * min(1.0, max(0.0, share))


@dataclass(frozen=True)
class Cosine:
    """Constant, then cosine decay (Loshchilov and Hutter 2017, "SGDR", without restarts), then constant again.

    Attributes:
        lr, final_lr, constant_steps, end_step: see :class:`ConstantThenLinear`.
    """

    lr: float
    final_lr: float
    constant_steps: int
    end_step: int

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        share = min(1.0, max(0.0, (step - self.constant_steps) / (self.end_step - self.constant_steps)))
        return self.final_lr + (self.lr - self.final_lr) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Phased:
    """A constant during the initial phase, then a function of the step.

    Attributes:
        value: of the initial phase.
        steps: of the initial phase.
        then: (step, counted from the start of the training) -> value after the phase.
    """

    value: float
    steps: int
    then: Callable[[int], float]

    def __call__(self, step: int) -> float:
        """Return the value of a step, counted from 0."""
        return self.value if step < self.steps else self.then(step)
