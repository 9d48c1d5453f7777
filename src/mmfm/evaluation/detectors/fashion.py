"""The demo's feature detector: a small classifier of Fashion-MNIST whose features the Frechet distance is taken in.

It stands where the Inception network stands at full size. ``tools/train_detector.py`` makes its weights.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmfm.evaluation.detector import Detector


class FashionDetector(nn.Module):
    """Convolutional classifier of 32x32 images into ten classes with 64 features before the last layer.

    The features are a standardised linear map, taken before the activation: a rectified layer would leave many of
    them at zero for most images, and their distribution far from the Gaussian that the Frechet distance assumes. The
    map sees a 4x4 grid, not a global average, so that misplaced parts of a garment change the features.
    """

    size = 32
    feature_dimension = 64
    classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(32),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1, bias=False),
            nn.BatchNorm2d(128),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
        )
        self.to_features = nn.Sequential(
            nn.Dropout(0.2),
            nn.Linear(128 * 4 * 4, self.feature_dimension, bias=False),
            nn.BatchNorm1d(self.feature_dimension, affine=False),
        )
        self.classifier = nn.Sequential(nn.GELU(), nn.Linear(self.feature_dimension, self.classes))

    def features(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: uint8 (B, 3, 32, 32).

        Returns:
            float32 (B, 64), each of about zero mean and unit variance over the training images.

        Raises:
            ValueError: another dtype or size; images of other sizes have to be made at 32x32, not resized here, since
                a resize would itself move the distance.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"the detector takes uint8 images in 0..255, got {images.dtype}")
        if images.ndim != 4 or images.shape[1:] != (3, self.size, self.size):
            expected = f"(B, 3, {self.size}, {self.size})"
            raise ValueError(f"the detector takes images of shape {expected}, got {tuple(images.shape)}")
        scaled = images.to(self.classifier[1].weight.dtype) / 127.5 - 1
        return self.to_features(self.trunk(scaled)).float()

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 (B, 10), of uint8 images (B, 3, 32, 32)."""
        return self.classifier(self.features(images))


def load(path: Path, digest: str, device: torch.device) -> Detector:
    """Load the classifier from a safetensors file."""
    model = FashionDetector()
    model.load_state_dict(load_file(path))
    model.to(device).eval().requires_grad_(False)
    dimension = model.feature_dimension
    name = f"fashion-mnist classifier (demo, {dimension} features; not comparable with Inception FID)"
    return Detector(name, digest, dimension, False, model.features, device)
