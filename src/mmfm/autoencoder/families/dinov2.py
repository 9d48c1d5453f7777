"""DINOv2 (Oquab et al. 2023), with registers (Darcet et al. 2024) or without."""

from mmfm.autoencoder.family import Family  # isort: skip  (before transformers)

from torch import Tensor
from transformers import Dinov2Model, Dinov2WithRegistersModel, PreTrainedModel


def _run(model: PreTrainedModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    tokens = model(pixel_values=pixels).last_hidden_state
    return tokens[:, 1 + getattr(model.config, "num_register_tokens", 0) :], tokens[:, 0]


_CLASSES = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}

FAMILY = Family(_CLASSES, "layernorm", _run, ("embeddings.mask_token",))
