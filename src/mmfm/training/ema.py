"""Exponential moving average of a model's weights."""

import copy

import torch
from torch import Tensor, nn


class Ema:
    """A second copy of a model whose parameters follow the first: ema <- decay * ema + (1 - decay) * weights.

    It starts at the model and is updated after every optimiser step (Karras et al. 2024, "Analyzing and Improving the
    Training Dynamics of Diffusion Models", discuss the choice of the decay).

    Args:
        model: the module that owns the parameters. A compiled or distributed wrapper shares them, so the average moves
            whatever runs the forward pass.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._pairs: tuple[list[Tensor], list[Tensor]] = [], []

    def follow(self, averages: list[Tensor], weights: list[Tensor]) -> None:
        """Move these tensors of the average and of the model from now on: where both were divided, their shards.

        Frozen ones need not be among them: they are equal in both from the start.
        """
        self._pairs = averages, weights

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's present weights, all tensors in one call."""
        averages, weights = self._pairs
        torch._foreach_lerp_(averages, weights, 1 - self.decay)
