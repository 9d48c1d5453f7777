"""Keeps a loss or gradient that is not finite out of the weights, without a wait for the device."""

import torch
from torch import Tensor

from mmfm.training.latents import BatchPlan

_NAMED = 8


class NonFiniteCheck:
    """Notes on the device that a step's loss or gradient is not finite.

    Attributes:
        broken: 1.0 from the first such step on, else 0.0. The fused optimisers skip a step where their ``found_inf`` is
            1 (what loss scaling uses for the same purpose), so everything stays as it is, in that step and the
            following, until the host reads the flag.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.broken = torch.zeros((), device=device)
        self._good_steps = torch.zeros((), device=device, dtype=torch.float64)

    def start(self, step: int) -> None:
        """``step`` steps are taken, and all of them were good."""
        self._good_steps.fill_(step)

    def note(self, loss: Tensor, norm: Tensor) -> None:
        """Look at the loss and the gradient's norm of a step that is about to be taken, both 0-dimensional."""
        self.broken = torch.maximum(self.broken, 1 - (loss.isfinite() & norm.isfinite()).float())
        self._good_steps += 1 - self.broken

    def first_broken(self) -> int | None:
        """The step, counted from 0, that was not finite; None if all were. Waits for the device."""
        broken, good_steps = torch.stack((self.broken.double(), self._good_steps)).tolist()
        return int(good_steps) if broken else None


def explanation(plan: BatchPlan, step: int, culprits: list[int]) -> str:
    """Say what was wrong in ``step``, counted from 0, and what to do.

    Args:
        culprits: images whose loss is not finite, ascending; none if all losses are finite.
    """
    if culprits:
        what = "loss of" if len(culprits) == 1 else "losses of"
        images = culprits
    else:
        what, first = "gradient over", step * plan.global_batch
        images = plan.images(range(first, first + plan.global_batch)).tolist()
    named = ", ".join(map(str, images[:_NAMED]))
    more = f" and {len(images) - _NAMED} more" if len(images) > _NAMED else ""
    return (
        f"NaN or Inf in step {step + 1}, in the {what} image{'s' if len(images) > 1 else ''} {named}{more} of the "
        "listing; the weights are as before it and the last checkpoint is intact. Lower the learning rate, use "
        "precision float32, or look at these images"
    )
