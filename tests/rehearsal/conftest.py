"""ImageNet at 256 x 256 without memory: the model, the mixtures and the autoencoder at their real sizes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch

import mmfm.infra.torchvision_ops  # noqa: F401  (before transformers is imported)
from mmfm import config
from mmfm.autoencoder.decoder import Decoder, DecoderConfig
from mmfm.autoencoder.encoders import Encoder
from mmfm.autoencoder.families import dinov2
from mmfm.autoencoder.family import Backbone
from mmfm.autoencoder.rae import RAE
from mmfm.config import Config
from mmfm.config.choices import SETTINGS
from mmfm.flow.path import time_shift
from mmfm.flow.source import GaussianSource, MixtureSource
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.mapped_rows import MappedRows
from mmfm.training.objective import FlowMatching
from support.places import ROOT
from support.rehearsal import CLASSES, IMAGES, META, SHAPE, device_without_memory, on_meta


@pytest.fixture(scope="session")
def full() -> Config:
    """The configuration of ImageNet at 256 x 256."""
    return config.load([ROOT / "config" / "config.yaml", ROOT / "config" / "imagenet256.yaml"])


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The meta device, in the place of a GPU."""
    with device_without_memory(monkeypatch) as found:
        yield found


@pytest.fixture(scope="session")
def mixture(full: Config) -> Mixture:
    """A mixture of 8192 modes with its tables, made with values and then moved to the meta device."""
    k = full.gmm.n_components
    generator = torch.Generator().manual_seed(0)
    made = Mixture(torch.full((k,), 1 / k), torch.randn(k, SHAPE[0], generator=generator), torch.ones(k, SHAPE[0]))
    made.posterior(made.means[:1].float())  # as training does before its first step
    return on_meta(made)


@pytest.fixture(scope="session")
def source(full: Config) -> MixtureSource:
    """The spatial mixture with its means in bf16."""
    k = full.gmm.n_components
    means = torch.empty((k, *SHAPE), dtype=torch.bfloat16, device=META)
    return MixtureSource(means, torch.ones(k, dtype=torch.float64), torch.full((k,), 1 / k), META)


class Unread(MappedRows):
    """Variances of all positions and modes, in files that are not there."""

    def __init__(self, modes: int) -> None:
        self.shape = (modes, *SHAPE)

    def gather(self, rows: torch.Tensor, pinned: bool = False) -> torch.Tensor:
        assert rows.device.type == "cpu" and len(rows) <= 16
        return torch.ones(len(rows), *SHAPE)


@pytest.fixture(scope="session")
def diagonal_source(source: MixtureSource) -> MixtureSource:
    """The same with a variance per position, from the disk."""
    return MixtureSource(source.means, Unread(source.num_modes), source.weights, META)


Task = Callable[[str], FlowMatching]


@pytest.fixture
def task(full: Config, mixture: Mixture, source: MixtureSource) -> Task:
    """The loss of a setting."""

    def make(setting: str) -> FlowMatching:
        mixed, condition = SETTINGS[setting].mixture, SETTINGS[setting].condition
        train = replace(full.train, logger="none").effective(SETTINGS[setting])
        classes = (torch.arange(IMAGES) % CLASSES, CLASSES) if condition == "class" else None
        return FlowMatching(
            setting,
            source if mixed else GaussianSource(),
            mixture if mixed else None,
            train,
            time_shift(SHAPE),
            classes,
        )

    return make


@pytest.fixture(scope="session")
def autoencoder(full: Config) -> RAE:
    """DINOv2-base with registers, and the decoder of the preset."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    d = full.decoder
    sizes = DecoderConfig(SHAPE[0], d.hidden_size, d.intermediate_size, d.num_heads, d.num_layers, 16, 256)
    with META, mock.patch.object(Decoder, "initialize_weights"):
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(image_size=518, patch_size=14))
        backbone = Backbone(model, partial(dinov2.FAMILY.run, model), SHAPE[0], 14, [0.5] * 3, [0.5] * 3)
        encoder = Encoder("dinov2", backbone, 224)
        return RAE(encoder, Decoder(sizes), torch.zeros(SHAPE), torch.ones(SHAPE)).requires_grad_(False).eval()
