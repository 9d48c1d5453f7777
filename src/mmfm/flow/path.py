"""The straight path between data (t = 0) and source (t = 1), training times and sampling times.

Sources: Lipman et al. 2023 and Liu et al. 2023 (linear path), Esser et al. 2024 (logit-normal times, time shift),
Zheng et al. 2025 (shift by latent size).
"""

import math

import torch
from torch import Tensor

SHIFT_REFERENCE = 4096  # number of latent values at which the shift is 1
MAX_TRAIN_TIME = 0.999
LAST_GRID_TIME = 1 / 1000

_HIGHEST = torch.special.ndtr(torch.tensor(math.log(MAX_TRAIN_TIME / (1 - MAX_TRAIN_TIME)), dtype=torch.float64)).item()
"""Normal CDF at the logit of MAX_TRAIN_TIME."""


def interpolate(x_data: Tensor, x_source: Tensor, t: Tensor) -> Tensor:
    """Return x_t = (1 - t) x_data + t x_source, for x (B, ...) and t (B,)."""
    t = t.view(-1, *([1] * (x_data.ndim - 1)))
    return (1 - t) * x_data + t * x_source


def target_velocity(x_data: Tensor, x_source: Tensor) -> Tensor:
    """Return dx_t / dt = x_source - x_data, (B, ...)."""
    return x_source - x_data


def time_shift(latent_shape: tuple[int, int, int]) -> float:
    """Return the shift s = sqrt(C * H * W / 4096) for latents (C, H, W); 6.93 for (768, 16, 16)."""
    return math.sqrt(math.prod(latent_shape) / SHIFT_REFERENCE)


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Map t to s t / (1 + (s - 1) t), closer to the source for s > 1; 0 and 1 are fixed (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def train_times(uniform: Tensor, shift: float) -> Tensor:
    """Turn uniform numbers into training times: logit-normal(0, 1) truncated to [0, 0.999], then shifted.

    Args:
        uniform: (B,) in [0, 1).
        shift: s from :func:`time_shift`.

    Returns:
        times (B,) float32 in [0, 1).
    """
    # The inverse CDF in float64: float32 loses the tail of the normal distribution.
    t = torch.sigmoid(torch.special.ndtri(uniform.double() * _HIGHEST))
    return shift_times(t, shift).float()


def time_grid(num_points: int, shift: float) -> Tensor:
    """Return sampling times (num_points,) float32, evenly spaced from 1 to 1/1000 and then shifted.

    They define num_points - 1 steps. A single point, t = 1, takes no step and returns the source itself.

    Raises:
        ValueError: `num_points` is less than 1.
    """
    if num_points < 1:
        raise ValueError(f"time_points = {num_points} must be at least 1, the starting time")
    times = shift_times(torch.linspace(1, LAST_GRID_TIME, num_points), shift)
    times[0] = 1  # with some shifts it rounds to a value outside a guidance interval that ends at 1
    return times
