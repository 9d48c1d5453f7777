"""Keeps non-finite losses and gradients out of the weights without synchronising with the device."""

import torch
from torch import Tensor

from mmfm.training.latents import BatchPlan

_MOST_NAMED = 8


class NonFiniteCheck:
    """Records on the device whether a step's loss or gradient was not finite.

    Attributes:
        broken: 1.0 from the first such step on, else 0.0. Passed to a fused optimiser as ``found_inf``, the flag that
            loss scaling uses, it freezes the weights from that step until the host reads it.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.broken = torch.zeros((), device=device)
        self._good_steps = torch.zeros((), device=device, dtype=torch.float64)

    def start(self, step: int) -> None:
        """Begin after ``step`` steps, all of them finite."""
        self._good_steps.fill_(step)

    def note(self, loss: Tensor, norm: Tensor) -> None:
        """Check the loss and the gradient norm, both 0-dimensional, of the step about to be taken."""
        self.broken = torch.maximum(self.broken, 1 - (loss.isfinite() & norm.isfinite()).float())
        self._good_steps += 1 - self.broken

    def first_broken(self) -> int | None:
        """Return the first step, counted from 0, that was not finite; None if all were. Waits for the device."""
        broken, good_steps = torch.stack((self.broken.double(), self._good_steps)).tolist()
        return int(good_steps) if broken else None


def explanation(plan: BatchPlan, step: int, culprits: list[int]) -> str:
    """Return the error message for a non-finite ``step``, counted from 0.

    Args:
        culprits: images whose loss is not finite, ascending; empty if only the gradient is not.
    """
    if culprits:
        what = "loss of" if len(culprits) == 1 else "losses of"
        images = culprits
    else:
        what, first = "gradient over", step * plan.global_batch
        images = plan.images(range(first, first + plan.global_batch)).tolist()
    named = ", ".join(map(str, images[:_MOST_NAMED]))
    more = f" and {len(images) - _MOST_NAMED} more" if len(images) > _MOST_NAMED else ""
    return (
        f"NaN or Inf in step {step + 1}, in the {what} image{'s' if len(images) > 1 else ''} {named}{more} of the "
        "listing. The step was not applied, and the last checkpoint is intact. Lower the learning rate, use precision "
        "float32, or look at these images"
    )
