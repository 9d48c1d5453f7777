"""The input of a training loop: which images a step sees, and their latents.

(seed, number of images, step) alone determine the global batch of a step. A process takes its share of the places in
it, split into micro batches, so neither the number of processes nor the micro batch size changes which images a step
sees or which random numbers they get.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmfm import data
from mmfm.autoencoder.latent_cache import Encode, ReadLatents
from mmfm.infra import rng


@dataclass(frozen=True)
class TrainingImages:
    """The images to train on, and their latents.

    Attributes:
        listing: listing file.
        size: side S of the crop, in pixels.
        encode: the frozen encoder.
        cached: takes latents from the latent cache; None: the images are encoded at every step.
        workers: image-reading processes.
        wanted: whether the images themselves are wanted.
    """

    listing: str | Path
    size: int
    encode: Encode
    cached: ReadLatents | None
    workers: int
    wanted: bool = False


class MicroBatch(NamedTuple):
    """Consecutive places in the global batch of one step.

    Attributes:
        keys: step * global_batch + position of each place; its random numbers are keyed by this.
        indices: (b,) int64, the images at these places.
    """

    keys: range
    indices: Tensor

    def key_tensor(self, device: torch.device) -> Tensor:
        """Return the keys as (b,) int64."""
        return torch.arange(self.keys.start, self.keys.stop, device=device)


class Inputs(NamedTuple):
    """Latents (b, C, H, W) and global tokens (b, C) of a micro batch's augmented images, float32.

    ``images`` (b, 3, S, S) are float32 in [0, 1]; None if nothing needs them.
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

    Each epoch visits the images in a new random order and drops a last, incomplete global batch.

    Attributes:
        seed: of the order and the flips.
        n_images: N.
        global_batch: images per step over all processes.
        rank, world: this process, and the number of processes.
        micro_batch: images per forward pass; 0 for the whole share.
        flip: flip each image horizontally with probability 1/2.

    Raises:
        ValueError: the global batch is larger than the number of images or no multiple of the number of processes.
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
        """Versions of each image: 2 with flips, else 1."""
        return 2 if self.flip else 1

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in N images."""
        return self.n_images // self.global_batch

    def images(self, keys: range) -> Tensor:
        """Return the images (b,) int64 at the given places of one step."""
        step, first = divmod(keys.start, self.global_batch)
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch + first
        return _order(self.seed, epoch, self.n_images)[start : start + len(keys)]

    def flips(self, keys: Tensor) -> Tensor:
        """Return whether the images at places (b,) are flipped, (b,) bool."""
        if not self.flip:
            return torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
        return rng.uniform(self.seed, "flip", keys) < 0.5

    @property
    def share(self) -> range:
        """This process's places in a step."""
        return range(self.global_batch * self.rank // self.world, self.global_batch * (self.rank + 1) // self.world)

    @property
    def micro_batches_per_step(self) -> int:
        """Micro batches in this process's share of a step."""
        return -(-len(self.share) // (self.micro_batch or len(self.share)))

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return this process's micro batches of one step."""
        first, stop = (step * self.global_batch + end for end in (self.share.start, self.share.stop))
        parts = data.ranges(first, stop, self.micro_batch or len(self.share))
        return [MicroBatch(keys, self.images(keys)) for keys in parts]


def epochs_after(step: int, steps_per_epoch: int) -> float:
    """Return the epochs after so many steps; an int where they are whole."""
    whole, rest = divmod(step, steps_per_epoch)
    return step / steps_per_epoch if rest else whole


class TrainingBatches:
    """The micro batches of every step with their inputs."""

    def __init__(self, plan: BatchPlan, source: TrainingImages, device: torch.device) -> None:
        self.plan, self.source, self.device = plan, source, device

    def batches(self, first_step: int, stop_step: int) -> Iterator[tuple[MicroBatch, Inputs]]:
        """Yield the micro batches of steps [first_step, stop_step) with their inputs."""
        source, plan, steps = self.source, self.plan, range(first_step, stop_step)
        # A generator, because a run has millions of micro batches.
        indices = (micro.indices.tolist() for step in steps for micro in plan.micro_batches(step))
        loaded = None
        if source.wanted or source.cached is None:
            pin = self.device.type == "cuda"
            loaded = data.image_batches(source.listing, source.size, indices, source.workers, pin)
        for step in steps:
            for micro in plan.micro_batches(step):
                flips, images = plan.flips(micro.key_tensor(torch.device("cpu"))), None
                if loaded is not None:
                    images = data.to_float(next(loaded)[1], self.device)
                    mirrored = flips.to(self.device, non_blocking=True)[:, None, None, None]
                    images = torch.where(mirrored, images.flip(-1), images)
                if source.cached is not None:
                    latents = source.cached(micro.indices, flips)
                elif images is not None:
                    latents = source.encode(images)
                yield micro, Inputs(*latents, images)
