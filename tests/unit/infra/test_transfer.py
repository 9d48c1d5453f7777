"""Copies for which the host does not wait."""

import pytest
import torch

from mmfm.infra.transfer import to_device


class Elsewhere:
    """Stands for a tensor on some device, and notes how it is copied."""

    def __init__(self, device: str, pinned: bool = False) -> None:
        self.device, self.pinned = torch.device(device), pinned

    def pin_memory(self) -> "Elsewhere":
        return Elsewhere("cpu", True)

    def to(self, device: torch.device, non_blocking: bool) -> tuple[str, bool, bool]:
        return device.type, self.pinned, non_blocking


@pytest.mark.parametrize(
    ("start", "end", "pinned", "non_blocking"),
    [("cpu", "cuda", True, True), ("cuda", "cpu", False, False), ("cuda", "cuda", False, False)],
)
def test_only_copies_to_a_gpu_do_not_block(start, end, pinned, non_blocking):
    """The host would read what a copy in the other direction has not written yet."""
    assert to_device(Elsewhere(start), torch.device(end)) == (end, pinned, non_blocking)


def test_a_tensor_that_is_there_is_the_same():
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
