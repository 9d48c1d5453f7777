"""Feature networks that Frechet distances are taken in."""

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import Tensor

from mmfm.config.choices import DETECTORS
from mmfm.infra import store


class Detector:
    """A frozen feature network; built by :func:`load_detector`.

    Attributes:
        name: says in full what network this is and what its distances may be compared with.
        digest: SHA-256 of the weights file. Features of two detectors compare only if their digests are equal.
        dimension: D, features of an image.
        standard: whether these are the weights that published FIDs are computed with.
    """

    def __init__(
        self, name: str, digest: str, dimension: int, standard: bool, run: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:  # fmt: skip
        self.name, self.digest, self.dimension, self.standard = name, digest, dimension, standard
        self._run = run
        self.device = device

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: (B, 3, S, S) uint8, any device.

        Returns:
            (B, D) float32 on the detector's device.

        Raises:
            ValueError: images of another shape or dtype, or features that are not finite.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {tuple(images.shape)} {images.dtype}; a detector takes (B, 3, S, S) uint8")
        # TF32 would change distances in their third digit and from one kind of GPU to another.
        full = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with full, torch.autocast(self.device.type, enabled=False):
            features = self._run(images.to(self.device, non_blocking=True)).float()
        if not features.isfinite().all():
            raise ValueError(f"the detector gives NaN or Inf; fetch its weights again ({self.name})")
        return features


def load_detector(kind: str, weights: str | Path, device: torch.device | str = "cpu") -> Detector:
    """Load a detector from a local file. Nothing is downloaded.

    Args:
        kind: name in :data:`mmfm.config.choices.DETECTORS`.
        weights: the file.
        device: where to run it.

    Raises:
        FileNotFoundError: no such file; the message says how to get it.
        ValueError: an unknown kind, or a file that is damaged or of another network.
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
        raise ValueError(f"'{path}' holds no weights of the {kind} detector ({reason}); {remedy}") from error
