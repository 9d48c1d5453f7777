"""The meaning of the ``precision`` keys, and matrix products in exact float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether a ``precision`` means bf16 autocast: ``bf16``, ``reference``, and ``auto`` on a GPU."""
    return precision in ("bf16", "reference") or (precision == "auto" and device.type == "cuda")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context for a ``precision``; disabled unless :func:`uses_bf16`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(precision, device))


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """Multiply float32 matrices exactly in the block, without autocast, TF32 or bfloat16."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # set at run time
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
