"""A trained model with everything needed to generate images."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfm.autoencoder import rae
from mmfm.autoencoder.decoder import load_decoder
from mmfm.autoencoder.encoders import Encoder as FrozenEncoder
from mmfm.config import Encoder, Sample
from mmfm.config.choices import SETTINGS, Setting
from mmfm.flow.path import time_grid, time_shift
from mmfm.flow.source import Source, source_for
from mmfm.generation import networks
from mmfm.generation.generator import Generator, Watch, ignore
from mmfm.infra import model_folder
from mmfm.infra.precision import resolved
from mmfm.models.dit import DiT
from mmfm.models.layers import compile_blocks
from mmfm.models.weights import load_ema


@dataclass(frozen=True)
class SampleFiles:
    """Files needed to sample: ``spatial_gmm`` in the settings with a mixture, ``guide`` for autoguidance."""

    ema: Path
    decoder: Path
    stats: Path
    encoder_weights: Path
    spatial_gmm: Path | None = None
    guide: Path | None = None


class _Processor(FrozenEncoder):
    """The part of an encoder that decoding needs: latent shape and pixel normalisation, without the network."""

    def __init__(self, family: str, folder: Path, latent_shape: tuple[int, int, int]) -> None:
        nn.Module.__init__(self)
        self.family, self.hidden_size, self.grid = family, latent_shape[0], latent_shape[1:]
        pixels = model_folder.preprocessing(folder)
        for name, values in (("image_mean", pixels.mean), ("image_std", pixels.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))


class Sampler:
    """Generates the images with given numbers.

    Attributes:
        config: the section ``sample``.
        weights: metadata of the EMA weights.
        guide_weights: metadata of the guide's weights, or None.
        latent_shape: (C, H, W).
        image_size: S, pixels.
        precision: of the network: ``float32``, ``bf16``, or ``reference``. With the last, noise, source, state, time,
            guidance and the decoder's autocast are bf16, too; they are float32 otherwise.
        means_precision: of the source's means, as in training: ``float32``, ``bf16``, or ``reference`` if standard
            deviations are rounded, too; None for a Gaussian source.
        guidance: ``autoguidance``, ``classifier-free`` or None.
        generator: source, flow and decoder.
        field: velocity field of the network with guidance.
    """

    def __init__(
        self,
        files: SampleFiles,
        config: Sample,
        encoder: Encoder,
        image_size: int,
        seed: int | None,
        device: torch.device | str,
        expected: str | None = None,
    ) -> None:
        """Load all files and check that they match.

        Args:
            config: the section ``sample``.
            encoder: the section ``encoder``.
            image_size: ``image.size``.
            seed: of noise, modes and labels; None for the training's seed.
            expected: the setting that the weights must have; None for any.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: files do not match; the message names the file and the remedy.
        """
        self.device = torch.device(device)
        self.model, self.weights = load_ema(files.ema, self.device)
        self.setting = setting_of(self.weights)
        if expected is not None and expected != self.weights["setting"]:
            raise ValueError(
                f"the weights {files.ema} are of setting '{self.weights['setting']}', not '{expected}'; give those of "
                f"'{expected}', or train them first"
            )
        sizes = self.model.config
        self.latent_shape = (sizes.in_channels, sizes.input_size, sizes.input_size)
        self.guide, self.guide_weights = self._load_guide(files)
        self._require_guidance(config, "give the weaker model for autoguidance: --guide")
        means = trained_means(self.weights)
        self.source: Source = source_for(
            self.weights["setting"], files.spatial_gmm, self.device, means_device=config.means_device, precision=means
        )
        self.means_precision = resolved(means, self.device) if self.source.num_modes else None
        self._check_labels(files)
        self.autoencoder = self._load_autoencoder(files, encoder.family)
        self.image_size = self.autoencoder.require_image_size(image_size, files.decoder)
        for network in (self.model, self.guide) if config.compile else ():
            if network is not None:
                compile_blocks(network)
        self._configure(config, seed if seed is not None else int(self.weights.get("seed") or 0))

    def varied(self, config: Sample, seed: int | None = None) -> "Sampler":
        """Return a sampler with another configuration or seed that shares the networks, source and decoder.

        Raises:
            ValueError: these weights do not support the requested guidance.
        """
        self._require_guidance(config, "open a target with autoguidance (`_ag` in its name)")
        other = copy.copy(self)
        other._configure(config, self.seed if seed is None else seed)
        return other

    def _configure(self, config: Sample, seed: int) -> None:
        self.config, self.seed = config, seed
        self.guidance = self._guidance_kind(config)
        self.times = time_grid(config.time_points, time_shift(self.latent_shape))
        self.precision = resolved(config.precision, self.device)
        self.generator = Generator(
            self.weights["setting"],
            self.source,
            self.model.config.num_classes,
            self.autoencoder,
            self.latent_shape,
            self.times,
            self.seed,
            self.device,
            solver=config.solver,
            dtype=torch.bfloat16 if self.precision == "reference" else torch.float32,
            rtol=config.rtol,
            atol=config.atol,
            mode_draw=config.mode_draw,
            label_draw=config.label_draw,
        )
        self.field = networks.guided(self.model, self.guide, config.guidance, config.precision, self.device)

    def _check_labels(self, files: SampleFiles) -> None:
        """Raise ValueError if the number of labels does not match the setting or the mixture."""
        labels, name = self.model.config.num_classes, self.weights["setting"]
        if (labels > 0) != (self.setting.condition is not None):
            raise ValueError(
                f"the weights {files.ema} claim to be of setting '{name}', but know {labels} labels; train or import "
                "them again"
            )
        if self.setting.condition == "mode" and self.source.num_modes != labels:
            raise ValueError(
                f"the weights know {labels} modes, but the spatial mixture {files.spatial_gmm} has "
                f"{self.source.num_modes}; give the mixture they were trained with"
            )

    def _guidance_kind(self, config: Sample) -> str | None:
        if self.guide is not None:
            return "autoguidance"
        return None if config.guidance.scale == 1 else "classifier-free"

    def _require_guidance(self, config: Sample, otherwise: str) -> None:
        """Raise ValueError, with what else the caller can do, if the weights do not support the guidance."""
        if self._guidance_kind(config) == "classifier-free" and self.model.null_label is None:
            raise ValueError(
                f"sample.guidance.scale is {config.guidance.scale:g}, but classifier-free guidance needs weights "
                f"trained with label dropout, and these (setting '{self.weights['setting']}') were not; set it to 1, "
                f"or {otherwise}"
            )

    def _load_guide(self, files: SampleFiles) -> tuple[DiT | None, dict[str, Any] | None]:
        if files.guide is None:
            return None, None
        model, weights = load_ema(files.guide, self.device)
        own, other = self.model.config, model.config
        shape = (other.in_channels, other.input_size, other.input_size)
        if shape != self.latent_shape:
            raise ValueError(
                f"the guide {files.guide} has latents {list(shape)}, the weights {list(self.latent_shape)}; give a "
                "guide trained on latents of the same encoder"
            )
        if weights.get("setting") != self.weights["setting"] or own.num_classes != other.num_classes:
            raise ValueError(
                f"the guide {files.guide} is of setting '{weights.get('setting')}' with {other.num_classes} labels, "
                f"the weights of '{self.weights['setting']}' with {own.num_classes}; train both in the same setting"
            )
        return model, weights

    def _load_autoencoder(self, files: SampleFiles, family: str) -> rae.RAE:
        decoder = load_decoder(files.decoder, self.device, latent_dim=self.latent_shape[0])
        processor = _Processor(family, files.encoder_weights, self.latent_shape).to(self.device)
        statistics = rae.load_statistics(files.stats, self.latent_shape)
        return rae.RAE(processor, decoder, *statistics).requires_grad_(False).eval()

    def generate(self, numbers: range, watch: Watch = ignore) -> tuple[Tensor, int]:
        """Generate the images with these numbers; see :meth:`mmfm.generation.generator.Generator.generate`."""
        return self.generator.generate(self.field, numbers, watch)


def setting_of(weights: Mapping[str, Any]) -> Setting:
    """Return the setting recorded in the weights' metadata.

    Raises:
        ValueError: there is no such setting.
    """
    if weights.get("setting") not in SETTINGS:
        raise ValueError(
            f"the weights are of setting {weights.get('setting')!r}, which is none of {', '.join(SETTINGS)}; train or "
            "import them again"
        )
    return SETTINGS[weights["setting"]]


def trained_means(weights: Mapping[str, Any]) -> str:
    """Return the ``train.means_precision`` that the weights were trained with; float32 if not recorded."""
    return weights.get("settings", {}).get("train", {}).get("means_precision", "float32")
