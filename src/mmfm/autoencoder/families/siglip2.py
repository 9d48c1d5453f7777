"""SigLIP 2 (Tschannen et al. 2025): the vision tower."""

from mmfm.autoencoder.family import Family  # isort: skip  (before transformers)

from torch import Tensor
from transformers import PreTrainedModel, SiglipVisionModel


def _run(model: PreTrainedModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    # SigLIP has no CLS token; the global token is its attention pooling over the normalised patch tokens.
    output = model(pixel_values=pixels, interpolate_pos_encoding=True)
    return output.last_hidden_state, output.pooler_output


FAMILY = Family(dict.fromkeys(("siglip", "siglip_vision_model"), SiglipVisionModel), "post_layernorm", _run)
