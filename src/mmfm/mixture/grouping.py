"""How the images of the spatial mixture are sorted by mode and cut into batches."""

from dataclasses import dataclass

import numpy as np

from mmfm import data

GROUP_BATCHES = 4
"""Batches that a group of small modes fills: the larger, the fewer part-filled batches, and the coarser the deal."""


@dataclass(frozen=True)
class ImagesByMode:
    """Which images are encoded together. A function of the labels and the batch size, never of what is left to do.

    The images are sorted by mode, then by index. Consecutive modes form groups; a group is cut into batches without
    regard to its modes, so that 8192 modes of 156 images fill their batches. Groups are what processes are dealt.

    Attributes:
        order: (N,) int64, image at every position.
        offsets: (K + 1,) int64, the positions of mode k are [offsets[k], offsets[k + 1]).
        groups: ranges of modes, in order; together all modes.
        batch_size: images of a batch; fewer in the last one of a group.
    """

    order: np.ndarray
    offsets: np.ndarray
    groups: list[range]
    batch_size: int

    @classmethod
    def make(cls, labels: np.ndarray, n_components: int, batch_size: int) -> "ImagesByMode":
        """Sort the images of labels (N,) in [0, n_components)."""
        offsets = np.zeros(n_components + 1, np.int64)
        np.cumsum(np.bincount(labels, minlength=n_components), out=offsets[1:])
        groups, first = [], 0
        for k in range(n_components):
            if offsets[k + 1] - offsets[first] >= GROUP_BATCHES * batch_size or k == n_components - 1:
                groups.append(range(first, k + 1))
                first = k + 1
        return cls(np.argsort(labels, kind="stable"), offsets, groups, batch_size)

    def batches(self, group: range, done: set[int]) -> list[range]:
        """Return the positions of those batches of a group that hold images of modes not in ``done``."""
        needed = []
        for batch in data.ranges(int(self.offsets[group.start]), int(self.offsets[group.stop]), self.batch_size):
            if any(k not in done for k in self.modes(batch)):
                needed.append(batch)
        return needed

    def modes(self, batch: range) -> list[int]:
        """Return the modes that have images at the given positions, ascending."""
        first = int(np.searchsorted(self.offsets, batch.start, side="right")) - 1
        last = int(np.searchsorted(self.offsets, batch.stop, side="left"))
        return [k for k in range(first, last) if self.offsets[k] < self.offsets[k + 1]]
