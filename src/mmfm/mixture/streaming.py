"""Rows of the token store in chunks fixed by the global index, divided over the processes."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfm import data
from mmfm.infra.distributed import Ranks, processes_here
from mmfm.mixture.workspace import Workspace, trim_heap

Read = Callable[[int, int], np.ndarray]
"""Function of (start, stop) that returns rows [start, stop), (stop - start, C) float32."""


def finite_rows(read: Read, wanted: range) -> np.ndarray:
    """Read rows as float32 (b, C).

    Raises:
        ValueError: a value is not finite.
    """
    values = np.asarray(read(wanted.start, wanted.stop), np.float32)
    finite = np.isfinite(values).all(1)
    if not finite.all():
        row = wanted.start + int(np.argmin(finite))
        raise ValueError(
            f"row {row} of the tokens (image {row} of the listing) is not finite; check that image and the encoder, "
            "then run extract again"
        )
    return values


class Rows:
    """This process's share of N rows, float32, cached on its device as far as memory allows.

    Rows are read in *chunks*, which are fixed by the global index and do not depend on the number of processes. Several
    consecutive chunks form a *block*, which :meth:`blocks` holds in memory as a whole. All rows of ImageNet (N = 1.28
    million, C = 768) take 3.9 GB.

    Args:
        read: function of (start, stop) that returns rows [start, stop), (stop - start, C) float32.
        n: number of rows N of all processes.
        chunk_size: rows in a chunk.
        keep_bytes: most memory to use for rows cached between passes; never more than a quarter of what is free.
        block_rows: most rows in a block (but at least one chunk); blocks have about the same number of chunks.

    Attributes:
        workspace: buffers for intermediate results of a chunk.
    """

    def __init__(
        self, read: Read, n: int, chunk_size: int, ranks: Ranks, keep_bytes: float = float("inf"), block_rows: int = 0
    ) -> None:
        self.n, self.ranks, self.read, self.chunk_size = n, ranks, read, chunk_size
        chunks = data.ranges(0, n, chunk_size)
        self.chunks = chunks[ranks.rank * len(chunks) // ranks.world : (ranks.rank + 1) * len(chunks) // ranks.world]
        count = -(-len(self.chunks) // max(1, block_rows // chunk_size))
        # Rounding up makes the first block the largest, so that all others fit into its buffer.
        cuts = [-(-number * len(self.chunks) // max(1, count)) for number in range(count + 1)]
        self._blocks = [self.chunks[i:j] for i, j in itertools.pairwise(cuts)]
        self._kept: dict[int, Tensor] = {}
        self._checked: set[int] = set()
        self.workspace = Workspace(ranks.device)
        self._room = min(_free_memory(ranks) // 4, keep_bytes)

    @property
    def local(self) -> range:
        """Global indices of this process's rows."""
        return range(self.chunks[0].start, self.chunks[-1].stop) if self.chunks else range(0)

    def position(self, chunk: range) -> slice:
        """Return where the rows of a chunk lie in an array over :attr:`local`."""
        return slice(chunk.start - self.local.start, chunk.stop - self.local.start)

    def __iter__(self) -> Iterator[tuple[range, Tensor]]:
        """Yield the global indices of each chunk and its rows (b, C) float32 on the device."""
        self.workspace.drop("block")
        trim_heap()  # memory freed since the last pass
        for chunks in self._blocks:
            block = self._kept.get(chunks[0].start)
            if block is None and self._fits(chunks):
                block = self._load(chunks)
            for chunk in chunks:
                if block is None:
                    yield chunk, torch.as_tensor(self._read(chunk), device=self.ranks.device)
                else:
                    yield chunk, block[chunk.start - chunks[0].start : chunk.stop - chunks[0].start]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield each block's position in an array over :attr:`local`, and its rows (s, C) float32 on the device.

        A block that is not cached is overwritten by the next one.
        """
        trim_heap()
        for chunks in self._blocks:
            block = self._kept.get(chunks[0].start)
            position = self.position(range(chunks[0].start, chunks[-1].stop))
            yield position, self._load(chunks) if block is None else block

    def _read(self, chunk: range) -> np.ndarray:
        """Read a chunk, checking the first time that its values are finite."""
        if chunk.start in self._checked:
            return np.asarray(self.read(chunk.start, chunk.stop), np.float32)
        values = finite_rows(self.read, chunk)
        self._checked.add(chunk.start)
        return values

    def _fits(self, chunks: list[range]) -> bool:
        """Return whether there is room to cache a block; the first call reads a row to learn its size."""
        if not hasattr(self, "_row_bytes"):
            self._row_bytes = finite_rows(self.read, range(chunks[0].start, chunks[0].start + 1)).nbytes
        return (chunks[-1].stop - chunks[0].start) * self._row_bytes <= self._room

    def _load(self, chunks: list[range]) -> Tensor:
        """Read a block, and cache it if there is room; otherwise read it into the workspace."""
        start, keep, block = chunks[0].start, self._fits(chunks), torch.empty(0)
        for chunk in chunks:
            values = torch.from_numpy(self._read(chunk))
            if chunk.start == start:
                shape = (chunks[-1].stop - start, values.shape[1])
                if keep:
                    block = torch.empty(shape, device=self.ranks.device)
                else:
                    block = self.workspace.empty("block", values.dtype, *shape)
            block[chunk.start - start : chunk.stop - start] = values
        if keep:
            self._room -= block.nbytes
            self._kept[start] = block
        return block


def _free_memory(ranks: Ranks) -> int:
    """Return this process's share of the free memory, in bytes."""
    if ranks.device.type == "cuda":
        return torch.cuda.mem_get_info(ranks.device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # unlike free pages, MemAvailable includes the page cache
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        return 1024 * int(line.split()[1]) // processes_here()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes_here()
