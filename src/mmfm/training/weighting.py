"""Adaptive loss weights: what the model finds hard or easy among the labels counts more or less.

Every label (a mode or a class) has a running mean of its images' losses. Its ratio to the mean over all labels gives
the weight of the label's images in the next step. The raw losses of a step are summed over micro batches and processes
in whole numbers, so the weights are the same however a step is divided.
"""

from typing import Any

import torch
from torch import Tensor

from mmfm import config
from mmfm.config.choices import WEIGHTINGS
from mmfm.infra.distributed import Ranks

_UNIT = 2.0**32
_LARGEST_LOSS = 1e6


# Unscaled weight of a label from the ratio of its running loss to the labels' mean, and gamma.


def focal(ratio: Tensor, gamma: float) -> Tensor:
    """ratio^gamma, after Lin et al. 2017, "Focal Loss for Dense Object Detection"."""
    return ratio**gamma


def sqrt(ratio: Tensor, gamma: float) -> Tensor:
    """Root of the ratio."""
    return ratio.sqrt()


def log(ratio: Tensor, gamma: float) -> Tensor:
    """ln(1 + ratio)."""
    return ratio.log1p()


def inverse(ratio: Tensor, gamma: float) -> Tensor:
    """1 / ratio."""
    return ratio.clamp(min=1e-6).reciprocal()


class LossWeighting:
    """Running losses of L labels and the weights that follow from them.

    Args:
        settings: the section ``train.loss_weighting``.
        num_labels: L.
        warmup_steps: steps with weights of 1.
        device: where losses are.

    Attributes:
        running: (L,) float64, running mean of the losses; 0 where a label has not occurred.
        seen: (L,) bool.
        weights: (L,) float32, of the present step.
    """

    def __init__(
        self, settings: config.LossWeighting, num_labels: int, warmup_steps: int, device: torch.device | str
    ) -> None:
        self.settings, self.warmup_steps = settings, warmup_steps
        self._rule = WEIGHTINGS[settings.rule].load()
        self.running = torch.zeros(num_labels, dtype=torch.float64, device=device)
        self.seen = torch.zeros(num_labels, dtype=torch.bool, device=device)
        self.weights = torch.ones(num_labels, device=device)
        # Sums and counts of the step. Integers: their sum does not depend on the order, which on a GPU is not fixed.
        self._step = torch.zeros(2, num_labels, dtype=torch.int64, device=device)

    def weigh(self, losses: Tensor, labels: Tensor) -> Tensor:
        """Return losses (b,) times their labels' (b,) weights; in training the losses are remembered too."""
        if torch.is_grad_enabled():
            # A loss that is not finite stops the training elsewhere.
            known = losses.detach().double().nan_to_num(0.0).clamp(max=_LARGEST_LOSS)
            fixed = (known * _UNIT).round().long()
            self._step.index_add_(1, labels, torch.stack((fixed, torch.ones_like(fixed))))
        return losses * self.weights.index_select(0, labels)

    @torch.no_grad()
    def after_step(self, ranks: Ranks, step: int) -> None:
        """Update the running losses and set the weights of the next step; called by all processes.

        Args:
            step: steps taken so far.
        """
        sums, counts = ranks.sum(self._step)
        mean = sums.double() / _UNIT / counts.clamp(min=1)
        decay = self.settings.decay
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
        raw = torch.where(self.seen, self._rule(ratio, self.settings.gamma), 0.0)
        scaled = (raw / (raw.sum() / number)).clamp(*self.settings.bounds)
        self.weights = torch.where(self.seen, scaled, 1.0).float()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON values; doubles survive JSON exactly."""
        return {"running": self.running.tolist(), "seen": self.seen.tolist()}

    def load(self, state: dict[str, Any], step: int) -> None:
        """Take up :meth:`state` as it was after ``step`` steps.

        Raises:
            ValueError: it is of another number of labels.
        """
        if len(state["running"]) != len(self.running):
            raise ValueError(
                f"the checkpoint has running losses of {len(state['running'])} labels, not of {len(self.running)}; "
                "remove its directory to start anew"
            )
        self.running = torch.tensor(state["running"], dtype=torch.float64, device=self.running.device)
        self.seen = torch.tensor(state["seen"], dtype=torch.bool, device=self.seen.device)
        self._set_weights(step)
