"""The meaning of the ``precision`` keys, products in full float32, and deterministic algorithms."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether a ``precision`` means bf16 autocast: ``bf16``, ``reference``, and ``auto`` on a GPU."""
    return precision in ("bf16", "reference") or (precision == "auto" and device.type == "cuda")


def resolved(precision: str, device: torch.device) -> str:
    """Return what a ``precision`` is on a device: ``float32``, ``bf16`` or ``reference``."""
    return precision if precision == "reference" else "bf16" if uses_bf16(precision, device) else "float32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context for a ``precision``; disabled unless :func:`uses_bf16`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(precision, device))


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """Compute products and convolutions of float32 tensors in full precision in the block, whatever the caller allows.

    That is, without autocast, TF32 or bfloat16. Used wherever posteriors, EM or a detector's features are computed, and
    latents by default. PyTorch's older switches (``allow_tf32``) can't be read in the block, and are unchanged after
    it.
    """
    with _products("ieee"), torch.autocast(device_type, enabled=False):
        yield


@contextmanager
def encoding(precision: str, device_type: str) -> Iterator[None]:
    """Compute with an encoder's precision in the block, whatever the caller allows.

    Args:
        precision: ``float32``, full; ``tf32``, float32 with products and convolutions in TF32 on a GPU that has it
            (elsewhere full); or ``bf16``, autocast.
    """
    with (
        _products("tf32" if precision == "tf32" and device_type == "cuda" else "ieee"),
        torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        yield


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Set how products and convolutions of float32 tensors are computed in the block: ``ieee`` or ``tf32``."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    # These attributes are set at run time.
    backends = (torch.backends.cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = precision
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def use_deterministic_algorithms() -> None:
    """Choose algorithms that repeat their results to the last bit on the same GPU, for the rest of the process.

    What has no deterministic form raises RuntimeError.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)


@contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """Choose algorithms of cuDNN that repeat their results to the last bit, in the block."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def known_to_repeat() -> Iterator[None]:
    """Allow operations in the block that PyTorch refuses among deterministic algorithms, although they repeat here."""
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if strict:
        torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        if strict:
            torch.use_deterministic_algorithms(True)
