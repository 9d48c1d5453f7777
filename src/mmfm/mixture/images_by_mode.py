"""How the spatial mixture's images are sorted by mode and divided into batches."""

from dataclasses import dataclass

import numpy as np

from mmfm import data

GROUP_BATCHES = 4
"""Batches in a group of small modes. Larger groups have fewer partial batches, but are harder to balance over ranks."""


@dataclass(frozen=True)
class ImagesByMode:
    """Which images are encoded together, as a function of labels and batch size only, not of the work left to do.

    Images are sorted by mode, then by index. Consecutive modes form groups, the units dealt to processes. A group is
    divided into batches regardless of its modes, so that batches are full even with 8192 modes of 156 images each.

    Attributes:
        order: (N,) int64, the image at each position.
        offsets: (K + 1,) int64; mode k occupies positions [offsets[k], offsets[k + 1]).
        groups: consecutive ranges of modes that cover all modes.
        batch_size: images in a batch; the last batch of a group may have fewer.
    """

    order: np.ndarray
    offsets: np.ndarray
    groups: list[range]
    batch_size: int

    @classmethod
    def make(cls, labels: np.ndarray, n_components: int, batch_size: int) -> "ImagesByMode":
        """Sort images by their labels (N,), each in [0, n_components)."""
        offsets = np.zeros(n_components + 1, np.int64)
        np.cumsum(np.bincount(labels, minlength=n_components), out=offsets[1:])
        groups, first = [], 0
        for k in range(n_components):
            if offsets[k + 1] - offsets[first] >= GROUP_BATCHES * batch_size or k == n_components - 1:
                groups.append(range(first, k + 1))
                first = k + 1
        return cls(np.argsort(labels, kind="stable"), offsets, groups, batch_size)

    def batches(self, group: range, done: set[int]) -> list[range]:
        """Return the batches of a group, as ranges of positions, that contain images of modes not in ``done``."""
        batches = data.ranges(int(self.offsets[group.start]), int(self.offsets[group.stop]), self.batch_size)
        return [batch for batch in batches if not done.issuperset(self.modes(batch))]

    def modes(self, batch: range) -> list[int]:
        """Return the modes that have images at the given positions, in ascending order."""
        first = int(np.searchsorted(self.offsets, batch.start, side="right")) - 1
        last = int(np.searchsorted(self.offsets, batch.stop, side="left"))
        return [k for k in range(first, last) if self.offsets[k] < self.offsets[k + 1]]
