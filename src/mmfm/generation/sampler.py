"""A trained model, loaded with all that turns its numbers into images."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfm.autoencoder import rae
from mmfm.autoencoder.decoder import load_decoder
from mmfm.config import Encoder, Sample
from mmfm.config.choices import SETTINGS, Setting
from mmfm.flow.path import time_grid, time_shift
from mmfm.flow.source import Source, source_for
from mmfm.generation import networks
from mmfm.generation.generator import Generator
from mmfm.infra import store
from mmfm.infra.precision import uses_bf16
from mmfm.models.dit import DiT
from mmfm.models.weights import load_ema


@dataclass(frozen=True)
class SampleFiles:
    """Files that `sample` reads; ``spatial_gmm`` in the settings with a mixture, ``guide`` for autoguidance."""

    ema: Path
    decoder: Path
    stats: Path
    encoder_weights: Path
    spatial_gmm: Path | None = None
    guide: Path | None = None


class _Processor(nn.Module):
    """What decoding needs of an encoder: shape of its latents and pixel normalisation, without its weights."""

    def __init__(self, family: str, folder: Path, latent_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.family, self.hidden_size, self.grid = family, latent_shape[0], latent_shape[1:]
        values = store.read_json(folder / "preprocessor_config.json")
        for name in ("image_mean", "image_std"):
            if name not in values:
                raise ValueError(f"'{folder}/preprocessor_config.json' has no {name}; fetch the encoder again")
            self.register_buffer(name, torch.tensor(values[name], dtype=torch.float32))


class Sampler:
    """Generates images by their numbers.

    Attributes:
        weights: metadata of the EMA weights.
        guide_weights: metadata of the guide's weights, or None.
        latent_shape: (C, H, W).
        image_size: S, pixels.
        precision: of the network: ``float32`` or ``bf16``; ``reference`` has state and time of the solver in bf16 too
            (they are float32 otherwise, and the decoder always is).
        means_precision: of the source's means, as in training: ``float32`` or ``bf16``; None for a source without them.
        guidance: ``autoguidance``, ``classifier-free`` or None.
        generator: source, flow and decoder.
    """

    def __init__(
        self, files: SampleFiles, settings: Sample, encoder: Encoder, image_size: int, seed: int | None,
        device: torch.device | str, expected: str | None = None,
    ) -> None:  # fmt: skip
        """Load everything and check that it fits.

        Args:
            settings: the section ``sample``.
            encoder: the section ``encoder``.
            image_size: ``image.size``.
            seed: of noise, modes and labels; None: that of the training.
            expected: setting that the weights must be of; None: any.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: files that do not fit each other; the message names the file and the remedy.
        """
        self.device = torch.device(device)
        self.model, self.weights = load_ema(files.ema, self.device)
        self.setting = setting_of(self.weights)
        if expected is not None and expected != self.weights["setting"]:
            raise ValueError(
                f"the weights {files.ema} are of setting '{self.weights['setting']}', not '{expected}'; give those of "
                f"'{expected}', or train them"
            )
        sizes = self.model.config
        self.latent_shape = (sizes.in_channels, sizes.input_size, sizes.input_size)
        self.guide, self.guide_weights = self._load_guide(files)
        self._require_guidance(settings)
        means = trained_means(self.weights)
        self.source: Source = source_for(
            self.weights["setting"], files.spatial_gmm, self.device, means_device=settings.means_device, precision=means
        )
        bf16_means = uses_bf16(means, self.device)
        self.means_precision = ("bf16" if bf16_means else "float32") if self.source.num_modes else None
        self._check_labels(files)
        self.autoencoder = self._load_autoencoder(files, encoder.family)
        self.image_size = self.autoencoder.require_image_size(image_size, files.decoder)
        self._set(settings, seed if seed is not None else int(self.weights.get("seed") or 0))

    def varied(self, settings: Sample, seed: int | None = None) -> "Sampler":
        """Return a sampler of the same networks, source and decoder with other settings, or another seed.

        Raises:
            ValueError: guidance that the weights can't do.
        """
        self._require_guidance(settings)
        other = copy.copy(self)
        other._set(settings, self.seed if seed is None else seed)
        return other

    def _set(self, settings: Sample, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.guidance = self._guidance_kind(settings)
        self.times = time_grid(settings.time_points, time_shift(self.latent_shape))
        bf16 = uses_bf16(settings.precision, self.device)
        self.precision = "reference" if settings.precision == "reference" else "bf16" if bf16 else "float32"
        self.generator = Generator(
            self.weights["setting"], self.source, self.model.config.num_classes, self.autoencoder, self.latent_shape,
            self.times, self.seed, self.device, solver=settings.solver, rtol=settings.rtol, atol=settings.atol,
            dtype=torch.bfloat16 if self.precision == "reference" else torch.float32,
            mode_draw=settings.mode_draw, label_draw=settings.label_draw,
        )  # fmt: skip
        self.field = networks.guided(self.model, self.guide, settings.guidance, settings.precision, self.device)

    def _check_labels(self, files: SampleFiles) -> None:
        """Raise ValueError if the label table of the weights does not fit their setting or the mixture."""
        labels, name = self.model.config.num_classes, self.weights["setting"]
        if (labels > 0) != (self.setting.condition is not None):
            raise ValueError(
                f"the weights {files.ema} say that they are of setting '{name}', but know {labels} labels; they are "
                "damaged or badly imported: make them again"
            )
        if self.setting.condition == "mode" and self.source.num_modes != labels:
            raise ValueError(
                f"the weights know {labels} modes, the spatial mixture {files.spatial_gmm} has "
                f"{self.source.num_modes}; give the mixture they were trained with"
            )

    def _guidance_kind(self, settings: Sample) -> str | None:
        if self.guide is not None:
            return "autoguidance"
        return None if settings.guidance.scale == 1 else "classifier-free"

    def _require_guidance(self, settings: Sample) -> None:
        """Raise ValueError if the weights can't do what the settings ask for."""
        if self._guidance_kind(settings) == "classifier-free" and self.model.null_label is None:
            raise ValueError(
                f"sample.guidance.scale is {settings.guidance.scale:g}, but the weights of setting "
                f"'{self.weights['setting']}' can't do without a label (no label dropout in their training), which "
                "classifier-free guidance needs; set it to 1, or give the weaker model of autoguidance: --guide"
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
                "guide that was trained on the same encoder's latents"
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

    def generate(self, numbers: range, watch: Callable[[int], None] = lambda evaluations: None) -> tuple[Tensor, int]:
        """Generate the images with these numbers; see :meth:`mmfm.generation.generator.Generator.generate`."""
        return self.generator.generate(self.field, numbers, watch)


def setting_of(weights: dict[str, Any]) -> Setting:
    """Return the setting that weights say they are of.

    Raises:
        ValueError: it is none of this project.
    """
    if weights.get("setting") not in SETTINGS:
        raise ValueError(
            f"the weights are of setting {weights.get('setting')!r}; sample knows {', '.join(SETTINGS)}: "
            "train or import them again"
        )
    return SETTINGS[weights["setting"]]


def trained_means(weights: dict[str, Any]) -> str:
    """Return the key ``train.means_precision`` that weights were trained with; float32 where they don't say."""
    return weights.get("settings", {}).get("train", {}).get("means_precision", "float32")
