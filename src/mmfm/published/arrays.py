"""Arrays of a pickle, in memory or left in the file, where blocks of rows are mapped when they are read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Extent:
    """Bytes that stay in the file.

    Attributes:
        path: the file.
        offset, length: where they are, bytes.
    """

    path: Path
    offset: int
    length: int

    def __len__(self) -> int:
        return self.length


@dataclass
class StoredArray:
    """An array of a pickle, in memory or in the file.

    Attributes:
        shape: as of a NumPy array.
        dtype: a number type, little-endian.
        fortran: whether its first axis varies fastest.
        content: its bytes.
    """

    shape: tuple[int, ...] = ()
    dtype: np.dtype = field(default_factory=lambda: np.dtype("u1"))
    fortran: bool = False
    content: bytes | Extent = b""

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return a copy of rows ``start`` to ``stop - 1``; only these stay in memory."""
        return np.array(self._view()[start:stop])

    def load(self) -> np.ndarray:
        """Return a copy of the whole array."""
        return np.array(self._view())

    def _view(self) -> np.ndarray:
        order: Any = "F" if self.fortran else "C"
        if isinstance(self.content, Extent):
            return np.memmap(self.content.path, self.dtype, "r", self.content.offset, self.shape, order)
        return np.frombuffer(self.content, self.dtype).reshape(self.shape, order=order)
