"""Adaptive loss weights: labels with a high or low loss get more or less weight.

Every label (a mode or a class) has a running mean of its images' losses, which starts at 1. The ratio of this mean to
the average over all labels determines the weight of the label's images in the next step. The unweighted losses are
summed over micro batches and processes in integers, so the weights do not depend on how a step is divided.
"""

from typing import Any

import torch
from torch import Tensor

from mmfm.config import training
from mmfm.config.choices import WEIGHTINGS
from mmfm.infra.distributed import Ranks

_UNIT = 2.0**32
"""Losses are summed as integer multiples of 1 / _UNIT."""

_LARGEST_LOSS = 1e6

_EPSILON = 1e-8
"""Added to both means over the labels, as in the published code."""


# The rules: (ratio of a label's running loss to the labels' mean, gamma) -> unnormalised weight.


def focal(ratio: Tensor, gamma: float) -> Tensor:
    """ratio^gamma, after Lin et al. 2017, "Focal Loss for Dense Object Detection"."""
    return ratio**gamma


def sqrt(ratio: Tensor, gamma: float) -> Tensor:
    """Square root of the ratio."""
    return ratio.sqrt()


def log(ratio: Tensor, gamma: float) -> Tensor:
    """ln(1 + ratio)."""
    return ratio.log1p()


def inverse(ratio: Tensor, gamma: float) -> Tensor:
    """1 / ratio."""
    return ratio.clamp(min=1e-6).reciprocal()


class LossWeighting:
    """Running losses of L labels and the loss weights computed from them.

    The warm-up ends in the plain mean of each label's losses so far. Afterwards a step moves the running losses of the
    labels that occur in it. Until a label occurs, its running loss is 1.

    Args:
        config: the section ``train.loss_weighting``.
        num_labels: L.
        warmup_steps: steps with weights of 1.
        device: of the losses.

    Attributes:
        running: (L,) float64, running mean of the losses.
        sums, counts: (L,) float64, sum and number of the losses in the warm-up.
        weights: (L,) float32, for the current step.
    """

    def __init__(
        self, config: training.LossWeighting, num_labels: int, warmup_steps: int, device: torch.device | str
    ) -> None:
        self.config, self.warmup_steps = config, warmup_steps
        self._rule = WEIGHTINGS[config.rule].load()
        self.running = torch.ones(num_labels, dtype=torch.float64, device=device)
        self.sums, self.counts = torch.zeros_like(self.running), torch.zeros_like(self.running)
        self.weights = torch.ones(num_labels, device=device)
        # Sums and counts of the step. Integer sums do not depend on the order of addition, which varies on a GPU.
        self._step = torch.zeros(2, num_labels, dtype=torch.int64, device=device)

    def weigh(self, losses: Tensor, labels: Tensor) -> Tensor:
        """Return losses (b,) times the weights of their labels (b,); with gradients enabled, count the losses too."""
        if torch.is_grad_enabled():
            # The trainer handles losses that are not finite.
            known = losses.detach().double().nan_to_num(0.0).clamp(max=_LARGEST_LOSS)
            fixed = (known * _UNIT).round().long()
            self._step.index_add_(1, labels, torch.stack((fixed, torch.ones_like(fixed))))
        return losses * self.weights.index_select(0, labels)

    @torch.no_grad()
    def after_step(self, ranks: Ranks, step: int) -> None:
        """Update the running losses and the weights for the next step; a collective call.

        Args:
            step: steps taken so far.
        """
        sums, counts = ranks.sum(self._step).double()
        sums /= _UNIT
        decay = self.config.decay
        if step <= self.warmup_steps:
            self.sums += sums
            self.counts += counts
            if step == self.warmup_steps:
                self.running = torch.where(self.counts > 0, self.sums / self.counts.clamp(min=1), self.running)
        else:
            moved = decay * self.running + (1 - decay) * sums / counts.clamp(min=1)
            self.running = torch.where(counts > 0, moved, self.running)
        self._step.zero_()
        self._set_weights(step)

    def _set_weights(self, step: int) -> None:
        if step < max(1, self.warmup_steps):
            return
        raw = self._rule(self.running / (self.running.mean() + _EPSILON), self.config.gamma)
        self.weights = (raw / (raw.mean() + _EPSILON)).clamp(*self.config.bounds).float()

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint as JSON values, which keep doubles exactly."""
        return {name: getattr(self, name).tolist() for name in _STATE}

    def load(self, state: dict[str, Any], step: int) -> None:
        """Restore :meth:`state` as it was after ``step`` steps.

        Raises:
            ValueError: the state has another number of labels, or is of an earlier version.
        """
        if missing := [name for name in _STATE if name not in state]:
            raise ValueError(
                f"the checkpoint's loss weights are of an earlier version (no {', '.join(missing)}); remove the state "
                "directory to start over"
            )
        if len(state["running"]) != len(self.running):
            raise ValueError(
                f"the checkpoint has running losses of {len(state['running'])} labels, not of {len(self.running)}; "
                "remove the state directory to start over"
            )
        for name in _STATE:
            setattr(self, name, torch.tensor(state[name], dtype=torch.float64, device=self.running.device))
        self._set_weights(step)


_STATE = ("running", "sums", "counts")
