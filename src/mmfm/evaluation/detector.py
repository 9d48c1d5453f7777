"""Feature networks for Fréchet distances."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import Tensor

from mmfm.config.choices import DETECTORS
from mmfm.infra import store
from mmfm.infra.precision import deterministic_convolutions, exact_float32


@dataclass(frozen=True)
class Outputs:
    """What a detector computes of a batch of images in one pass; on its device, float32.

    Attributes:
        features: (B, D).
        spatial: (B, 2023) of the Inception network, for sFID; None for other networks.
        logits: (B, 1008) of the Inception network, without the last layer's bias; None for other networks.
    """

    features: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Detector:
    """A frozen feature network; built by :func:`load_detector`.

    Attributes:
        name: description of the network and of what its distances can be compared with.
        digest: SHA-256 of the weights file; features are comparable only if their digests are equal.
        dimension: number of features D per image.
        standard: whether the weights are those of published FIDs.
        run: images (B, 3, S, S) uint8 on `device` -> features (B, D).
        device: where to run it.
        encoder_digest: digest of the encoder whose tokens are the features; None for other networks.
        run_all: like `run`, but -> everything that the network gives; None if that is the features.
        spatial_dimension: number of spatial features per image; 0 without them.
    """

    name: str
    digest: str
    dimension: int
    standard: bool
    run: Callable[[Tensor], Tensor]
    device: torch.device
    encoder_digest: str | None = None
    run_all: Callable[[Tensor], Outputs] | None = None
    spatial_dimension: int = 0

    def features(self, images: Tensor) -> Tensor:
        """Compute features (B, D) float32, on the detector's device, of images (B, 3, S, S) uint8 on any device.

        Raises:
            ValueError: images of another shape or dtype, or features that are not finite.
        """
        return self._checked(images, lambda batch: Outputs(self.run(batch))).features

    def outputs(self, images: Tensor) -> Outputs:
        """Like :meth:`features`, with all that the network gives."""
        return self._checked(images, self.run_all or (lambda batch: Outputs(self.run(batch))))

    @torch.no_grad()
    def _checked(self, images: Tensor, run: Callable[[Tensor], Outputs]) -> Outputs:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {tuple(images.shape)} {images.dtype}; a detector takes (B, 3, S, S) uint8")
        # TF32 would change the third digit of distances, and make them depend on the GPU model.
        with exact_float32(self.device.type), deterministic_convolutions():
            found = run(images.to(self.device, non_blocking=True))
        # NaN and Inf anywhere in the network reach its features.
        features = found.features.float()
        if not features.isfinite().all():
            raise ValueError(f"the detector ({self.name}) returned NaN or Inf; fetch its weights again")
        return replace(found, features=features)


def load_detector(kind: str, weights: str | Path, device: torch.device | str = "cpu") -> Detector:
    """Load a detector from a local file. Nothing is downloaded.

    Args:
        kind: name in :data:`mmfm.config.choices.DETECTORS`.
        weights: the file.
        device: where to run it.

    Raises:
        FileNotFoundError: no such file; the message says how to get it.
        ValueError: the kind is unknown, or the file is damaged or belongs to another network.
    """
    path, device = Path(weights), torch.device(device)
    load, remedy = DETECTORS[kind].load(), DETECTORS[kind].remedy
    if not path.is_file():
        raise FileNotFoundError(f"no weights of the {kind} detector at '{path}'; {remedy}")
    digest = store.file_digest(path)
    try:
        return load(path, digest, device)
    except (RuntimeError, SafetensorError, UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"'{path}' is not a weights file of the {kind} detector ({reason}); {remedy}") from error
