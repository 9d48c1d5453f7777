"""Generates images batch by batch, with a progress bar."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from mmfm import data
from mmfm.flow.solver import VelocityFn
from mmfm.generation.between import between
from mmfm.generation.generator import require_finite
from mmfm.generation.images import Images
from mmfm.generation.options import Request
from mmfm.generation.sampler import Sampler

_BAR = "{l_bar}{bar}| {n:.0f}/{total:.0f} images [{elapsed}<{remaining}]"


def split(numbers: range, shard_size: int, batch_size: int) -> Iterator[range]:
    """Split numbers into batches that do not cross shards: the batches of `sample`, and so the same rounding."""
    boundaries = range((numbers.start // shard_size + 1) * shard_size, numbers.stop, shard_size)
    for start, stop in itertools.pairwise([numbers.start, *boundaries, numbers.stop]):
        yield from data.ranges(start, stop, batch_size)


def generate(request: Request, progress: bool) -> Images:
    """Generate the requested images; ``progress`` shows a bar if this takes longer than a second.

    Raises:
        ValueError: no image is requested, or the flow ends in NaN or Inf.
    """
    sampler, modes = request.sampler, []

    def start(numbers: range) -> tuple[Tensor, VelocityFn]:
        drawn = request.draw(numbers)
        if drawn.modes is not None:
            modes.append(drawn.modes)
        return sampler.source.draw(drawn.modes, drawn.noise), sampler.field(drawn.labels)

    images = _follow(sampler, request.numbers, start, progress)
    return Images(images, torch.cat(modes) if modes else None)


def interpolate(start: Request, end: Request, n: int, progress: bool) -> Images:
    """Generate n images between two requests of one image each, both included; errors as in :func:`generate`."""
    sampler, ends = start.sampler, (start.draw(start.numbers), end.draw(end.numbers))
    shares = torch.linspace(0, 1, n, device=sampler.device)

    def start_between(rows: range) -> tuple[Tensor, VelocityFn]:
        return between(sampler.source, sampler.field, *ends, shares[rows.start : rows.stop])

    return Images(_follow(sampler, range(n), start_between, progress))


def _follow(
    sampler: Sampler, numbers: range, start: Callable[[range], tuple[Tensor, VelocityFn]], progress: bool
) -> Tensor:
    """Follow the flow in batches and decode: (n, 3, S, S) uint8 on the CPU.

    Args:
        start: a batch of ``numbers`` -> x at t = 1, (B, C, H, W), and the velocity field.
    """
    if not numbers:
        raise ValueError("no images requested; ask for at least 1")
    # The bar counts evaluations, whose whole numbers add up exactly, and shows images. With an adaptive solver it
    # advances only at the end of a batch.
    known = sampler.generator.function_evaluations()
    each = known or 1
    images, done, total = [], 0, len(numbers) * each
    with tqdm(total=total, unit_scale=1 / each, bar_format=_BAR, disable=not progress, delay=1, leave=False) as bar:
        for batch in split(numbers, sampler.config.shard_size, sampler.config.batch_size):
            x, velocity = start(batch)
            latents, _ = sampler.generator.follow(_watched(velocity, bar, len(batch) if known else 0), x)
            images.append(sampler.generator.decode(require_finite(latents)).cpu())
            done += each * len(batch)
            bar.update(done - bar.n)
    return torch.cat(images)


def _watched(velocity: VelocityFn, bar: tqdm, count: int) -> VelocityFn:
    """Return the velocity, advancing the bar by ``count`` at every evaluation."""

    def watched(x: Tensor, t: Tensor) -> Tensor:
        bar.update(count)
        return velocity(x, t)

    return watched
