"""DINOv2 with registers (Oquab et al. 2023; Darcet et al. 2024)."""

from mmfm.autoencoder.family import Family  # isort: skip  (before transformers)

from torch import Tensor
from transformers import Dinov2WithRegistersModel


def _run(model: Dinov2WithRegistersModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    tokens = model(pixel_values=pixels).last_hidden_state
    return tokens[:, 1 + model.config.num_register_tokens :], tokens[:, 0]


FAMILY = Family(("dinov2_with_registers",), Dinov2WithRegistersModel, "layernorm", _run, ("embeddings.mask_token",))
