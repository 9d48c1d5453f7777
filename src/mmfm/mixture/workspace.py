"""Memory that the chunks of a pass share: fresh pages for every chunk would take as long as its products."""

import ctypes
import math

import torch
from torch import Tensor


class Workspace:
    """Named buffers on a device that grow to what was asked of them.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return an uninitialised tensor; what was taken before by this name must no longer be needed."""
        size, key = math.prod(shape), (name, dtype)
        if key not in self._flat or self._flat[key].numel() < size:
            self._flat.pop(key, None)  # before the larger one is there
            self._flat[key] = torch.empty(size, dtype=dtype, device=self.device)
        return self._flat[key][:size].view(shape)

    def drop(self, name: str) -> None:
        """Forget the buffers of a name."""
        for key in [key for key in self._flat if key[0] == name]:
            del self._flat[key]

    def clear(self) -> None:
        """Forget all buffers."""
        self._flat.clear()

    def rows(self, name: str, rows: Tensor, index: Tensor) -> Tensor:
        """Return rows[index] for rows (n, C) and any index; as a flat selection it is several times faster."""
        result = self.take(name, rows.dtype, *index.shape, rows.shape[1])
        torch.index_select(rows, 0, index.flatten(), out=result.view(-1, rows.shape[1]))
        return result


def release() -> None:
    """Give memory that was freed back to the system; the C library would keep most of it for a smaller use later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; of this process, so nothing is searched for
    if trim is not None:
        trim(0)
