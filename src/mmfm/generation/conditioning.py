"""Modes and class labels of generated images, as functions of the seed and the image number."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmfm.config.choices import LABEL_DRAWS, MODE_DRAWS
from mmfm.infra import rng
from mmfm.mixture.gaussian import draw_from_weights

BY_WEIGHTS = "k ~ mixture weights, "
"""What ``samples.json`` says of drawn modes, before the kind of draw."""


def mode_uniforms(seed: int, numbers: Tensor, draw: str, purpose: str = "sample/mode") -> Tensor:
    """Return the uniform numbers from which the images' modes are drawn by inverse CDF.

    Args:
        numbers: (B,) int64, image numbers.
        draw: ``multinomial`` draws modes independently; ``stratified`` spreads the uniforms of consecutive images
            evenly over (0, 1), so that the frequencies of the modes match their weights closely.

    Returns:
        (B,) float64 in (0, 1).

    Raises:
        ValueError: unknown ``draw``.
    """
    return MODE_DRAWS[draw].load()(seed, purpose, numbers)


def drawn_modes(samples: Mapping[str, Any], weights: Tensor) -> Tensor:
    """Return the modes of finished images, drawn again as the sampler drew them.

    Args:
        samples: what ``samples.json`` says of the images.
        weights: (K,), of the spatial mixture.

    Returns:
        (n,) int64 on the CPU, the mode of every image.

    Raises:
        ValueError: the images were not drawn from the modes of such a mixture.
    """
    draw = str(samples.get("mode_draw")).removeprefix(BY_WEIGHTS)
    if draw not in MODE_DRAWS or samples.get("n_modes") != len(weights):
        raise ValueError(
            f"samples.json describes images of the setting '{samples.get('setting')}' with {samples.get('n_modes')} "
            f"modes, drawn as '{samples.get('mode_draw')}', not from this mixture's {len(weights)}; run sample again"
        )
    uniforms = mode_uniforms(samples["seed"], torch.arange(samples["n_images"]), draw)
    return draw_from_weights(weights.double().cpu(), uniforms)


def class_labels(seed: int, numbers: Tensor, num_classes: int, draw: str, purpose: str = "sample/label") -> Tensor:
    """Draw the images' class labels.

    Args:
        numbers: (B,) int64 on the CPU, image numbers.
        num_classes: L.
        draw: ``equal`` (:func:`equal_labels`) or ``random`` (:func:`random_labels`).

    Returns:
        (B,) int64 in [0, L), on the CPU.

    Raises:
        ValueError: unknown ``draw``.
    """
    return LABEL_DRAWS[draw].load()(seed, purpose, numbers, num_classes)


def random_labels(seed: int, purpose: str, numbers: Tensor, num_classes: int) -> Tensor:
    """Draw labels independently and uniformly."""
    return (rng.uniform(seed, purpose, numbers) * num_classes).long()


def equal_labels(seed: int, purpose: str, numbers: Tensor, num_classes: int) -> Tensor:
    """Give each class once to every block of L consecutive images, in a random order per block."""
    # Blocks, because an image's label must not depend on the number of images.
    blocks, places = numbers // num_classes, numbers % num_classes
    labels = torch.empty_like(places)
    for block in blocks.unique().tolist():
        own = blocks == block
        labels[own] = rng.permutation(seed, purpose, block, num_classes)[places[own]]
    return labels
