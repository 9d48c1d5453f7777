"""SigLIP 2 (Tschannen et al. 2025): the vision tower."""

from mmfm.autoencoder.family import Family  # isort: skip  (before transformers)

from torch import Tensor
from transformers import SiglipVisionModel


def _run(model: SiglipVisionModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    # SigLIP has no class token: its attention pooling over the normalised tokens stands for it.
    output = model(pixel_values=pixels, interpolate_pos_encoding=True)
    return output.last_hidden_state, output.pooler_output


FAMILY = Family(("siglip", "siglip_vision_model"), SiglipVisionModel, "post_layernorm", _run)
