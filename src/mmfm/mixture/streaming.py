"""Rows of the token store in chunks fixed by the global index, shared out over the processes."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfm import data
from mmfm.infra.distributed import Ranks
from mmfm.mixture.workspace import Workspace, release

Read = Callable[[int, int], np.ndarray]
"""(start, stop) -> float32 (stop - start, C)."""


def finite_rows(read: Read, wanted: range) -> np.ndarray:
    """Read rows as float32 (b, C).

    Raises:
        ValueError: a value that is not finite; the message names the row.
    """
    values = np.asarray(read(wanted.start, wanted.stop), np.float32)
    finite = np.isfinite(values).all(1)
    if not finite.all():
        row = wanted.start + int(np.argmin(finite))
        raise ValueError(
            f"row {row} of the tokens (image {row} of the listing) is not finite; look at that image and "
            "at the encoder, then run extract again"
        )
    return values


class Rows:
    """This process's chunks of N rows, float32, kept on its device as far as they fit.

    At N = 1.28 million and C = 768 all rows are 3.9 GB; over 8 processes 0.5 GB each.

    Args:
        read: (start, stop) -> float32 (stop - start, C).
        n: number of rows N.
        chunk_size: rows of a chunk; chunks are fixed by the global index, whatever the number of processes.
        keep_bytes: rows kept in memory between passes, at most a quarter of what is free.
        stretch: rows that are in memory together in :meth:`stretches`, at most: whole chunks, shared out evenly.

    Attributes:
        space: memory for what passes make of a chunk.
    """

    def __init__(
        self, read: Read, n: int, chunk_size: int, ranks: Ranks, keep_bytes: float = float("inf"), stretch: int = 0
    ) -> None:
        self.n, self.ranks, self.read, self.chunk_size = n, ranks, read, chunk_size
        chunks = data.ranges(0, n, chunk_size)
        self.ranges = chunks[ranks.rank * len(chunks) // ranks.world : (ranks.rank + 1) * len(chunks) // ranks.world]
        count = -(-len(self.ranges) // max(1, stretch // chunk_size))
        # Rounded up: the first is the largest, and those that follow fit into its place.
        cuts = [-(-number * len(self.ranges) // max(1, count)) for number in range(count + 1)]
        self._stretches = [self.ranges[i:j] for i, j in itertools.pairwise(cuts)]
        self._kept: dict[int, Tensor] = {}
        self._checked: set[int] = set()
        self.space = Workspace(ranks.device)
        self._room = min(_free_memory(ranks) // 4, keep_bytes)

    @property
    def local(self) -> range:
        """Global indices of this process's rows."""
        return range(self.ranges[0].start, self.ranges[-1].stop) if self.ranges else range(0)

    def __iter__(self) -> Iterator[tuple[range, Tensor]]:
        """Yield each chunk's range of global indices and its rows (b, C) float32 on the device."""
        self.space.drop("stretch")
        release()  # what the last pass freed
        for chunks in self._stretches:
            whole = self._kept.get(chunks[0].start)
            if whole is None and self._fits(chunks):
                whole = self._load(chunks)
            for chunk in chunks:
                if whole is None:
                    yield chunk, torch.as_tensor(self._read(chunk), device=self.ranks.device)
                else:
                    yield chunk, whole[chunk.start - chunks[0].start : chunk.stop - chunks[0].start]

    def stretches(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows in stretches of whole chunks: where they lie in :attr:`local`, and (s, C) float32.

        A stretch that is not kept is overwritten by the next.
        """
        release()
        for chunks in self._stretches:
            start = chunks[0].start
            whole = self._kept.get(start)
            yield (
                slice(start - self.local.start, chunks[-1].stop - self.local.start),
                self._load(chunks) if whole is None else whole,
            )

    def _read(self, chunk: range) -> np.ndarray:
        """Read a chunk; only the first time is it searched for values that are not finite."""
        if chunk.start in self._checked:
            return np.asarray(self.read(chunk.start, chunk.stop), np.float32)
        values = finite_rows(self.read, chunk)
        self._checked.add(chunk.start)
        return values

    def _fits(self, chunks: list[range]) -> bool:
        """Whether a stretch would fit into what may be kept; the width is known from the first row."""
        if not hasattr(self, "_row_bytes"):
            self._row_bytes = finite_rows(self.read, range(chunks[0].start, chunks[0].start + 1)).nbytes
        return (chunks[-1].stop - chunks[0].start) * self._row_bytes <= self._room

    def _load(self, chunks: list[range]) -> Tensor:
        """Read a stretch, and keep it if there is room; otherwise the next will lie in its place."""
        start, keep, result = chunks[0].start, self._fits(chunks), None
        for chunk in chunks:
            values = torch.from_numpy(self._read(chunk))
            if result is None:
                shape = (chunks[-1].stop - start, values.shape[1])
                new = torch.empty(shape, device=self.ranks.device) if keep else None
                result = self.space.take("stretch", values.dtype, *shape) if new is None else new
            result[chunk.start - start : chunk.stop - start] = values
        if keep:
            self._room -= result.nbytes
            self._kept[start] = result
        return result


def _free_memory(ranks: Ranks) -> int:
    if ranks.device.type == "cuda":
        return torch.cuda.mem_get_info(ranks.device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # what the page cache holds can be had, too
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        return 1024 * int(line.split()[1]) // ranks.world
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks.world
