"""Velocity fields from networks: precision, labels and guidance."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmfm.config import Guidance
from mmfm.flow.guidance import autoguidance, classifier_free_guidance
from mmfm.flow.solver import VelocityFn
from mmfm.generation.generator import Field
from mmfm.infra.precision import autocast
from mmfm.models.dit import DiT


def network(
    model: nn.Module, precision: str, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Return a model's velocity (x, t, labels) -> (B, C, H, W), computed in the given ``precision``."""

    def velocity(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        with autocast(precision, device):
            return model(x, t.to(device, non_blocking=True), y)

    return velocity


def plain(model: nn.Module, precision: str, device: torch.device) -> Field:
    """Return the velocity field of a model without guidance."""
    velocity = network(model, precision, device)
    return lambda labels: lambda x, t: velocity(x, t, labels)


def guided(model: DiT, guide: DiT | None, guidance: Guidance, precision: str, device: torch.device) -> Field:
    """Return the velocity field with autoguidance if there is a guide, otherwise with classifier-free guidance.

    Its arithmetic is float32, with the precision ``reference`` bfloat16.
    """
    dtype = torch.bfloat16 if precision == "reference" else torch.float32
    strong = plain(model, precision, device)
    if guide is not None:
        weak = plain(guide, precision, device)
        return lambda labels: autoguidance(strong(labels), weak(labels), guidance.scale, guidance.interval, dtype)
    if guidance.scale == 1:
        return strong
    velocity, null_label = network(model, precision, device), model.null_label

    def field(labels: Tensor | None) -> VelocityFn:
        if labels is None or null_label is None:
            raise ValueError("classifier-free guidance needs labels and a model trained with label dropout")
        return classifier_free_guidance(velocity, labels, null_label, guidance.scale, guidance.interval, dtype)

    return field
