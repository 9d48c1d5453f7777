"""Generates images from their numbers: source, flow, decoder. Image i depends only on the model and on (seed, i).

Used by `sample`, by the previews and distances of a training run, and by the Python API.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmfm.autoencoder import rae
from mmfm.config.choices import SETTINGS, SOLVERS
from mmfm.flow.solver import VelocityFn, solve
from mmfm.flow.source import Source
from mmfm.generation import conditioning
from mmfm.infra import rng
from mmfm.infra.transfer import to_device

Field = Callable[[Tensor | None], VelocityFn]
"""Labels (B,) int64, or None -> the velocity field (x, t) -> (B, C, H, W)."""

Watch = Callable[[int], None]
"""Called with the number of evaluations so far, only by an adaptive solver."""


def ignore(evaluations: int) -> None:
    """Do nothing: the default :data:`Watch`."""


class Draw(NamedTuple):
    """The random draws of some images.

    Attributes:
        noise: (B, C, H, W), standard normal, in the generator's dtype.
        modes: (B,) int64, modes of the source; None for a source without modes. Drawn ones are on the CPU.
        labels: (B,) int64 on the generator's device, the modes or classes that the model sees; None for an
            unconditional model.
    """

    noise: Tensor
    modes: Tensor | None
    labels: Tensor | None


@dataclass(frozen=True)
class Generator:
    """Everything that determines an image besides the network.

    Attributes:
        setting: name in :data:`mmfm.config.choices.SETTINGS`.
        source: where paths start.
        num_labels: number of labels that the network knows; 0 for none.
        autoencoder: decodes latents.
        latent_shape: (C, H, W).
        times: (T,) time grid, decreasing from 1; with a single time point no step is taken.
        seed: of noise, modes and labels.
        device: where to compute.
        purpose: key of the random numbers; each purpose has its own.
        solver: name in :data:`mmfm.config.choices.SOLVERS`.
        dtype: of noise and source, and of the state and time of a fixed-step solver. With bfloat16 the decoder runs in
            bf16 autocast.
        rtol, atol: tolerances of an adaptive solver.
        mode_draw, label_draw: see :mod:`mmfm.generation.conditioning`.
    """

    setting: str
    source: Source
    num_labels: int
    autoencoder: rae.RAE
    latent_shape: tuple[int, int, int]
    times: Tensor
    seed: int
    device: torch.device
    purpose: str = "sample"
    solver: str = "euler"
    dtype: torch.dtype = torch.float32
    rtol: float = 0.0
    atol: float = 0.0
    mode_draw: str = "multinomial"
    label_draw: str = "equal"

    @property
    def is_adaptive(self) -> bool:
        """Whether the solver is adaptive: images then depend on their batch, within the tolerances."""
        return SOLVERS[self.solver].adaptive

    def function_evaluations(self) -> int | None:
        """Return the velocity evaluations per image; None for an adaptive solver.

        An evaluation runs both networks with autoguidance, and the network on a doubled batch with classifier-free
        guidance.
        """
        each = SOLVERS[self.solver].evaluations
        return None if each is None else each * (len(self.times) - 1)

    def draw(self, numbers: range, modes: Tensor | None = None, labels: Tensor | None = None) -> Draw:
        """Draw noise, modes and labels of the images with these numbers.

        Args:
            modes, labels: (B,) int64, used instead of drawn ones.
        """
        # Modes and classes are few, and tables on the host decide them: a device would have to be waited for.
        index = torch.arange(numbers.start, numbers.stop)
        if modes is None and self.source.num_modes:
            uniforms = conditioning.mode_uniforms(self.seed, index, self.mode_draw, f"{self.purpose}/mode")
            modes = self.source.draw_modes(uniforms)
        condition = SETTINGS[self.setting].condition
        if condition == "mode":
            labels = modes
        elif condition == "class" and labels is None:
            labels = conditioning.class_labels(
                self.seed, index, self.num_labels, self.label_draw, f"{self.purpose}/label"
            )
        index = torch.arange(numbers.start, numbers.stop, device=self.device)
        noise = rng.normal(self.seed, f"{self.purpose}/noise", index, self.latent_shape)
        return Draw(noise.to(self.dtype), modes, None if labels is None else to_device(labels, self.device))

    def draw_source(self, numbers: range) -> Tensor:
        """Return x at t = 1 of the images with these numbers, (B, C, H, W) in the generator's dtype."""
        drawn = self.draw(numbers)
        return self.source.draw(drawn.modes, drawn.noise)

    @torch.no_grad()
    def follow(self, velocity: VelocityFn, x: Tensor, watch: Watch = ignore) -> tuple[Tensor, int]:
        """Follow the flow from x at t = 1, (B, C, H, W), to latents.

        Args:
            velocity: the velocity field, with labels bound.

        Returns:
            latents (B, C, H, W) float32, and the number of evaluations per image.
        """
        if len(self.times) == 1:
            return x.float(), 0
        x, evaluations = solve(
            self.solver, velocity, x, self.times, dtype=self.dtype, rtol=self.rtol, atol=self.atol, watch=watch
        )
        return x.float(), evaluations

    def latents(self, field: Field, numbers: range, watch: Watch = ignore) -> tuple[Tensor, int]:
        """Generate the latents of the images with these numbers; returns as :meth:`follow`."""
        drawn = self.draw(numbers)
        return self.follow(field(drawn.labels), self.source.draw(drawn.modes, drawn.noise), watch)

    def generate(self, field: Field, numbers: range, watch: Watch = ignore) -> tuple[Tensor, int]:
        """Generate the images with these numbers.

        Returns:
            images (B, 3, S, S) uint8, and the number of evaluations per image.

        Raises:
            ValueError: the flow ends in NaN or Inf.
        """
        latents, evaluations = self.latents(field, numbers, watch)
        return self.decode(require_finite(latents)), evaluations

    @torch.no_grad()
    def source_images(self, numbers: range) -> Tensor:
        """Decode the source samples themselves, without the flow: (B, 3, S, S) uint8."""
        return self.decode(self.draw_source(numbers))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, H, W) to images (B, 3, S, S) uint8."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            images = self.autoencoder.decode(latents)
        return rae.to_uint8(images)


def require_finite(latents: Tensor) -> Tensor:
    """Return the latents unchanged; raise ValueError on NaN or Inf, which would decode to black images."""
    if not latents.isfinite().all():
        raise ValueError(
            "the flow ends in NaN or Inf: the weights are damaged, the guidance is too strong (lower "
            "sample.guidance.scale), or the learning rate was too high (lower train.lr)"
        )
    return latents
