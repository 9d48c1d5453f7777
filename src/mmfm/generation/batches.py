"""A set of images made batch by batch, with a progress bar."""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from mmfm import data
from mmfm.flow.solver import VelocityFn
from mmfm.generation.generator import require_finite
from mmfm.generation.sampler import Sampler

_BAR = "{l_bar}{bar}| {n:.0f}/{total_fmt} images [{elapsed}<{remaining}]"


def cut(numbers: range, shard_size: int, batch_size: int) -> Iterator[range]:
    """Cut numbers into batches as `sample` does, which does not reach over shards: roundings are then the same."""
    limits = range((numbers.start // shard_size + 1) * shard_size, numbers.stop, shard_size)
    for start, stop in itertools.pairwise([numbers.start, *limits, numbers.stop]):
        yield from data.ranges(start, stop, batch_size)


def generate(
    sampler: Sampler, numbers: range, start: Callable[[range], tuple[Tensor, VelocityFn]], progress: bool
) -> Tensor:
    """Generate images.

    Args:
        start: numbers of a batch -> x at t = 1, (B, C, H, W), and the velocity to follow.
        progress: show a bar if it takes longer than a second.

    Returns:
        (n, 3, S, S) uint8 on the CPU.

    Raises:
        ValueError: no numbers, or a flow that ends in values that are not finite.
    """
    if not numbers:
        raise ValueError("no images; ask for at least 1")
    # A solver that chooses its steps says nothing before the end of a batch.
    share = 1 / (sampler.generator.function_evaluations() or math.inf)
    images, done = [], 0
    with tqdm(total=len(numbers), bar_format=_BAR, disable=not progress, delay=1, leave=False) as bar:
        for batch in cut(numbers, sampler.settings.shard_size, sampler.settings.batch_size):
            x, velocity = start(batch)
            latents, _ = sampler.generator.follow(_watched(velocity, bar, share * len(batch)), x)
            images.append(sampler.generator.decode(require_finite(latents)).cpu())
            done += len(batch)
            bar.update(done - bar.n)
    return torch.cat(images)


def _watched(velocity: VelocityFn, bar: tqdm, images: float) -> VelocityFn:
    """Return a velocity that moves the bar by a number of images at every evaluation."""

    def watched(x: Tensor, t: Tensor) -> Tensor:
        bar.update(images)
        return velocity(x, t)

    return watched
