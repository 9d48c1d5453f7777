"""Which arithmetic a network runs in, the one reading of the ``precision`` keys; and products that must be exact."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether a network runs in bf16 autocast: for ``bf16`` and ``reference``, and for ``auto`` on a GPU."""
    return precision in ("bf16", "reference") or (precision == "auto" and device.type == "cuda")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast of a ``precision`` key; switched off where :func:`uses_bf16` says no."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(precision, device))


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """Multiply float32 matrices in float32 inside the block: no autocast, TF32 or bfloat16; restored afterwards."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
