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
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and the CPU's allocator knows no better
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"out of memory ({reason}). {remedy}; what was saved before is intact") from error
