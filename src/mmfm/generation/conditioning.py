"""What generated images are drawn from: modes and class labels as functions of (seed, number of the image)."""

import torch
from torch import Tensor

from mmfm.config.choices import LABEL_DRAWS, MODE_DRAWS
from mmfm.infra import rng


def mode_uniforms(seed: int, numbers: Tensor, draw: str, purpose: str = "sample/mode") -> Tensor:
    """Uniforms from which the modes of numbered images are drawn by inverse CDF.

    Args:
        numbers: (B,) int64, numbers of the images.
        draw: ``multinomial`` draws every mode by itself; ``stratified`` covers (0, 1) evenly with consecutive numbers,
            so that every mode comes up about as often as its weight says.

    Returns:
        (B,) float64 in (0, 1).

    Raises:
        ValueError: another draw.
    """
    return MODE_DRAWS[draw].load()(seed, purpose, numbers)


def class_labels(seed: int, numbers: Tensor, num_classes: int, draw: str, purpose: str = "sample/label") -> Tensor:
    """Class labels of numbered images.

    Args:
        numbers: (B,) int64, numbers of the images.
        num_classes: L.
        draw: see :func:`equal_labels` and :func:`random_labels`.

    Returns:
        (B,) int64 in [0, L), on the numbers' device.

    Raises:
        ValueError: another draw.
    """
    return LABEL_DRAWS[draw].load()(seed, purpose, numbers, num_classes)


def random_labels(seed: int, purpose: str, numbers: Tensor, num_classes: int) -> Tensor:
    """Draw every label by itself."""
    return (rng.uniform(seed, purpose, numbers) * num_classes).long()


def equal_labels(seed: int, purpose: str, numbers: Tensor, num_classes: int) -> Tensor:
    """Give every L consecutive images, from number 0 on, each class once, in an order of their own."""
    # Orders of blocks, not of the whole set: an image's label must not depend on how many are made.
    blocks, places = numbers.cpu() // num_classes, numbers.cpu() % num_classes
    labels = torch.empty_like(places)
    for block in blocks.unique().tolist():
        own = blocks == block
        labels[own] = rng.permutation(seed, purpose, block, num_classes)[places[own]]
    return labels.to(numbers.device)
