"""Memory-mapped rows of a large zarr array, read one batch at a time or copied to a tensor as a whole."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MAPS_KEPT = 16384  # Linux allows a process 65,530
_STAGED_BYTES = 64 << 20


class MappedRows:
    """Rows of a zarr array (K, *shape) float32 that has one uncompressed chunk per row.

    The chunk files are mapped into memory, so the processes of a machine share their pages and the system can evict
    unused ones. This is ten times faster than selecting single rows through zarr.

    Args:
        array: zarr array in a local store.

    Raises:
        ValueError: the array has another dtype or layout and can't be mapped.
    """

    def __init__(self, array: Any) -> None:
        codecs = [type(codec).__name__ for codec in array.metadata.codecs]
        if array.dtype != np.dtype("<f4") or array.chunks != (1, *array.shape[1:]) or codecs != ["BytesCodec"]:
            raise ValueError(
                f"'{array.path}' has dtype {array.dtype}, chunks {array.chunks} and codecs {', '.join(codecs)}; only "
                "uncompressed float32 with one chunk per row can be mapped"
            )
        self.shape = tuple(array.shape)
        self._folder, self._key = Path(array.store.root) / array.path, array.metadata.encode_chunk_key
        self._origin = (0,) * (len(self.shape) - 1)
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def gather(self, rows: Tensor, pinned: bool = False) -> Tensor:
        """Return a copy of the rows numbered (B,) int64, as float32 (B, *shape) on the CPU.

        Args:
            rows: on the CPU.
            pinned: whether the copy is in pinned memory, from where it reaches a GPU without waiting.

        Raises:
            ValueError: a row is missing or truncated.
        """
        result = torch.empty((len(rows), *self.shape[1:]), pin_memory=pinned)
        values = result.numpy()
        for i, row in enumerate(rows.tolist()):
            values[i] = self._map(row)
        return result

    def check(self) -> None:
        """Check that every row's file exists and has the right size.

        Raises:
            ValueError: a row is missing or truncated.
        """
        for row in range(len(self)):
            self._file(row)

    def copy_to(self, result: Tensor) -> None:
        """Copy all rows into ``result`` (K, *shape), which may have any dtype and device.

        On the CPU each row is copied, and if necessary rounded, directly from its mapped pages. For a GPU, rows go
        through a small pinned buffer. No row stays mapped.

        Raises:
            ValueError: a row is missing or truncated.
        """
        if result.device.type == "cpu":
            for row in range(len(self)):
                result[row].copy_(self._tensor(row))
            return
        block = max(1, _STAGED_BYTES // (result[0].numel() * result.element_size()))
        staged = torch.empty((block, *self.shape[1:]), dtype=result.dtype, pin_memory=result.device.type == "cuda")
        for start in range(0, len(self), block):
            stop = min(start + block, len(self))
            for row in range(start, stop):
                staged[row - start].copy_(self._tensor(row))
            result[start:stop] = staged[: stop - start]

    def _tensor(self, row: int) -> Tensor:
        # Copy-on-write: PyTorch warns about read-only arrays.
        return torch.from_numpy(np.memmap(self._file(row), np.float32, "c", shape=self.shape[1:]))

    def _file(self, row: int) -> Path:
        """Return the path of a row's file after checking its size."""
        path = self._folder / self._key((row, *self._origin))
        expected = 4 * math.prod(self.shape[1:])
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            found = None
        if found != expected:
            state = "is missing" if found is None else f"has {found:,} bytes, not {expected:,}"
            raise ValueError(f"row {row} ('{path}') {state}")
        return path

    def _map(self, row: int) -> np.ndarray:
        if row not in self._maps:
            mapped = np.memmap(self._file(row), np.float32, "r", shape=self.shape[1:])
            if len(self._maps) >= _MAPS_KEPT:
                return mapped
            self._maps[row] = mapped
        return self._maps[row]
