"""What one image shows of a model that no family knows: its final norm, its tokens, the parameters that it uses."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from mmfm.infra.model_folder import nearest_multiples


def image(size: int) -> Tensor:
    """Return an image that is not symmetric, (1, 3, size, size) float32."""
    return torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size)


def grid_side(tokens: int, input_size: int, patch: int, what: str) -> int:
    """Return the side of the grid of patch tokens.

    Args:
        tokens: number of tokens of an image, all kinds together.
        patch: side of a patch, pixels.
        what: the model, for error messages.

    Raises:
        ValueError: the input size is not a multiple of the patch size, or there are fewer tokens than patches.
    """
    if input_size % patch:
        raise ValueError(
            f"input_size {input_size} is not a multiple of the patch size {patch} of {what}; use "
            f"{nearest_multiples(input_size, patch)}"
        )
    side = input_size // patch
    if tokens < side * side:
        close = isqrt(tokens)
        found = f"{close} x {close}" if close * close == tokens else str(tokens)
        raise ValueError(
            f"{what} gives {found} tokens for {side} x {side} patches; give a vision transformer that keeps the "
            "square grid of its patches"
        )
    return side


@contextmanager
def watched_norms(model: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Collect every norm that runs in the block, with its output, in order."""
    seen: list[tuple[nn.Module, Tensor]] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append((module, output))

    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    hooks = [norm.register_forward_hook(keep) for norm in norms]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def drop_affine(seen: list[tuple[nn.Module, Tensor]], patches: Tensor) -> None:
    """Set weight and bias of the norm whose output the patch tokens are to one and zero; there may be none.

    Args:
        seen: norms and their outputs.
        patches: patch tokens (1, N, C).
    """
    for norm, output in reversed(seen):
        ends = output[..., -patches.shape[-2] :, :] if output.ndim == 3 else output
        if ends.shape == patches.shape and torch.equal(ends, patches):
            for name, value in (("weight", 1.0), ("bias", 0.0)):
                if isinstance(getattr(norm, name, None), Tensor):
                    getattr(norm, name).data.fill_(value)
            return


def unused_parameters(model: nn.Module, outputs: tuple[Tensor, ...]) -> set[str]:
    """Return the names of the parameters that outputs, computed with gradients, do not depend on."""
    named = dict(model.named_parameters())
    total = torch.stack([output.sum() for output in outputs]).sum()
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is None}
