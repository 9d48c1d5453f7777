"""Which arithmetic a network runs in: the one reading of the ``precision`` keys."""

import torch


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether a network runs in bf16 autocast: for ``bf16`` and ``reference``, and for ``auto`` on a GPU."""
    return precision in ("bf16", "reference") or (precision == "auto" and device.type == "cuda")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast of a ``precision`` key; switched off where :func:`uses_bf16` says no."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(precision, device))
