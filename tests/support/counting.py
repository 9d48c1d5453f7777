"""What PyTorch counts of a model without memory: operations and stored activations."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mmfm.config import Model
from mmfm.models.dit import DiT, DiTConfig


def sizes(model: Model, grid: int, channels: int) -> DiTConfig:
    """Return the sizes of an unconditional DiTDH on latents (channels, grid, grid)."""
    return DiTConfig(grid, 1, channels, model.hidden_size, model.depth, model.num_heads, 0, 0.0)


def operations(config: DiTConfig, batch: int = 1) -> tuple[float, float]:
    """Return the operations per image of the forward pass, and of forward and backward pass.

    ``torch.utils.flop_counter`` counts products, those of attention included: 2 m k n for m x k and k x n.
    """
    with torch.device("meta"):
        model = DiT(config)
        x = torch.empty(batch, config.in_channels, config.input_size, config.input_size)
    with FlopCounterMode(display=False) as counter:
        velocity = model(x, torch.empty(batch, device="meta"))
        forward = counter.get_total_flops()
        velocity.sum().backward()
    return forward / batch, counter.get_total_flops() / batch


def stored(make: Callable[[], nn.Module], call: Callable[[nn.Module, int], Tensor]) -> float:
    """Return the bytes per image that autograd keeps for the backward pass under bf16 autocast.

    Args:
        make: makes the model.
        call: calls it with a number of images.
    """

    def kept(batch: int) -> int:
        found: dict[int, Tensor] = {}
        with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
            model = make()
            own = {p.untyped_storage()._cdata for p in model.parameters()}

            def note(tensor: Tensor) -> Tensor:
                if tensor.untyped_storage()._cdata not in own:
                    found[tensor.untyped_storage()._cdata] = tensor  # kept alive, so that its address stays its own
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                call(model, batch)
        return sum(tensor.untyped_storage().nbytes() for tensor in found.values())

    return kept(2) - kept(1)  # without what does not depend on the batch, such as the weights' copies in bf16


def activations(config: DiTConfig, recomputed: bool = False) -> float:
    """Return the bytes per image that a DiTDH keeps for the backward pass under bf16 autocast."""
    shape = (config.in_channels, config.input_size, config.input_size)
    return stored(
        lambda: DiT(config, checkpoint_activations=recomputed),
        lambda model, batch: model(torch.empty(batch, *shape), torch.empty(batch)),
    )
