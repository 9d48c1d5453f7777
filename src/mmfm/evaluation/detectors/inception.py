"""Inception v3 of 2015-12-05, by which FID is defined (Heusel et al. 2017); torchvision's is another network."""

from pathlib import Path

import torch
from torch import Tensor, nn

from mmfm.config.choices import INCEPTION_FILE
from mmfm.evaluation.detector import Detector


def load(path: Path, digest: str, device: torch.device) -> Detector:
    """Load the network from torch-fidelity's file."""
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
