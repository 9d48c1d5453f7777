"""What has to be known of a family of encoders."""

from collections.abc import Callable
from dataclasses import dataclass

import mmfm.infra.torchvision_ops  # noqa: F401  # isort: skip  (before transformers, which imports torchvision)

from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """How one family is loaded, run and read.

    Attributes:
        model_types: what `model_type` in config.json may be.
        model_class: the transformers class of the vision tower.
        final_norm: name of the last layer norm, whose affine part is removed.
        run: (model, pixels (B, 3, S, S)) -> (patch tokens (B, N, C), global token (B, C)).
        unused: parameters that the forward pass never reads; a checkpoint may lack them.
        prepare: called with the loaded model.
    """

    model_types: tuple[str, ...]
    model_class: type[PreTrainedModel]
    final_norm: str
    run: Callable[[PreTrainedModel, Tensor], tuple[Tensor, Tensor]]
    unused: tuple[str, ...] = ()
    prepare: Callable[[PreTrainedModel], None] = lambda model: None
