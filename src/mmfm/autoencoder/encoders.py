"""Frozen vision encoders: images -> latents and global tokens.

An encoder is a model of one of :mod:`mmfm.autoencoder.families`. Its grid of patch tokens is the latent; its token for
the whole image is the global token. A mixture over global tokens defines the modes.
"""

from pathlib import Path
from typing import NamedTuple

from mmfm.autoencoder.family import AnyFamily, Backbone  # isort: skip  (before transformers)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfm import config
from mmfm.autoencoder import transformers_files
from mmfm.config.choices import ENCODER_FAMILIES, ENCODER_PRECISIONS
from mmfm.infra import model_folder, store
from mmfm.infra.precision import encoding


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
        precision: of the network, see :func:`mmfm.infra.precision.encoding`.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, family: str, backbone: Backbone, input_size: int, precision: str = "float32") -> None:
        super().__init__()
        patch_size = backbone.patch_size
        if input_size % patch_size:
            raise ValueError(
                f"input_size {input_size} is not a multiple of the {family} encoder's patch size {patch_size}; "
                f"use {model_folder.nearest_multiples(input_size, patch_size)}"
            )
        ENCODER_PRECISIONS.require(precision)
        self.family, self.precision = family, precision
        self.input_size, self.hidden_size = input_size, backbone.hidden_size
        self.grid = (input_size // patch_size, input_size // patch_size)
        self.model, self._run = backbone.model, backbone.run
        self.resampling, self.antialias = backbone.resampling, backbone.antialias
        self.register_buffer("image_mean", torch.tensor(backbone.image_mean, dtype=torch.float32))
        self.register_buffer("image_std", torch.tensor(backbone.image_std, dtype=torch.float32))
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
        device, size = images.device.type, (self.input_size, self.input_size)
        # Whatever the caller computes in, such as bf16 autocast in training, latents have the encoder's own precision.
        with encoding("float32", device):
            pixels = images.float()
            if pixels.shape[-2:] != size:
                pixels = F.interpolate(
                    pixels, size=size, mode=self.resampling, align_corners=False, antialias=self.antialias
                )
            pixels = (pixels - self.image_mean[:, None, None]) / self.image_std[:, None, None]
        with encoding(self.precision, device):
            tokens, global_token = self._run(pixels)
        tokens, global_token = tokens.float(), global_token.float()
        latent = tokens.transpose(1, 2).unflatten(-1, self.grid)
        return EncoderOutput(latent.contiguous(), global_token.contiguous())


def configured_encoder(section: config.Encoder, weights: str | Path, device: torch.device | str = "cpu") -> "Encoder":
    """Load the encoder that a section ``encoder`` describes; arguments and errors as for :func:`load_encoder`."""
    return load_encoder(
        section.family, weights, section.input_size, device, section.precision, section.norm_affine
    )  # fmt: skip


def load_encoder(
    family: str,
    weights: str | Path,
    input_size: int,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    norm_affine: bool = False,
) -> Encoder:
    """Load a frozen encoder and drop the affine part of its final layer norm.

    Args:
        family: name in :data:`mmfm.config.choices.ENCODER_FAMILIES`.
        weights: folder in the Hugging Face layout (config.json, preprocessor_config.json, model.safetensors), or id of
            a model in the local Hugging Face cache. Nothing is downloaded. timm's models have a folder without
            preprocessor_config.json.
        input_size: side in pixels to which images are resized; a multiple of the patch size.
        device: where to put it.
        precision: name in :data:`mmfm.config.choices.ENCODER_PRECISIONS`.
        norm_affine: keep the affine part.

    Raises:
        ValueError: the family is unknown, the weights are damaged, incomplete or of another family, the image processor
            has no normalisation, the model has no square grid of patches or no global token, or the input size is not a
            multiple of the patch size.
        FileNotFoundError: no such folder, and no such model in the cache.

    Source: Zheng et al. 2025 (RAE); the norm without affine part follows the reference implementation.
    """
    kind: AnyFamily = ENCODER_FAMILIES[family].load()
    weights = str(weights)
    if ENCODER_FAMILIES[family].model_types:
        _require_type(family, weights)
    return Encoder(family, kind.load(weights, input_size, norm_affine), input_size, precision).to(device)


def family_of(folder: str | Path) -> tuple[str, int]:
    """Return the family and the patch size in pixels of the encoder in a folder in the Hugging Face layout.

    Raises:
        ValueError: the model has no square patches, or config.json can't be read.
        FileNotFoundError: no such folder.
    """
    about = _described(folder)
    if about.library == model_folder.TIMM:
        family = "timm"
    else:
        owners = (name for name, other in ENCODER_FAMILIES.items() if about.kind in other.model_types)
        family = next(owners, "hf")
    return family, about.patch_size(str(folder)) or ENCODER_FAMILIES[family].patch


def latent_shape(folder: str | Path, input_size: int) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of the latents of the encoder in a folder, for inputs of ``input_size`` pixels.

    The weights are not read.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: config.json can't be read, or does not say.
    """
    about, where = _described(folder), str(folder)
    patch = about.patch_size(where)
    if patch is None or about.width is None:
        raise ValueError(f"config.json of {where} says no patch size or no width; let the statistics be computed")
    return about.width, input_size // patch, input_size // patch


def _described(folder: str | Path) -> model_folder.VisionModel:
    with transformers_files.readable_errors(str(folder), "config.json"):
        return model_folder.read(folder)


def _require_type(family: str, weights: str) -> None:
    """Read `model_type` from config.json and check that it belongs to the family."""
    config = transformers_files.read_config(weights)
    found, wanted = config.get("model_type"), ENCODER_FAMILIES[family].model_types
    if found not in wanted:
        expected = " or ".join(wanted)
        families = ENCODER_FAMILIES.items()
        owner = next((name for name, other in families if found in other.model_types), None)
        owner = owner or ("timm" if store.is_timm(config) else "hf")
        remedy = f"set the family to {owner}, or give weights of type {expected}"
        raise ValueError(f"{weights} holds a {found!r} model, but the family is {family} ({expected}); {remedy}")
