"""What generated images are drawn from: modes and class labels as functions of (seed, number of the image)."""

import torch
from torch import Tensor

from mmfm.infra import rng

MODE_DRAWS = ("multinomial", "stratified")
LABEL_DRAWS = ("equal", "random")


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
    if draw not in MODE_DRAWS:
        raise ValueError(f"mode_draw is '{draw}'; it must be one of {', '.join(MODE_DRAWS)}")
    return rng.uniform(seed, purpose, numbers) if draw == "multinomial" else rng.stratified(seed, purpose, numbers)


def class_labels(seed: int, numbers: Tensor, num_classes: int, draw: str, purpose: str = "sample/label") -> Tensor:
    """Class labels of numbered images.

    Args:
        numbers: (B,) int64, numbers of the images.
        num_classes: L.
        draw: ``equal`` gives every L consecutive images, from number 0 on, each class once, in an order of their own;
            ``random`` draws every label by itself.

    Returns:
        (B,) int64 in [0, L), on the numbers' device.

    Raises:
        ValueError: another draw.
    """
    if draw not in LABEL_DRAWS:
        raise ValueError(f"label_draw is '{draw}'; it must be one of {', '.join(LABEL_DRAWS)}")
    if draw == "random":
        return (rng.uniform(seed, purpose, numbers) * num_classes).long()
    # Orders of blocks, not of the whole set: an image's label must not depend on how many are made.
    blocks, places = numbers.cpu() // num_classes, numbers.cpu() % num_classes
    labels = torch.empty_like(places)
    for block in blocks.unique().tolist():
        own = blocks == block
        labels[own] = rng.permutation(seed, purpose, block, num_classes)[places[own]]
    return labels.to(numbers.device)
