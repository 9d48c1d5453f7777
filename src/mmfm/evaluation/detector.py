"""Feature networks for Fréchet distances."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import Tensor

from mmfm.config.choices import DETECTORS
from mmfm.infra import store
from mmfm.infra.precision import deterministic_convolutions, exact_float32


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
    """

    name: str
    digest: str
    dimension: int
    standard: bool
    run: Callable[[Tensor], Tensor]
    device: torch.device
    encoder_digest: str | None = None

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Compute features (B, D) float32, on the detector's device, of images (B, 3, S, S) uint8 on any device.

        Raises:
            ValueError: images of another shape or dtype, or features that are not finite.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {tuple(images.shape)} {images.dtype}; a detector takes (B, 3, S, S) uint8")
        # TF32 would change the third digit of distances, and make them depend on the GPU model.
        with exact_float32(self.device.type), deterministic_convolutions():
            features = self.run(images.to(self.device, non_blocking=True)).float()
        if not features.isfinite().all():
            raise ValueError(f"the detector ({self.name}) returned NaN or Inf; fetch its weights again")
        return features


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
