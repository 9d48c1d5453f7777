"""Any vision transformer of transformers that returns its patch tokens."""

from mmfm.autoencoder.family import Backbone  # isort: skip  (before transformers)

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from mmfm.autoencoder import transformers_files
from mmfm.autoencoder.families import probe
from mmfm.config.choices import did_you_mean
from mmfm.infra import model_folder


class _Transformers:
    """Loads the vision tower, and finds the global token and the final norm by one image."""

    def load(self, weights: str, input_size: int, norm_affine: bool) -> Backbone:
        """Load an encoder; see :meth:`mmfm.autoencoder.family.AnyFamily.load`."""
        values = transformers_files.read_config(weights)
        about = model_folder.describe(values)
        if about.library != model_folder.TRANSFORMERS:
            raise ValueError(f"{weights} holds timm's '{about.kind}', but the family is hf; set the family to timm")
        patch = about.patch_size(weights)
        assert patch is not None  # or `patch_size` has raised
        model, missing = transformers_files.load_partly(AutoModel, weights, config=_vision_config(weights, values))
        model.eval()
        what = f"the '{about.kind}' model in {weights}"
        if model.main_input_name != "pixel_values":
            raise ValueError(f"{what} takes {model.main_input_name}, not images; give a vision transformer")
        pixels, options = probe.image(input_size), _options(model, input_size)
        with torch.set_grad_enabled(bool(missing)), probe.watched_norms(model) as norms:
            try:
                output = model(pixel_values=pixels, **options)
                tokens = output.last_hidden_state
            except (TypeError, AttributeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{what} does not turn images of {input_size} pixels into tokens: {error}") from error
        if tokens.ndim != 3:
            raise ValueError(f"{what} gives no sequence of tokens but {tuple(tokens.shape[1:])}; give a transformer")
        first = tokens.shape[1] - probe.grid_side(tokens.shape[1], input_size, patch, what) ** 2
        with torch.no_grad():
            again = model(pixel_values=pixels, **options).last_hidden_state
        if again.shape != tokens.shape or not torch.allclose(again, tokens.detach(), atol=1e-4, rtol=1e-3):
            raise ValueError(
                f"{what} gives other tokens for the same image at every call; give another, or for a masked "
                "autoencoder set the family to mae"
            )
        width = tokens.shape[2]

        def run(images: Tensor) -> tuple[Tensor, Tensor]:
            output = model(pixel_values=images, **options)
            found = output.last_hidden_state
            return found[:, first:], found[:, 0] if first else output.pooler_output

        pooled = getattr(output, "pooler_output", None)
        if not first and (pooled is None or pooled.shape != (1, width)):
            size = "none" if pooled is None else f"one of {pooled.shape[-1]} channels"
            raise ValueError(
                f"{what} has no class token, and of pooled features {size} for tokens of {width}; give a model with a "
                "class token or a pooler of that width"
            )
        if missing:
            outputs: tuple[Tensor, ...] = (tokens,) if first or pooled is None else (tokens, pooled)
            transformers_files.require(missing - probe.unused_parameters(model, outputs), model, weights)
        if not norm_affine:
            probe.drop_affine(norms, tokens[:, first:])
        prepared = transformers_files.preprocessing(weights)
        return Backbone(
            model, run, width, patch, prepared.mean, prepared.std, prepared.resampling, antialias=True
        )  # fmt: skip


def _vision_config(weights: str, values: dict[str, Any]) -> Any:
    """Return the configuration of the vision tower.

    Raises:
        ValueError: transformers has no such model.
    """
    kind = values.get("model_type")
    if kind not in CONFIG_MAPPING:
        near = did_you_mean(str(kind), CONFIG_MAPPING.keys())
        raise ValueError(f"{weights} holds a '{kind}' model, which transformers does not know{near}; give another")
    config = AutoConfig.from_pretrained(weights, local_files_only=True)
    config = getattr(config, "vision_config", config)
    if type(config) not in MODEL_MAPPING:
        raise ValueError(
            f"{weights} holds a '{kind}' model, whose vision tower transformers can't load alone; give another"
        )
    return config


def _options(model: PreTrainedModel, input_size: int) -> dict[str, Any]:
    """Return what the forward pass needs so that other sizes than that of the position embeddings are accepted."""
    trained = getattr(model.config, "image_size", None)  # none for models of any size
    trained = trained if isinstance(trained, int | None) else trained[0]
    accepted = inspect.signature(model.forward).parameters
    wanted = trained != input_size and "interpolate_pos_encoding" in accepted
    return {"interpolate_pos_encoding": True} if wanted else {}


FAMILY = _Transformers()
