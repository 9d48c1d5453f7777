"""Copies to a GPU for which the host does not wait."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on ``device``. From the CPU it goes through pinned memory, in parallel with the GPU's work."""
    on_host = tensor.device.type == "cpu"
    if on_host and device.type == "cuda":
        tensor = tensor.pin_memory()  # itself if it is pinned
    # In the other direction the host would read before the values are there.
    return tensor.to(device, non_blocking=on_host)
