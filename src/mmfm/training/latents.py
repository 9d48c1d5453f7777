"""What feeds a training loop: which image stands where, and its latent.

The global batch of every step is fixed by (seed, number of images, step). A process takes its slice of the places, cut
into micro batches, so neither the number of processes nor the micro batch changes which images a step sees or what is
drawn for them.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmfm import data
from mmfm.infra import memory, rng
from mmfm.infra.distributed import Ranks
from mmfm.infra.progress import Progress

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (B, 3, S, S) float32 in [0, 1] -> latent (B, C, H, W) and global token (B, C), float32."""

_CACHE_BATCH = 250


class MicroBatch(NamedTuple):
    """Consecutive places of one step.

    Attributes:
        keys: their global numbers, step * global_batch + position: what the randomness of a place is keyed by.
        indices: (b,) int64, the images that stand there.
    """

    keys: range
    indices: Tensor

    def key_tensor(self, device: torch.device) -> Tensor:
        """The keys as (b,) int64."""
        return torch.arange(self.keys.start, self.keys.stop, device=device)


class Inputs(NamedTuple):
    """latent (b, C, H, W) and global token (b, C) of a micro batch, of the images as augmented; float32.

    ``images`` (b, 3, S, S) float32 in [0, 1] are there unless a cache was made without them.
    """

    latent: Tensor
    token: Tensor
    images: Tensor | None = None


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> Tensor:
    return rng.permutation(seed, "order", epoch, n)


@dataclass(frozen=True)
class BatchPlan:
    """The images of every step, and this process's share of them.

    Epoch e visits the images in the order of its permutation; what does not fill a last global batch is left out.

    Attributes:
        seed: of order and flips.
        n_images: N.
        global_batch: places of a step over all processes.
        rank, world: this process and how many there are.
        micro_batch: places of one forward pass; 0 for the whole share.
        flip: whether half of the places show their image flipped.

    Raises:
        ValueError: fewer images than places in a step, or places that the processes can't share equally.
    """

    seed: int
    n_images: int
    global_batch: int
    rank: int = 0
    world: int = 1
    micro_batch: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.n_images < self.global_batch:
            raise ValueError(
                f"global_batch is {self.global_batch}, but there are only {self.n_images} images to train on; lower it"
            )
        if self.global_batch % self.world:
            below = self.global_batch // self.world * self.world
            nearest = " or ".join(str(n) for n in (below, below + self.world) if 0 < n <= self.n_images)
            shares = [n for n in range(1, self.world) if self.global_batch % n == 0]
            raise ValueError(
                f"global_batch is {self.global_batch}, which {self.world} processes can't share equally; the nearest "
                f"that they can: {nearest or 'none'} (other numbers), or start {shares[-1]} processes (same numbers)"
            )

    @property
    def views(self) -> int:
        """How many pictures an image gives: 2 with flips."""
        return 2 if self.flip else 1

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in N images."""
        return self.n_images // self.global_batch

    def images(self, keys: range) -> Tensor:
        """Images (b,) int64 at places of one step."""
        step, first = divmod(keys.start, self.global_batch)
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch + first
        return _order(self.seed, epoch, self.n_images)[start : start + len(keys)]

    def flips(self, keys: Tensor) -> Tensor:
        """Whether the images at places (b,) are flipped, (b,) bool."""
        if not self.flip:
            return torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
        return rng.uniform(self.seed, "flip", keys) < 0.5

    @property
    def share(self) -> range:
        """The places of a step that are this process's."""
        return range(self.global_batch * self.rank // self.world, self.global_batch * (self.rank + 1) // self.world)

    @property
    def micro_batches_per_step(self) -> int:
        """How many micro batches this process's share is cut into."""
        return -(-len(self.share) // (self.micro_batch or len(self.share)))

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This process's micro batches of one step."""
        first, stop = (step * self.global_batch + end for end in (self.share.start, self.share.stop))
        parts = data.ranges(first, stop, self.micro_batch or len(self.share))
        return [MicroBatch(keys, self.images(keys)) for keys in parts]


class CachedLatents:
    """All training latents and tokens in memory, flipped ones too: nothing is encoded twice.

    Args:
        latents: (F, N, C, H, W), F = 2 with flips and 1 without.
        tokens: (F, N, C).
        images: (F, N, 3, S, S) uint8; None where they are not needed any more.
    """

    def __init__(self, plan: BatchPlan, latents: Tensor, tokens: Tensor, images: Tensor | None = None) -> None:
        self.plan, self.latents, self.tokens = plan, latents.flatten(0, 1), tokens.flatten(0, 1)
        self.images = None if images is None else images.flatten(0, 1)

    def batches(self, first_step: int, stop_step: int) -> Iterator[tuple[MicroBatch, Inputs]]:
        """Yield the micro batches of steps [first_step, stop_step) with their inputs."""
        device = self.latents.device
        for step in range(first_step, stop_step):
            for micro in self.plan.micro_batches(step):
                rows = micro.indices.to(device, non_blocking=True)
                rows = rows + self.plan.n_images * self.plan.flips(micro.key_tensor(device))
                latents, tokens = self.latents.index_select(0, rows), self.tokens.index_select(0, rows)
                images = None if self.images is None else data.to_float(self.images.index_select(0, rows), device)
                yield micro, Inputs(latents, tokens, images)


class EncodedImages:
    """Images read, augmented and encoded as the steps come.

    Args:
        listing: listing file.
        size: side of the crop, pixels.
        encode: the frozen encoder.
        workers: image-reading processes.
    """

    def __init__(
        self, plan: BatchPlan, listing: str | Path, size: int, encode: Encode, device: torch.device, workers: int
    ) -> None:
        self.plan, self.listing, self.size, self.encode = plan, listing, size, encode
        self.device, self.workers = device, workers

    def batches(self, first_step: int, stop_step: int) -> Iterator[tuple[MicroBatch, Inputs]]:
        """Yield the micro batches of steps [first_step, stop_step) with their inputs."""
        pin = self.device.type == "cuda"
        indices = _ImageIndices(self.plan, first_step, stop_step)
        loaded = data.image_batches(self.listing, self.size, indices, self.workers, pin)
        for step in range(first_step, stop_step):
            for micro in self.plan.micro_batches(step):
                _, images = next(loaded)
                images = data.to_float(images, self.device)
                flips = self.plan.flips(micro.key_tensor(self.device))
                images = torch.where(flips[:, None, None, None], images.flip(-1), images)
                yield micro, Inputs(*self.encode(images), images)


class _ImageIndices:
    """The image indices of the micro batches in order, made as they are asked for: a run has millions."""

    def __init__(self, plan: BatchPlan, first_step: int, stop_step: int) -> None:
        self.plan, self.steps = plan, range(first_step, stop_step)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for micro in self.plan.micro_batches(step):
                yield micro.indices.tolist()


@memory.explained("Lower latent_cache_gb (0 encodes at every step); it changes no result")
def open_batches(
    plan: BatchPlan,
    listing: str | Path,
    size: int,
    encode: Encode,
    latent_shape: tuple[int, int, int],
    ranks: Ranks,
    *,
    stage: str,
    workers: int,
    cache_gb: float,
    keep_images: bool = False,
) -> CachedLatents | EncodedImages:
    """Encode once and keep everything if that fits into ``cache_gb`` (10^9 bytes per process), or else at every step.

    Args:
        size: side of the crop, pixels.
        latent_shape: (C, H, W) of ``encode``'s latents.
        stage: name for the progress line.
        keep_images: whether a cache holds the images too.

    Raises:
        ValueError: memory ran out.
    """
    channels, height, width = latent_shape
    per_view = channels * (height * width + 1) * 4 + 3 * size * size * keep_images
    if plan.n_images * plan.views * per_view > cache_gb * 1e9:
        return EncodedImages(plan, listing, size, encode, ranks.device, workers)
    views = (plan.views, plan.n_images)
    latents = torch.zeros(*views, *latent_shape, device=ranks.device)
    tokens = torch.zeros(*views, channels, device=ranks.device)
    kept = torch.zeros(*views, 3, size, size, device=ranks.device, dtype=torch.uint8) if keep_images else None
    # Fixed ranges of the listing, so that the latents do not depend on where a run was restarted.
    mine = data.ranges(0, plan.n_images, _CACHE_BATCH)[ranks.rank :: ranks.world]
    batches = data.image_batches(listing, size, mine, workers, pin=ranks.device.type == "cuda")
    progress = Progress(f"{stage}: encoding once", sum(map(len, mine)), "images", enabled=ranks.is_main)
    with progress, torch.no_grad():
        for rows, (_, images) in zip(mine, batches, strict=True):
            place = slice(rows.start, rows.stop)
            images = images.to(ranks.device)
            for view, seen in enumerate((images, images.flip(-1))[: plan.views]):
                latents[view, place], tokens[view, place] = encode(data.to_float(seen, ranks.device))
                if kept is not None:
                    kept[view, place] = seen
            progress.advance(len(rows))
    # Every row is 0 in all processes but one, so the sum is that one's row, exactly.
    for tensor in (latents, tokens, kept):
        if tensor is not None:
            ranks.sum(tensor)
    return CachedLatents(plan, latents, tokens, kept)
