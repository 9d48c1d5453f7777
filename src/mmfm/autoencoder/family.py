"""The interface of an encoder family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import mmfm.infra.torchvision_ops  # noqa: F401  # isort: skip  (before transformers, which imports torchvision)

from torch import Tensor, nn
from transformers import PreTrainedModel

from mmfm.autoencoder import transformers_files

Run = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Normalised pixels (B, 3, S, S) -> patch tokens (B, N, C) in rows, global token (B, C)."""


@dataclass(frozen=True)
class Backbone:
    """A loaded model, float32 on the CPU, and how to use it.

    Attributes:
        model: the network.
        run: what computes the tokens with it.
        hidden_size: C, channels of a token.
        patch_size: side of a patch, pixels.
        image_mean, image_std: normalisation of the pixels.
        resampling: ``bicubic`` or ``bilinear``, by which images are resized to the input size.
        antialias: whether images are smoothed before they are made smaller.
    """

    model: nn.Module
    run: Run
    hidden_size: int
    patch_size: int
    image_mean: list[float]
    image_std: list[float]
    resampling: str = "bicubic"
    antialias: bool = False


class AnyFamily(Protocol):
    """What loads the encoders of a family."""

    def load(self, weights: str, input_size: int, norm_affine: bool) -> Backbone:
        """Load an encoder.

        Args:
            weights: folder, or id of a model in the local Hugging Face cache.
            input_size: side of its input, pixels.
            norm_affine: keep the affine part of the final norm.

        Raises:
            ValueError: the weights are damaged, incomplete or of another family, or don't fit the input size.
            FileNotFoundError: no such folder, and no such model in the cache.
        """


@dataclass(frozen=True)
class Family:
    """How to load and run the encoders of one family of transformers.

    Attributes:
        model_classes: transformers class of the vision tower for each accepted `model_type` in config.json.
        final_norm: name of the final layer norm, whose affine part is removed.
        run: (model, pixels (B, 3, S, S)) -> (patch tokens (B, N, C), global token (B, C)).
        unused: parameters that the forward pass doesn't use and that the weights may lack.
        prepare: called with the loaded model.
    """

    model_classes: Mapping[str, type[PreTrainedModel]]
    final_norm: str
    run: Callable[[PreTrainedModel, Tensor], tuple[Tensor, Tensor]]
    unused: tuple[str, ...] = ()
    prepare: Callable[[PreTrainedModel], None] = lambda model: None

    def load(self, weights: str, input_size: int, norm_affine: bool) -> Backbone:
        """Load an encoder; see :meth:`AnyFamily.load`."""
        kind = transformers_files.read_config(weights)["model_type"]
        model = transformers_files.load(self.model_classes[kind], weights, set(self.unused))
        self.prepare(model)
        if not norm_affine:
            norm = model.get_submodule(self.final_norm)
            norm.register_parameter("weight", None)
            norm.register_parameter("bias", None)
        pixels = transformers_files.preprocessing(weights)
        sizes = model.config.hidden_size, model.config.patch_size
        return Backbone(model, lambda images: self.run(model, images), *sizes, pixels.mean, pixels.std)
