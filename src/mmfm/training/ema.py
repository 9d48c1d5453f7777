"""Exponential moving average of a model's weights."""

import copy

import torch
from torch import Tensor, nn


class Ema:
    """A copy of a model whose parameters follow it: ema <- decay * ema + (1 - decay) * weights.

    The average starts at the initial weights. Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
    Diffusion Models", discuss the choice of the decay.

    Args:
        model: the module that owns the parameters. Its distributed wrapper shares them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._pairs: tuple[list[Tensor], list[Tensor]] = [], []

    def follow(self, averages: list[Tensor], weights: list[Tensor]) -> None:
        """Set the tensors to update and those they follow: whole parameters, or shards if the model is sharded.

        Frozen parameters can be left out: the copy already equals them.
        """
        self._pairs = averages, weights

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the average towards the current weights, all tensors in one call, with the step's decay in [0, 1)."""
        averages, weights = self._pairs
        torch._foreach_lerp_(averages, weights, 1 - decay)
