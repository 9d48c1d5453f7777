"""Feature networks that Frechet distances are taken in."""

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmfm.evaluation.fashion_detector import FashionDetector
from mmfm.infra import store

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


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
        kind: ``fashion``, the demo's classifier, or ``inception``, the network of 2015-12-05 that FID is defined by
            (torchvision's Inception is another one).
        weights: the file.
        device: where to run it.

    Raises:
        FileNotFoundError: no such file; the message says how to get it.
        ValueError: an unknown kind, or a file that is damaged or of another network.
    """
    if kind not in _LOADERS:
        raise ValueError(f"unknown detector '{kind}'; it must be one of {', '.join(_LOADERS)}")
    path, device = Path(weights), torch.device(device)
    load, remedy = _LOADERS[kind]
    if not path.is_file():
        raise FileNotFoundError(f"no weights of the {kind} detector at '{path}'; {remedy}")
    digest = store.file_digest(path)
    try:
        return load(path, digest, device)
    except (RuntimeError, SafetensorError, UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"'{path}' holds no weights of the {kind} detector ({reason}); {remedy}") from error


def _load_fashion(path: Path, digest: str, device: torch.device) -> Detector:
    model = FashionDetector()
    model.load_state_dict(load_file(path))
    model.to(device).eval().requires_grad_(False)
    dimension = model.feature_dimension
    name = f"fashion-mnist classifier (demo, {dimension} features; not comparable with Inception FID)"
    return Detector(name, digest, dimension, False, model.features, device)


def _load_inception(path: Path, digest: str, device: torch.device) -> Detector:
    import mmfm.infra.torchvision_ops  # noqa: F401  # isort: skip  (torch-fidelity imports torchvision)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # torch-fidelity unpickles without restriction, so the file is read by the safe loader first.
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError("no state dict of tensors")
    network: nn.Module = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
    )
    network.to(device).eval()
    # The file is named by the first digits of its hash, as torch.hub names weights.
    standard = digest.startswith(INCEPTION_FILE.removesuffix(".pth").rsplit("-", 1)[1])
    name = (
        "Inception v3 of 2015-12-05 (pool3, 2048 features; the network of published FIDs)"
        if standard
        else f"Inception v3 with other weights ({path.name}, 2048 features; not comparable with published FIDs)"
    )
    return Detector(name, digest, 2048, standard, lambda images: network(images)[0], device)


_LOADERS: dict[str, tuple[Callable[[Path, str, torch.device], Detector], str]] = {
    "fashion": (_load_fashion, "make it with tools/train_detector.py"),
    "inception": (
        _load_inception,
        f"download {INCEPTION_URL} and set fid.weights to the file ({INCEPTION_FILE}, 95.7 MB)",
    ),
}
