"""The demo's detector: a small Fashion-MNIST classifier in place of the Inception network.

``tools/train_detector.py`` makes its weights.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmfm.evaluation.detector import Detector


class FashionDetector(nn.Module):
    """Convolutional classifier of 32x32 images into ten classes, with 64 features before the last layer.

    The features are standardised and taken before the activation: rectified features would be zero for most images, far
    from the Gaussian that the Fréchet distance assumes. They see a 4x4 grid rather than a global average, so that
    misplaced parts of a garment change them.
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
        """Compute the features of images.

        Args:
            images: (B, 3, 32, 32) uint8.

        Returns:
            (B, 64) float32, with mean 0 and variance 1 over the training images, approximately.

        Raises:
            ValueError: another dtype or size. Other sizes are not resized, because that would change the distance.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"the detector takes uint8 images in 0..255, not {images.dtype}")
        if images.ndim != 4 or images.shape[1:] != (3, self.size, self.size):
            expected = f"(B, 3, {self.size}, {self.size})"
            raise ValueError(f"the detector takes images of shape {expected}, not {tuple(images.shape)}")
        scaled = images.to(next(self.parameters()).dtype) / 127.5 - 1
        return self.to_features(self.trunk(scaled)).float()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 10) float32 for images (B, 3, 32, 32) uint8."""
        return self.classifier(self.features(images))


def load(path: Path, digest: str, device: torch.device) -> Detector:
    """Load the classifier from a safetensors file."""
    model = FashionDetector()
    model.load_state_dict(load_file(path))
    model.to(device).eval().requires_grad_(False)
    dimension = model.feature_dimension
    name = f"fashion-mnist classifier (demo, {dimension} features; not comparable with Inception FID)"
    return Detector(name, digest, dimension, False, model.features, device)
