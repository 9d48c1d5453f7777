"""Any vision transformer of timm with a square grid of patch tokens."""

from mmfm.autoencoder.family import Backbone  # isort: skip  (before timm, which imports torchvision)

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor

from mmfm.autoencoder.families import probe
from mmfm.config.choices import did_you_mean
from mmfm.infra import model_folder


class _Timm:
    """Loads a model at the input size; the global token is what its classifier would see."""

    def load(self, weights: str, input_size: int, norm_affine: bool) -> Backbone:
        """Load an encoder from a folder; see :meth:`mmfm.autoencoder.family.AnyFamily.load`."""
        if not Path(weights).is_dir():
            raise FileNotFoundError(
                f"encoder {weights} is not a folder; set `hf:` and the model's id, which fetches it"
            )
        try:
            about = model_folder.read(weights)
            prepared = model_folder.preprocessing(weights)
        except OSError as error:
            raise ValueError(f"config.json of the encoder folder {weights} cannot be read: {error}") from error
        if about.library != model_folder.TIMM:
            raise ValueError(
                f"{weights} holds a '{about.kind}' model of transformers, but the family is timm; set the family to hf"
            )
        if not timm.is_model(about.kind):
            near = did_you_mean(about.kind, timm.list_models())
            raise ValueError(f"{weights} holds '{about.kind}', which timm {timm.__version__} does not know{near}")
        about.patch_size(weights)
        what = f"timm's '{about.kind}' in {weights}"
        model = _create(weights, input_size, what, about.patch)
        with torch.no_grad(), probe.watched_norms(model) as norms:
            tokens = model.forward_features(probe.image(input_size))
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or not hasattr(model, "patch_embed"):
            raise ValueError(f"{what} has no grid of patch tokens; give a vision transformer")
        sides = model.patch_embed.patch_size
        if sides[0] != sides[1]:
            raise ValueError(f"{what} has patches of {sides[0]} x {sides[1]} pixels; give one with square patches")
        first = tokens.shape[1] - probe.grid_side(tokens.shape[1], input_size, sides[0], what) ** 2

        def run(images: Tensor) -> tuple[Tensor, Tensor]:
            found = model.forward_features(images)
            return found[:, first:], model.forward_head(found, pre_logits=True)

        if not norm_affine:
            probe.drop_affine(norms, tokens[:, first:])
        with torch.no_grad():
            pooled = model.forward_head(tokens, pre_logits=True)
        width = tokens.shape[2]
        if pooled.shape != (1, width):
            raise ValueError(
                f"{what} pools its tokens of {width} channels to {tuple(pooled.shape[1:])}; give one with a class "
                "token, a mean or an attention pool of that width"
            )
        return Backbone(
            model, run, width, sides[0], prepared.mean, prepared.std, prepared.resampling, antialias=True
        )  # fmt: skip


def _create(weights: str, input_size: int, what: str, patch: tuple[int, int] | None) -> Any:
    """Return timm's model, whose position embeddings fit the input size."""
    if patch and input_size % patch[0]:
        probe.grid_side(0, input_size, patch[0], what)
    try:
        return timm.create_model(f"local-dir:{weights}", pretrained=True, num_classes=0, img_size=input_size).eval()
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        raise ValueError(f"{what} has no grid of patch tokens; give a vision transformer") from error
    except (RuntimeError, SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{what} can't be loaded: {str(error).splitlines()[0]}; fetch the model again") from error


FAMILY = _Timm()
