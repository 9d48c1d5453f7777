"""Guidance as velocity fields: v = v_weak + scale * (v - v_weak) where lo <= t <= hi, v elsewhere.

The interval follows Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval".
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mmfm.flow.solver import VelocityFn

Interval = tuple[float, float]
WHOLE: Interval = (0.0, 1.0)


def autoguidance(
    velocity: VelocityFn,
    guide: VelocityFn,
    scale: float,
    interval: Interval = WHOLE,
    dtype: torch.dtype = torch.float32,
) -> VelocityFn:
    """Guide a model with a weaker version of itself.

    Args:
        velocity: the model's field, labels already bound.
        guide: the weaker model's field, labels already bound.
        scale: 1 means no guidance.
        interval: closed interval of times (lo, hi) in which guidance applies.
        dtype: of the arithmetic.

    Returns:
        the guided field; one evaluation runs each network once on the batch.

    Raises:
        ValueError: the interval is empty or not within [0, 1].

    Source: Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself".
    """
    _check_interval(interval)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        active = _active(t, interval)
        strong = velocity(x, t)
        return strong if active is False else _extrapolate(strong, guide(x, t), scale, active, dtype)

    return guided


def classifier_free_guidance(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    labels: Tensor,
    null_label: int,
    scale: float,
    interval: Interval = WHOLE,
    dtype: torch.dtype = torch.float32,
) -> VelocityFn:
    """Guide a conditional model with its own unconditional prediction.

    Args:
        velocity: the model, (x, t, y) -> velocity.
        labels: (B,) int64.
        null_label: the label that means "no label".
        scale: 1 means no guidance.
        interval: closed interval of times (lo, hi) in which guidance applies.
        dtype: of the arithmetic.

    Returns:
        the guided field; one evaluation runs the network once, on a batch of 2 B inside the interval and B outside.

    Raises:
        ValueError: the interval is empty or not within [0, 1].

    Source: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance".
    """
    _check_interval(interval)
    both_labels = torch.cat([labels, torch.full_like(labels, null_label)])

    def guided(x: Tensor, t: Tensor) -> Tensor:
        active = _active(t, interval)
        if active is False:
            return velocity(x, t, labels)
        conditional, unconditional = velocity(torch.cat([x, x]), torch.cat([t, t]), both_labels).chunk(2)
        return _extrapolate(conditional, unconditional, scale, active, dtype)

    return guided


def _check_interval(interval: Interval) -> None:
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance interval ({low}, {high}) must satisfy 0 <= lo <= hi <= 1")


def _active(t: Tensor, interval: Interval) -> Tensor | bool:
    """Return where guidance applies: True (everywhere), False (nowhere), or a mask (B,).

    Fixed-step solvers give times on the CPU, so that this does not wait for a GPU.
    """
    if interval == WHOLE:
        return True
    active = (t >= interval[0]) & (t <= interval[1])
    return active if active.any() else False


def _extrapolate(
    strong: Tensor, weak: Tensor, scale: float, active: Tensor | Literal[True], dtype: torch.dtype
) -> Tensor:
    strong, weak = strong.to(dtype), weak.to(dtype)
    guided = weak + scale * (strong - weak)
    if active is True:
        return guided
    mask = active.to(strong.device, non_blocking=True).view(-1, *([1] * (strong.ndim - 1)))
    return torch.where(mask, guided, strong)
