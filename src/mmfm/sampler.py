"""From image numbers to images: source, flow, decoder. Image i depends on (seed, i) and on nothing else."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfm import config, draws, rae
from mmfm.decoder import load_decoder
from mmfm.flow.guidance import autoguidance, classifier_free_guidance
from mmfm.flow.path import time_grid, time_shift
from mmfm.flow.solver import adaptive, euler, heun
from mmfm.flow.source import Source, source_for
from mmfm.infra import rng, store
from mmfm.infra.precision import autocast, uses_bf16
from mmfm.models.dit import DiT
from mmfm.sample_files import SampleFiles, compare, setting_of, trained_means
from mmfm.training.checkpoint import load_ema

SOLVERS: dict[str, tuple[Callable[..., Tensor], int]] = {"euler": (euler, 1), "heun": (heun, 2)}
"""Solvers with given steps, and their network evaluations a step."""


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
        digests: digests of all inputs.
        files: where these lie, by the same names.
        latent_shape: (C, H, W).
        image_size: S, pixels.
        precision: of the network: ``float32`` or ``bf16``; ``reference`` has state and time of the solver in bf16 too
            (they are float32 otherwise, and the decoder always is).
        means_precision: of the source's means, as in training: ``float32`` or ``bf16``; None for a source without them.
        guidance: ``autoguidance``, ``classifier-free`` or None.
    """

    def __init__(
        self, files: SampleFiles, sections: dict[str, Any], seed: int | None, device: torch.device | str,
        expected: str | None = None,
    ) -> None:  # fmt: skip
        """Load everything and check that it belongs together.

        Args:
            sections: built sections ``image``, ``encoder``, ``sample``.
            seed: of noise, modes and labels; None: that of the training.
            expected: setting that the weights must be of; None: any.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: files that do not belong together; the message names the file and the remedy.
        """
        self.device = torch.device(device)
        self.settings: config.Sample = sections["sample"]
        self.model, self.weights = load_ema(files.ema, self.device)
        self.setting = setting_of(self.weights)
        if expected is not None and expected != self.weights["setting"]:
            raise ValueError(
                f"the weights {files.ema} are of setting '{self.weights['setting']}', not '{expected}'; give those of "
                f"'{expected}', or train them"
            )
        sizes = self.model.config
        self.latent_shape = (sizes.in_channels, sizes.input_size, sizes.input_size)
        self.digests = files.digests(self.weights)
        self.files = {"encoder" if name == "encoder_weights" else name: path for name, path in vars(files).items()}
        self.seed = seed if seed is not None else int(self.weights.get("seed") or 0)
        self.guide, self.guide_weights = self._load_guide(files)
        self.guidance = self._guidance_kind()
        host = self.settings.means_device == "host"
        bf16_means = uses_bf16(trained_means(self.weights), self.device)
        self.source: Source = source_for(
            self.weights["setting"], files.spatial_gmm, self.device, means_device="cpu" if host else self.device,
            dtype=torch.bfloat16 if bf16_means else torch.float32,
        )  # fmt: skip
        self.means_precision = ("bf16" if bf16_means else "float32") if self.source.num_modes else None
        self._check_labels(files)
        self.times = time_grid(self.settings.time_points, time_shift(self.latent_shape))
        bf16 = uses_bf16(self.settings.precision, self.device)
        self.precision = "reference" if self.settings.precision == "reference" else "bf16" if bf16 else "float32"
        self.autoencoder = self._load_autoencoder(files, sections["encoder"].family)
        self.image_size = self.autoencoder.require_image_size(sections["image"].size, files.decoder)

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

    def _guidance_kind(self) -> str | None:
        if self.guide is not None:
            return "autoguidance"
        if self.settings.guidance.scale == 1:
            return None
        if self.model.null_label is None:
            raise ValueError(
                f"sample.guidance.scale is {self.settings.guidance.scale:g}, but the weights of setting "
                f"'{self.weights['setting']}' can't do without a label (no label dropout in their training), which "
                "classifier-free guidance needs; set it to 1, or give the weaker model of autoguidance: --guide"
            )
        return "classifier-free"

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
        for part in ("encoder", "stats", "spatial_gmm"):
            if part in self.digests:
                compare({}, part, self.digests[part], f"the {part} of the guided model (guide {files.guide})", weights)
        self.digests["guide"] = weights["digest"]
        return model, weights

    def _load_autoencoder(self, files: SampleFiles, family: str) -> rae.RAE:
        decoder = load_decoder(files.decoder, self.device, latent_dim=self.latent_shape[0])
        processor = _Processor(family, files.encoder_weights, self.latent_shape).to(self.device)
        statistics = rae.load_statistics(files.stats, self.latent_shape)
        return rae.RAE(processor, decoder, *statistics).requires_grad_(False).eval()

    @property
    def is_adaptive(self) -> bool:
        """Whether the solver chooses its steps: images then depend, within the tolerances, on their batch."""
        return self.settings.solver not in SOLVERS

    def function_evaluations(self) -> int | None:
        """Return the evaluations of the velocity per image, or None where the solver chooses its steps.

        With a guide each is one of either network, with classifier-free guidance one on twice the batch.
        """
        return None if self.is_adaptive else (len(self.times) - 1) * SOLVERS[self.settings.solver][1]

    def draw_source(self, numbers: range) -> tuple[Tensor, Tensor | None]:
        """Return x at t = 1, (B, C, H, W) float32, and the modes, (B,) int64 or None, of numbered images."""
        index = torch.arange(numbers.start, numbers.stop, device=self.device)
        modes = None
        if self.source.num_modes:
            modes = self.source.draw_modes(draws.mode_uniforms(self.seed, index, self.settings.mode_draw))
        noise = rng.normal(self.seed, "sample/noise", index, self.latent_shape)
        return self.source.draw(modes, noise), modes

    def draw_labels(self, numbers: range, modes: Tensor | None) -> Tensor | None:
        """Return what the model sees of numbered images: their modes, class labels (B,) int64, or None."""
        if self.setting.condition != "class":
            return modes if self.setting.condition == "mode" else None
        index = torch.arange(numbers.start, numbers.stop, device=self.device)
        return draws.class_labels(self.seed, index, self.model.config.num_classes, self.settings.label_draw)

    @torch.inference_mode()
    def generate(self, numbers: range, watch: Callable[[int], None] = lambda evaluations: None) -> tuple[Tensor, int]:
        """Generate the images with these numbers: (B, 3, S, S) uint8, and the evaluations that each took.

        Args:
            watch: called with the evaluations so far of a solver that chooses its steps.
        """
        x, modes = self.draw_source(numbers)
        velocity = self._velocity(self.draw_labels(numbers, modes))
        if self.is_adaptive:
            settings = self.settings
            x, evaluations = adaptive(velocity, x, self.times, settings.solver, settings.rtol, settings.atol, watch)
            return self._decode(x), evaluations
        solve, _ = SOLVERS[self.settings.solver]
        dtype = torch.bfloat16 if self.precision == "reference" else torch.float32
        return self._decode(solve(velocity, x, self.times, dtype=dtype).float()), self.function_evaluations()

    @torch.inference_mode()
    def source_images(self, numbers: range) -> Tensor:
        """Decode the source itself, without any step of the flow: (B, 3, S, S) uint8."""
        return self._decode(self.draw_source(numbers)[0])

    def _decode(self, latents: Tensor) -> Tensor:
        if not latents.isfinite().all():  # would become black images without a word
            raise ValueError("the flow ended in NaN or Inf: damaged weights, or too strong a guidance; check both")
        return rae.to_uint8(self.autoencoder.decode(latents))

    def _velocity(self, labels: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """The field that the solver follows, guided where guidance is asked for."""
        guidance = self.settings.guidance
        if self.guidance == "classifier-free":
            null = self.model.null_label
            return classifier_free_guidance(self._network(self.model), labels, null, guidance.scale, guidance.interval)
        network = self._network(self.model)
        own = partial(network, y=labels)
        if self.guidance is None:
            return own
        weaker = partial(self._network(self.guide), y=labels)
        return autoguidance(own, weaker, guidance.scale, guidance.interval)

    def _network(self, model: DiT) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        def velocity(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            with autocast(self.settings.precision, self.device):
                return model(x, t, y)

        return velocity
