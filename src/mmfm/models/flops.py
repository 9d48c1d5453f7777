"""The networks' operations per image, forward, by formulas. Pure arithmetic, no PyTorch.

A multiplication and an addition count as two operations. Only products count, those of attention included; tests hold
the formulas to PyTorch's own counts. A training step takes three times as many: the backward pass computes the
gradients of both factors of every product.
"""

from typing import Protocol

from mmfm.config import Decoder


class Sizes(Protocol):
    """Widths and depths of the encoder and the head of a DiTDH."""

    @property
    def hidden_size(self) -> tuple[int, int]:
        """Widths."""

    @property
    def depth(self) -> tuple[int, int]:
        """Numbers of blocks."""


def transformer_flops(width: int, depth: int, tokens: int, inner: int, maps: int = 2) -> float:
    """Operations of a transformer with ``maps`` MLP matrices per block, of size width x ``inner``."""
    return depth * tokens * (8 * width**2 + 2 * maps * width * inner + 4 * tokens * width)


def dit_flops(model: Sizes, tokens: int, channels: int) -> float:
    """Operations of a DiTDH; the head blocks compute their modulation for every token."""
    (first, second), flops = model.hidden_size, 0.0
    for index, (width, depth) in enumerate(zip(model.hidden_size, model.depth, strict=True)):
        flops += transformer_flops(width, depth, tokens, 8 * width // 3, maps=3)
        flops += depth * 12 * width**2 * (tokens if index else 1)
    projected = first * second if first != second else 0
    ends = channels * (first + 2 * second) + projected + 2 * second**2
    return flops + 2 * tokens * ends + 2 * first * (512 + first)


def decoder_flops(decoder: Decoder, channels: int, tokens: int, patch: int) -> float:
    """Operations of the decoder; the class token goes through the output layer, too.

    Args:
        channels, tokens: of a latent.
        patch: side in pixels of a token's patch.
    """
    width, positions = decoder.hidden_size, tokens + 1
    blocks = transformer_flops(width, decoder.num_layers, positions, decoder.intermediate_size)
    return blocks + 2 * width * (tokens * channels + positions * 3 * patch**2)
