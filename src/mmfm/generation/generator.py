"""From the numbers of images to images: source, flow, decoder. Image i depends on (seed, i) and on nothing else.

`sample`, the previews and distances of a training run, and whoever loads a model by hand generate here.
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

Field = Callable[[Tensor | None], VelocityFn]
"""Labels (B,) int64, or None -> the velocity that the flow follows, (x, t) -> (B, C, H, W)."""


class Draw(NamedTuple):
    """What images start from.

    Attributes:
        noise: (B, C, H, W) float32, standard normal.
        modes: (B,) int64, of the source; None for a source without modes.
        labels: (B,) int64, what the model sees: modes or classes; None if nothing.
    """

    noise: Tensor
    modes: Tensor | None
    labels: Tensor | None


@dataclass(frozen=True)
class Generator:
    """What determines an image besides the network.

    Attributes:
        setting: name in :data:`mmfm.config.choices.SETTINGS`.
        source: where paths start.
        num_labels: labels that the network knows; 0 for none.
        autoencoder: decodes latents.
        latent_shape: (C, H, W).
        times: (T,) grid of the solver, from 1 on; a single point takes no step.
        seed: of noise, modes and labels.
        purpose: what the images are for; each purpose has random numbers of its own.
        solver: name in :data:`mmfm.config.choices.SOLVERS`.
        dtype: of the solver's state and time, where the steps are given.
        rtol, atol: of a solver that chooses its steps.
        mode_draw, label_draw: see :mod:`mmfm.generation.conditioning`.
        device: where everything happens.
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
        """Whether the solver chooses its steps: images then depend, within the tolerances, on their batch."""
        return SOLVERS[self.solver].adaptive

    def function_evaluations(self) -> int | None:
        """Return the evaluations of the velocity per image, or None where the solver chooses its steps.

        With a guide each is one of either network, with classifier-free guidance one on twice the batch.
        """
        each = SOLVERS[self.solver].evaluations
        return None if each is None else each * (len(self.times) - 1)

    def draw(self, numbers: range, modes: Tensor | None = None, labels: Tensor | None = None) -> Draw:
        """Draw what numbered images start from.

        Args:
            modes, labels: (B,) int64, in the place of those that would be drawn.
        """
        index = torch.arange(numbers.start, numbers.stop, device=self.device)
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
        return Draw(rng.normal(self.seed, f"{self.purpose}/noise", index, self.latent_shape), modes, labels)

    def draw_source(self, numbers: range) -> Tensor:
        """Return x at t = 1 of numbered images, (B, C, H, W) float32."""
        drawn = self.draw(numbers)
        return self.source.draw(drawn.modes, drawn.noise)

    @torch.no_grad()
    def follow(
        self, velocity: VelocityFn, x: Tensor, watch: Callable[[int], None] = lambda evaluations: None
    ) -> tuple[Tensor, int]:
        """Follow the flow from x at t = 1, (B, C, H, W), to latents (B, C, H, W) float32.

        Args:
            velocity: of the flow, labels already bound.
            watch: called with the evaluations so far of a solver that chooses its steps.

        Returns:
            the latents, and the evaluations that each took.
        """
        if len(self.times) == 1:
            return x, 0
        x, evaluations = solve(
            self.solver, velocity, x, self.times, dtype=self.dtype, rtol=self.rtol, atol=self.atol, watch=watch
        )
        return x.float(), evaluations

    def latents(
        self, field: Field, numbers: range, watch: Callable[[int], None] = lambda evaluations: None
    ) -> tuple[Tensor, int]:
        """Follow the flow from the source of numbered images to their latents; see :meth:`follow`."""
        drawn = self.draw(numbers)
        return self.follow(field(drawn.labels), self.source.draw(drawn.modes, drawn.noise), watch)

    def generate(
        self, field: Field, numbers: range, watch: Callable[[int], None] = lambda evaluations: None
    ) -> tuple[Tensor, int]:
        """Generate the images with these numbers: (B, 3, S, S) uint8, and the evaluations that each took.

        Raises:
            ValueError: the flow ended in values that are not finite.
        """
        latents, evaluations = self.latents(field, numbers, watch)
        return self.decode(require_finite(latents)), evaluations

    @torch.no_grad()
    def source_images(self, numbers: range) -> Tensor:
        """Decode the source itself, without any step of the flow: (B, 3, S, S) uint8."""
        return self.decode(self.draw_source(numbers))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> images (B, 3, S, S) uint8."""
        return rae.to_uint8(self.autoencoder.decode(latents))


def require_finite(latents: Tensor) -> Tensor:
    """Return latents (B, C, H, W) as they are, or raise ValueError: they would silently become black images."""
    if not latents.isfinite().all():
        raise ValueError(
            "the flow ends in NaN or Inf: damaged weights, too strong a guidance (sample.guidance.scale), or too "
            "high a learning rate (train.lr)"
        )
    return latents
