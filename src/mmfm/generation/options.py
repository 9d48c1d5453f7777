"""What callers of the Python API can ask for: sampling options, modes and labels, all checked."""

import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias, TypedDict

import torch
from torch import Tensor

from mmfm import config
from mmfm.config.choices import did_you_mean
from mmfm.generation.generator import Draw
from mmfm.generation.sampler import Sampler


class Sampling(TypedDict, total=False):
    """Sampling options; those left out are the target's. See the section `sample` in config/README.md.

    ``guidance`` is the guidance scale, ``interval`` the times (lowest, highest) at which guidance applies, and
    ``batch_size`` the number of images generated at a time.
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


_KNOWN = f"the sampling options are {', '.join(Sampling.__annotations__)}"


def changed(section: config.Sample, sampling: Sampling) -> config.Sample:
    """Return the section ``sample`` with some keys replaced.

    Raises:
        ValueError: an option is unknown, or its value has the wrong type or range.
    """
    known = list(Sampling.__annotations__)
    if unknown := [name for name in sampling if name not in known]:
        raise ValueError(f"there is no argument '{unknown[0]}'{did_you_mean(unknown[0], known)}; {_KNOWN}")
    values, options = asdict(section), dict(sampling)
    for key, name in (("guidance", "scale"), ("interval", "interval")):
        if key in options:
            values["guidance"][name] = options.pop(key)
    return config.build(config.Sample, {**values, **options}, "sample")


def numbers(n: int, first: int = 0) -> range:
    """Return the numbers of n images; ValueError if n or the first one is not a whole number."""
    try:
        first, n = operator.index(first), operator.index(n)
    except TypeError as error:
        raise ValueError(f"{n!r} images from number {first!r} are wanted; give whole numbers") from error
    return range(first, first + n)


Numbers: TypeAlias = int | Sequence[int] | Tensor
"""One number for all images, or one for each."""


def given(values: Numbers | None, n: int, known: int, what: str) -> Tensor | None:
    """Check modes or labels and return them as (n,) int64 on the CPU; None if none are given.

    Args:
        known: number of existing modes or labels.
        what: ``modes`` or ``labels``, for messages.

    Raises:
        ValueError: the setting has none, or the number or a value is wrong.
    """
    if values is None:
        return None
    if not known:
        raise ValueError(f"this setting has no {what}; omit them")
    numbers = torch.as_tensor(values)
    if numbers.is_floating_point() or numbers.shape not in ((), (n,)):
        raise ValueError(f"{what} are {tuple(numbers.shape)} {numbers.dtype}; give an integer, or {n} of them")
    if not ((numbers >= 0) & (numbers < known)).all():
        raise ValueError(f"{what} must be from 0 to {known - 1}, got {numbers.tolist()}")
    return numbers.to("cpu", torch.int64).expand(n)


@dataclass(frozen=True)
class Request:
    """Images to generate.

    Attributes:
        sampler: with the requested seed and options.
        numbers: of the images.
        modes, labels: (n,) int64 on the CPU; None to draw them.
    """

    sampler: Sampler
    numbers: range
    modes: Tensor | None
    labels: Tensor | None

    @classmethod
    def of(
        cls,
        sampler: Sampler,
        numbers: range,
        sampling: Sampling,
        seed: int | None = None,
        modes: Numbers | None = None,
        labels: Numbers | None = None,
    ) -> "Request":
        """Check what a caller asks for.

        Raises:
            ValueError: an option, mode or label does not exist or is not possible with these weights.
        """
        sampler = sampler.varied(changed(sampler.config, sampling), seed)
        n, num_classes = len(numbers), sampler.generator.num_labels if sampler.setting.condition == "class" else 0
        return cls(
            sampler,
            numbers,
            given(modes, n, sampler.source.num_modes, "modes"),
            given(labels, n, num_classes, "labels"),
        )

    def draw(self, numbers: range) -> Draw:
        """Draw the noise, modes and labels of some of the images."""
        rows = slice(numbers.start - self.numbers.start, numbers.stop - self.numbers.start)
        modes, labels = (None if fixed is None else fixed[rows] for fixed in (self.modes, self.labels))
        return self.sampler.generator.draw(numbers, modes, labels)
