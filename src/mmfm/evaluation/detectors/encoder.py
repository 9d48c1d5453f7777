"""Global tokens of a vision encoder as features, for images of any size and without another download."""

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

    def __init__(self, family: str, folder: Path, patch: int, encoder: Encoder) -> None:
        self.family, self.folder, self.patch, self.encoder = family, folder, patch, encoder

    def __call__(self, images: Tensor) -> Tensor:
        """Return (B, C) float32 for images (B, 3, S, S) uint8."""
        patches = feature_patches(images.shape[-1], self.patch)
        if self.encoder.grid[0] != patches:
            self.encoder = load_encoder(self.family, self.folder, patches * self.patch, images.device)
        return self.encoder(to_float(images, images.device)).global_token


def load(path: Path, digest: str, device: torch.device) -> Detector:
    """Load the encoder whose folder, in the Hugging Face layout, contains the weights file `path`."""
    folder = path.parent
    family, patch = family_of(folder)
    encoder = load_encoder(family, folder, patch * MAX_PATCHES, device)
    identity = store.folder_digest(folder)
    name = f"global tokens of the {family} encoder in {folder} ({encoder.hidden_size} features; not an FID)"
    features_digest = store.fingerprint([identity, MIN_PATCHES, MAX_PATCHES])
    return Detector(
        name, features_digest, encoder.hidden_size, False, _Tokens(family, folder, patch, encoder), device, identity
    )
