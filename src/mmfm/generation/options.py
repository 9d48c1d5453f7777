"""What a caller can ask of a generation, checked as the configuration is."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TypeAlias, TypedDict

import torch
from torch import Tensor

from mmfm import config


class Sampling(TypedDict, total=False):
    """How to sample; what is left out is as the target was sampled. See the section `sample` in config/README.md.

    ``guidance`` is the scale and ``interval`` the times (lowest, highest) in which it applies; ``batch_size`` images
    are generated at a time.
    """

    guidance: float
    interval: tuple[float, float]
    solver: str
    time_points: int
    rtol: float
    atol: float
    precision: str
    mode_draw: str
    label_draw: str
    batch_size: int


def changed(settings: config.Sample, sampling: Sampling) -> config.Sample:
    """Return settings with some keys at other values.

    Raises:
        ValueError: a key is unknown, mistyped or out of range.
    """
    values, asked = asdict(settings), dict(sampling)
    for key, name in (("guidance", "scale"), ("interval", "interval")):
        if key in asked:
            values["guidance"][name] = asked.pop(key)
    return config.build(config.Sample, {**values, **asked}, "sample")


Numbers: TypeAlias = int | Sequence[int] | Tensor
"""One number for all images, or one for each."""


def given(values: Numbers | None, n: int, known: int, what: str, device: torch.device) -> Tensor | None:
    """Return given modes or labels as (n,) int64; None if none are given.

    Args:
        known: how many there are.

    Raises:
        ValueError: there are none, or not n of them are given, or one is out of range.
    """
    if values is None:
        return None
    if not known:
        raise ValueError(f"this setting has no {what}; leave them out")
    numbers = torch.as_tensor(values)
    if numbers.is_floating_point() or numbers.shape not in ((), (n,)):
        raise ValueError(f"{what} are {tuple(numbers.shape)} {numbers.dtype}; give a whole number, or {n} of them")
    if not ((numbers >= 0) & (numbers < known)).all():
        raise ValueError(f"{what} are from 0 to {known - 1}, got {numbers.tolist()}")
    return numbers.to(device, torch.int64).expand(n)
