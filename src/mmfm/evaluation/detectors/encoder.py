"""Global tokens of a vision encoder as features, for images of any size and without another download."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mmfm.autoencoder.encoders import Encoder, family_of, load_encoder
from mmfm.config.choices import MAX_PATCHES, MIN_PATCHES, feature_patches
from mmfm.data.loader import to_float
from mmfm.evaluation.detector import Detector
from mmfm.infra import store


class _Tokens:
    """Computes global tokens after resizing images to the closest whole number of patches within the limits."""

    def __init__(self, encoder: Encoder, load: Callable[[int], Encoder]) -> None:
        self.encoder, self.load, self.patch = encoder, load, encoder.input_size // encoder.grid[0]

    def __call__(self, images: Tensor) -> Tensor:
        """Return (B, C) float32 for images (B, 3, S, S) uint8."""
        patches = feature_patches(images.shape[-1], self.patch)
        if self.encoder.grid[0] != patches:
            self.encoder = self.load(patches * self.patch)
        return self.encoder(to_float(images, images.device)).global_token


def load(path: Path, digest: str, device: torch.device) -> Detector:
    """Load the encoder whose folder, in the Hugging Face layout, contains the weights file `path`."""
    folder = path.parent
    family, patch = family_of(folder)

    def at(input_size: int) -> Encoder:
        return load_encoder(family, folder, input_size, device)

    encoder = at(patch * MAX_PATCHES)
    identity = store.folder_digest(folder)
    name = f"global tokens of the {family} encoder in {folder} ({encoder.hidden_size} features; not an FID)"
    features_digest = store.fingerprint([identity, MIN_PATCHES, MAX_PATCHES])
    return Detector(name, features_digest, encoder.hidden_size, False, _Tokens(encoder, at), device, identity)
