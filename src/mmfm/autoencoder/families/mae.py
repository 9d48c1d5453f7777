"""Masked autoencoder (He et al. 2022), used without masking."""

from mmfm.autoencoder.family import Family  # isort: skip  (before transformers)

import torch
from torch import Tensor
from transformers import PreTrainedModel, ViTMAEModel


def _run(model: PreTrainedModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    # Even at mask ratio 0 the model sorts the patches by noise; ascending noise keeps their order.
    num_patches = (pixels.shape[-1] // model.config.patch_size) ** 2
    noise = torch.arange(num_patches, device=pixels.device, dtype=torch.float32).expand(pixels.shape[0], -1)
    tokens = model(pixel_values=pixels, noise=noise, interpolate_pos_encoding=True).last_hidden_state
    return tokens[:, 1:], tokens[:, 0]


def _disable_masking(model: PreTrainedModel) -> None:
    model.config.mask_ratio = 0.0


FAMILY = Family({"vit_mae": ViTMAEModel}, "layernorm", _run, prepare=_disable_masking)
