"""Inception v3 of 2015-12-05, which defines FID (Heusel et al. 2017); torchvision's network is a different one."""

from pathlib import Path

import torch
from torch import Tensor, nn

from mmfm.config.choices import INCEPTION_FILE
from mmfm.evaluation.detector import Detector


def load(path: Path, digest: str, device: torch.device) -> Detector:
    """Load the network from torch-fidelity's file."""
    import mmfm.infra.torchvision_ops  # noqa: F401  # isort: skip  (torch-fidelity imports torchvision)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # torch-fidelity unpickles arbitrary objects, so check the file with the safe loader first.
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError("not a state dict of tensors")
    network: nn.Module = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
    )
    network.to(device).eval()
    # As usual for torch.hub, the file name ends in the first digits of the hash.
    standard = digest.startswith(INCEPTION_FILE.removesuffix(".pth").rsplit("-", 1)[1])
    name = (
        "Inception v3 of 2015-12-05 (pool3, 2048 features; the network of published FIDs)"
        if standard
        else f"Inception v3 with other weights ({path.name}, 2048 features; not comparable with published FIDs)"
    )
    return Detector(name, digest, 2048, standard, lambda images: network(images)[0], device)
