"""Out-of-memory errors that name the key to change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def explained(remedy: str) -> Iterator[None]:
    """Turn out-of-memory errors in the block into errors with a remedy.

    Raises:
        ValueError: memory ran out; the message ends with ``remedy``.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Python and NumPy raise MemoryError, torch its own type on GPUs, but a plain RuntimeError on the CPU.
        named = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not named and "DefaultCPUAllocator" not in str(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"out of memory ({reason}). {remedy}; what was saved before is intact") from error
