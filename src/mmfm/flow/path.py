"""Straight path between data (t = 0) and source (t = 1), and its time distributions.

Sources: Lipman et al. 2023 and Liu et al. 2023 (linear path), Esser et al. 2024 (logit-normal times and the shift),
Zheng et al. 2025 (shift by the latent's size).
"""

import math

import torch
from torch import Tensor

# Number of latent values at which no shift is needed.
SHIFT_REFERENCE = 4096
MAX_TRAIN_TIME = 0.999
LAST_GRID_TIME = 1 / 1000

_HIGHEST = torch.special.ndtr(torch.tensor(math.log(MAX_TRAIN_TIME / (1 - MAX_TRAIN_TIME)), dtype=torch.float64)).item()
"""Normal CDF at the logit of the largest training time."""


def interpolate(x_data: Tensor, x_source: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_data + t x_source, for x (B, ...) and t (B,)."""
    t = t.view(-1, *([1] * (x_data.ndim - 1)))
    return (1 - t) * x_data + t * x_source


def target_velocity(x_data: Tensor, x_source: Tensor) -> Tensor:
    """dx_t / dt = x_source - x_data, (B, ...)."""
    return x_source - x_data


def time_shift(latent_shape: tuple[int, int, int]) -> float:
    """Shift s = sqrt(C * H * W / 4096) of a latent of shape (C, H, W); 6.93 for (768, 16, 16)."""
    return math.sqrt(math.prod(latent_shape) / SHIFT_REFERENCE)


def shift_times(t: Tensor, shift: float) -> Tensor:
    """t -> s t / (1 + (s - 1) t): more time near the source for s > 1; 0 and 1 stay (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def train_times(uniform: Tensor, shift: float) -> Tensor:
    """Training times from uniform numbers: logit-normal(0, 1) truncated to [0, 0.999], then shifted.

    Args:
        uniform: (B,) in [0, 1), the caller's keyed randomness.
        shift: s of `time_shift`.

    Returns:
        times (B,) float32 in [0, 1).
    """
    # Inverse CDF in float64: the tail of the normal distribution is lost in float32.
    t = torch.sigmoid(torch.special.ndtri(uniform.double() * _HIGHEST))
    return shift_times(t, shift).float()


def time_grid(num_points: int, shift: float) -> Tensor:
    """Sampling times (num_points,) float32: evenly spaced from exactly 1 to 1/1000, then shifted; num_points - 1 steps.

    One point is t = 1 alone: no step, the source itself.

    Raises:
        ValueError: no points.
    """
    if num_points < 1:
        raise ValueError(f"time_points = {num_points}: a sampler needs at least 1, where it starts")
    times = shift_times(torch.linspace(1, LAST_GRID_TIME, num_points), shift)
    times[0] = 1  # some shifts round to a number beside it, which would lie outside a guidance interval that ends at 1
    return times
