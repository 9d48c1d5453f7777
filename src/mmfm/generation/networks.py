"""Networks as velocity fields: arithmetic, labels, and guidance by a weaker network or by the missing label."""

from collections.abc import Callable
from functools import partial

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
    """Return (x, t, labels) -> velocity of a model, in the arithmetic of a ``precision`` key."""

    def velocity(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        with autocast(precision, device):
            return model(x, t, y)

    return velocity


def plain(model: nn.Module, precision: str, device: torch.device) -> Field:
    """Return the field of a model by itself."""
    velocity = network(model, precision, device)
    return lambda labels: partial(velocity, y=labels)


def guided(model: DiT, guide: DiT | None, guidance: Guidance, precision: str, device: torch.device) -> Field:
    """Return the field of a model with autoguidance, where there is a guide, or else classifier-free guidance."""
    velocity = network(model, precision, device)
    if guide is not None:
        weaker = network(guide, precision, device)
        return lambda labels: autoguidance(
            partial(velocity, y=labels), partial(weaker, y=labels), guidance.scale, guidance.interval
        )
    if guidance.scale == 1:
        return lambda labels: partial(velocity, y=labels)

    def field(labels: Tensor) -> VelocityFn:
        return classifier_free_guidance(velocity, labels, model.null_label, guidance.scale, guidance.interval)

    return field
