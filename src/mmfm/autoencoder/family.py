"""The interface of an encoder family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mmfm.infra.torchvision_ops  # noqa: F401  # isort: skip  (before transformers, which imports torchvision)

from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """How to load and run the encoders of one family.

    Attributes:
        model_classes: transformers class of the vision tower for each accepted `model_type` in config.json.
        final_norm: name of the final layer norm, whose affine part is removed.
        run: (model, pixels (B, 3, S, S)) -> (patch tokens (B, N, C), global token (B, C)).
        unused: parameters that the forward pass doesn't use and that the weights may lack.
        prepare: called with the loaded model.
    """

    model_classes: Mapping[str, type[PreTrainedModel]]
    final_norm: str
    run: Callable[[PreTrainedModel, Tensor], tuple[Tensor, Tensor]]
    unused: tuple[str, ...] = ()
    prepare: Callable[[PreTrainedModel], None] = lambda model: None
