"""Inception v3 of 2015-12-05, which defines FID (Heusel et al. 2017); torchvision's network is a different one."""

from pathlib import Path

import torch
from torch import Tensor, nn

from mmfm.config.choices import INCEPTION_FILE
from mmfm.evaluation.detector import Detector, Outputs

_SPATIAL_CHANNELS = 7
"""ADM's choice among 192, so that 7 x 17 x 17 = 2023 features are about as many as the 2048 of FID."""


class _Network:
    """Runs torch-fidelity's network, which lacks the layer of sFID's features."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def features(self, images: Tensor) -> Tensor:
        """Compute the features (B, 2048) alone."""
        return self(images).features

    def __call__(self, images: Tensor) -> Outputs:
        """Compute the outputs of images (B, 3, S, S) uint8.

        The spatial features are the first channels of ``mixed_6/conv:0`` in the TensorFlow graph, the output of
        Mixed_6d's branch1x1 here, in the order (row, column, channel) of `mu_s` and `sigma_s` in ADM's reference files.

        Source: Nash et al. 2021, "Generating images with sparse representations", for sFID;
        guided-diffusion/evaluations/evaluator.py for layer, channels and logits.
        """
        caught: list[Tensor] = []
        layer = self.network.get_submodule("Mixed_6d.branch1x1")
        hook = layer.register_forward_hook(lambda module, inputs, output: caught.append(output[:, :_SPATIAL_CHANNELS]))
        try:
            features, logits = self.network(images)
        finally:
            hook.remove()
        return Outputs(features, caught[0].permute(0, 2, 3, 1).flatten(1), logits)


def load(path: Path, digest: str, device: torch.device) -> Detector:
    """Load the network from torch-fidelity's file."""
    import mmfm.infra.torchvision_ops  # noqa: F401  # isort: skip  (torch-fidelity imports torchvision)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # torch-fidelity unpickles arbitrary objects, so check the file with the safe loader first.
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError("not a state dict of tensors")
    network: nn.Module = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    network.to(device).eval()
    # As usual for torch.hub, the file name ends in the first digits of the hash.
    standard = digest.startswith(INCEPTION_FILE.removesuffix(".pth").rsplit("-", 1)[1])
    name = (
        "Inception v3 of 2015-12-05 (pool3, 2048 features; the network of published FIDs)"
        if standard
        else f"Inception v3 with other weights ({path.name}, 2048 features; not comparable with published FIDs)"
    )
    run = _Network(network)
    spatial = _SPATIAL_CHANNELS * 17 * 17
    return Detector(name, digest, 2048, standard, run.features, device, run_all=run, spatial_dimension=spatial)
