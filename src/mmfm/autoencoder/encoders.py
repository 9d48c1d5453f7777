"""Frozen vision encoders: images -> latents and global tokens.

An encoder is a Hugging Face model of one of :mod:`mmfm.autoencoder.families`. Its grid of patch tokens is the latent;
its token for the whole image is the global token. A mixture over global tokens defines the modes.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mmfm.autoencoder.family import Family  # isort: skip  (before transformers)

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mmfm.config.choices import ENCODER_FAMILIES
from mmfm.infra.precision import exact_float32

log = logging.getLogger(__name__)


class EncoderOutput(NamedTuple):
    """latent (B, C, H, W) and global_token (B, C), float32."""

    latent: Tensor
    global_token: Tensor


class Encoder(nn.Module):
    """A frozen float32 encoder in evaluation mode; built by `load_encoder`.

    Attributes:
        hidden_size: channels C of the latent.
        grid: (H, W) of the latent.
        image_mean, image_std: (3,) float32, the image processor's normalisation.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self, family: str, model: PreTrainedModel, input_size: int, image_mean: list[float], image_std: list[float]
    ) -> None:
        super().__init__()
        patch_size = model.config.patch_size
        if input_size % patch_size:
            below = input_size // patch_size * patch_size
            nearest = f"{below} or {below + patch_size}" if below else f"{patch_size}"
            raise ValueError(
                f"input_size {input_size} is not a multiple of the {family} encoder's patch size {patch_size}; "
                f"use {nearest}"
            )
        self.family = family
        self._run = ENCODER_FAMILIES[family].load().run
        self.input_size = input_size
        self.hidden_size: int = model.config.hidden_size
        self.grid = (input_size // patch_size, input_size // patch_size)
        self.model = model
        self.register_buffer("image_mean", torch.tensor(image_mean, dtype=torch.float32))
        self.register_buffer("image_std", torch.tensor(image_std, dtype=torch.float32))
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in evaluation mode, even if a parent module is set to training mode."""
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> EncoderOutput:
        """Encode images.

        Args:
            images: (B, 3, h, w) float in [0, 1], any size.

        Returns:
            latent (B, C, H, W) and global token (B, C), float32, not normalised by the latent statistics.

        Raises:
            ValueError: images have another shape, or integer pixels.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images are {tuple(images.shape)} {images.dtype}; the encoder takes (B, 3, h, w) float in [0, 1]"
            )
        # Latents and posteriors need float32 even if training runs under bf16 autocast.
        with exact_float32(images.device.type):
            size = (self.input_size, self.input_size)
            pixels = images.float()
            if pixels.shape[-2:] != size:
                pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=False)
            pixels = (pixels - self.image_mean[:, None, None]) / self.image_std[:, None, None]
            tokens, global_token = self._run(self.model, pixels)
        latent = tokens.transpose(1, 2).unflatten(-1, self.grid)
        return EncoderOutput(latent.contiguous(), global_token.contiguous())


def load_encoder(family: str, weights: str | Path, input_size: int, device: torch.device | str = "cpu") -> Encoder:
    """Load a frozen encoder and drop the affine part of its final layer norm.

    Args:
        family: name in :data:`mmfm.config.choices.ENCODER_FAMILIES`.
        weights: folder in the Hugging Face layout (config.json, preprocessor_config.json, model.safetensors), or id of
            a model in the local Hugging Face cache. Nothing is downloaded.
        input_size: side in pixels to which images are resized; a multiple of the patch size.
        device: where to put it.

    Raises:
        ValueError: the family is unknown, the weights are damaged, incomplete or of another family, the image processor
            has no normalisation, or the input size is not a multiple of the patch size.
        FileNotFoundError: no such folder, and no such model in the cache.

    Source: Zheng et al. 2025 (RAE); the norm without affine part follows the reference implementation.
    """
    kind: Family = ENCODER_FAMILIES[family].load()
    weights = str(weights)
    model = _load_model(kind, kind.model_classes[_model_type(family, weights)], weights)
    kind.prepare(model)
    norm = model.get_submodule(kind.final_norm)
    norm.register_parameter("weight", None)
    norm.register_parameter("bias", None)
    return Encoder(family, model, input_size, *_load_normalisation(weights)).to(device)


def family_of(folder: str | Path) -> tuple[str, int]:
    """Return the family and the patch size in pixels of the encoder in a folder in the Hugging Face layout.

    Raises:
        ValueError: the model type is unknown, or config.json can't be read.
        FileNotFoundError: no such folder.
    """
    with _readable_errors(str(folder), "config.json"):
        config, _ = PreTrainedConfig.get_config_dict(str(folder), local_files_only=True)
    found = config.get("model_type")
    for name, family in ENCODER_FAMILIES.items():
        if found in family.model_types:
            return name, (config.get("vision_config") or config)["patch_size"]
    known = ", ".join(kind for family in ENCODER_FAMILIES.values() for kind in family.model_types)
    raise ValueError(f"{folder} holds a {found!r} model, which is not supported; give a model of type {known}")


def latent_shape(folder: str | Path, input_size: int) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of the latents of the encoder in a folder, for inputs of ``input_size`` pixels.

    Only config.json is read.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: config.json can't be read.
    """
    with _readable_errors(str(folder), "config.json"):
        config, _ = PreTrainedConfig.get_config_dict(str(folder), local_files_only=True)
    sizes = config.get("vision_config") or config
    side = input_size // sizes["patch_size"]
    return sizes["hidden_size"], side, side


def _model_type(family: str, weights: str) -> str:
    """Read `model_type` from config.json and check that it belongs to the family."""
    with _readable_errors(weights, "config.json"):
        config, _ = PreTrainedConfig.get_config_dict(weights, local_files_only=True)
    found, wanted = config.get("model_type"), ENCODER_FAMILIES[family].model_types
    if found not in wanted:
        expected = " or ".join(wanted)
        families = ENCODER_FAMILIES.items()
        owner = next((name for name, other in families if found in other.model_types), None)
        remedy = f"set the family to {owner}" if owner else f"give weights of type {expected}"
        raise ValueError(f"{weights} holds a {found!r} model, but the family is {family} ({expected}); {remedy}")
    return found


def _load_model(family: Family, model_class: type[PreTrainedModel], weights: str) -> PreTrainedModel:
    with _readable_errors(weights, "the weights"), _quiet_transformers():
        loaded: Any = model_class.from_pretrained(
            weights, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    model, info = loaded  # a pair because of output_loading_info, which the type annotations ignore
    # transformers leaves missing parameters at their random initial values.
    missing = sorted(set(info["missing_keys"]) - set(family.unused))
    if missing:
        raise ValueError(
            f"{weights} lacks {len(missing)} parameter(s) of {model_class.__name__} "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); fetch the model again"
        )
    log.debug("%s: ignored %d tensors outside the vision tower", weights, len(info["unexpected_keys"]))
    return model


def _load_normalisation(weights: str) -> tuple[list[float], list[float]]:
    with _readable_errors(weights, "preprocessor_config.json"):
        processor, _ = BaseImageProcessor.get_image_processor_dict(weights, local_files_only=True)
    try:
        return processor["image_mean"], processor["image_std"]
    except KeyError as error:
        raise ValueError(f"preprocessor_config.json of {weights} lacks {error}; fetch the model again") from None


@contextmanager
def _readable_errors(weights: str, part: str) -> Iterator[None]:
    """Turn the errors of transformers for absent or damaged files into ones that name the model and the remedy."""
    remedy = f"fetch it with `hf download {weights}`, or give an existing folder"
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{part} of the encoder {weights} cannot be read ({error}); {remedy}") from error
    except OSError as error:
        if Path(weights).is_dir():
            raise ValueError(f"{part} of the encoder folder {weights} cannot be read: {error}") from error
        raise FileNotFoundError(
            f"encoder {weights} is neither a folder nor a model in the local Hugging Face cache; {remedy}"
        ) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the progress bar and the report of ignored tensors (hundreds for a SigLIP text tower)."""
    verbosity, progress = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()
