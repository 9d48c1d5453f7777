"""Adaptive loss weights: labels with a high or low loss get more or less weight.

Every label (a mode or a class) has a running mean of its images' losses. The ratio of this mean to the average over all
labels determines the weight of the label's images in the next step. The unweighted losses are summed over micro batches
and processes in integers, so the weights do not depend on how a step is divided.
"""

from typing import Any

import torch
from torch import Tensor

from mmfm.config import sections
from mmfm.config.choices import WEIGHTINGS
from mmfm.infra.distributed import Ranks

_UNIT = 2.0**32
"""Losses are summed as integer multiples of 1 / _UNIT."""

_LARGEST_LOSS = 1e6


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

    Args:
        config: the section ``train.loss_weighting``.
        num_labels: L.
        warmup_steps: steps with weights of 1.
        device: of the losses.

    Attributes:
        running: (L,) float64, running mean of the losses; 0 for labels that have not occurred.
        seen: (L,) bool, whether a label has occurred.
        weights: (L,) float32, for the current step.
    """

    def __init__(
        self, config: sections.LossWeighting, num_labels: int, warmup_steps: int, device: torch.device | str
    ) -> None:
        self.config, self.warmup_steps = config, warmup_steps
        self._rule = WEIGHTINGS[config.rule].load()
        self.running = torch.zeros(num_labels, dtype=torch.float64, device=device)
        self.seen = torch.zeros(num_labels, dtype=torch.bool, device=device)
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
        sums, counts = ranks.sum(self._step)
        mean = sums.double() / _UNIT / counts.clamp(min=1)
        decay = self.config.decay
        moved = torch.where(self.seen, decay * self.running + (1 - decay) * mean, mean)
        self.running = torch.where(counts > 0, moved, self.running)
        self.seen = self.seen | (counts > 0)
        self._step.zero_()
        self._set_weights(step)

    def _set_weights(self, step: int) -> None:
        if step < self.warmup_steps:
            return
        number = self.seen.sum().clamp(min=1)
        ratio = self.running / (self.running.sum() / number).clamp(min=1e-30)
        raw = torch.where(self.seen, self._rule(ratio, self.config.gamma), 0.0)
        scaled = (raw / (raw.sum() / number)).clamp(*self.config.bounds)
        self.weights = torch.where(self.seen, scaled, 1.0).float()

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint as JSON values, which keep doubles exactly."""
        return {"running": self.running.tolist(), "seen": self.seen.tolist()}

    def load(self, state: dict[str, Any], step: int) -> None:
        """Restore :meth:`state` as it was after ``step`` steps.

        Raises:
            ValueError: the state has another number of labels.
        """
        if len(state["running"]) != len(self.running):
            raise ValueError(
                f"the checkpoint has running losses of {len(state['running'])} labels, not of {len(self.running)}; "
                "remove the state directory to start over"
            )
        self.running = torch.tensor(state["running"], dtype=torch.float64, device=self.running.device)
        self.seen = torch.tensor(state["seen"], dtype=torch.bool, device=self.seen.device)
        self._set_weights(step)
