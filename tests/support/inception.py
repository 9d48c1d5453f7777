"""An Inception network without the published weights."""

from pathlib import Path

import pytest
import torch


def write_lively_inception(path: Path) -> torch.nn.Module:
    """Write random Inception weights whose features differ between images, and return the network as a torch module.

    With the usual initial weights the signal dies on the way: variance-preserving ones keep it (He et al. 2015).
    """
    import mmfm.infra.torchvision_ops  # noqa: F401  # isort: skip  (torch-fidelity imports torchvision)
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for name, value in network.state_dict().items():
        if name.endswith("conv.weight"):
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
        elif name.endswith(("bn.weight", "bn.running_var")):
            value.fill_(1)
        elif name.endswith(("bn.bias", "bn.running_mean")):
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    network.fc.weight.copy_(2 * torch.randn(network.fc.weight.shape, generator=generator))
    torch.save(network.state_dict(), path)
    return network
