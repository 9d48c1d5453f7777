"""Out of memory, said in the words of the configuration."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def explained(remedy: str) -> Iterator[None]:
    """Turn an allocator's error into one that says what to lower.

    Raises:
        ValueError: memory ran out; the message says ``remedy``.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Python and NumPy have a type for it, and torch one for GPUs; its CPU allocator's is RuntimeError itself.
        named = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not named and "DefaultCPUAllocator" not in str(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"out of memory ({reason}). {remedy}; what was saved before is intact") from error
