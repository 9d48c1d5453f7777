"""Buffers that are reused from chunk to chunk: allocating new memory for each would take as long as the arithmetic."""

import ctypes
import math

import torch
from torch import Tensor


class Workspace:
    """Named buffers on a device, each of which grows to the largest size requested.

    Args:
        device: where the buffers are allocated.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def empty(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return an uninitialised tensor. It shares its memory with earlier ones of the same name and dtype."""
        size, key = math.prod(shape), (name, dtype)
        if key not in self._flat or self._flat[key].numel() < size:
            self._flat.pop(key, None)  # free the old buffer before allocating the new one
            self._flat[key] = torch.empty(size, dtype=dtype, device=self.device)
        return self._flat[key][:size].view(shape)

    def gather_rows(self, name: str, x: Tensor, index: Tensor) -> Tensor:
        """Return x[index] for x (n, C) and an index of any shape; several times faster than advanced indexing."""
        result = self.empty(name, x.dtype, *index.shape, x.shape[1])
        torch.index_select(x, 0, index.flatten(), out=result.view(-1, x.shape[1]))
        return result

    def drop(self, name: str) -> None:
        """Free the buffers of one name."""
        for key in [key for key in self._flat if key[0] == name]:
            del self._flat[key]

    def clear(self) -> None:
        """Free all buffers."""
        self._flat.clear()


def trim_heap() -> None:
    """Return freed memory to the operating system; glibc would keep most of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # missing from other C libraries
    if trim is not None:
        trim(0)
