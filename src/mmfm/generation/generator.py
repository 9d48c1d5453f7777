"""From the numbers of images to images: source, flow, decoder. Image i depends on (seed, i) and on nothing else.

`sample`, the previews and distances of a training run, and whoever loads a model by hand generate here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfm.autoencoder import rae
from mmfm.config.choices import SETTINGS, SOLVERS
from mmfm.flow.solver import VelocityFn, solve
from mmfm.flow.source import Source
from mmfm.generation import draws
from mmfm.infra import rng

Field = Callable[[Tensor | None], VelocityFn]
"""Labels (B,) int64, or None -> the velocity that the flow follows, (x, t) -> (B, C, H, W)."""


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
        mode_draw, label_draw: see :mod:`mmfm.generation.draws`.
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

    def draw_source(self, numbers: range) -> tuple[Tensor, Tensor | None]:
        """Return x at t = 1, (B, C, H, W) float32, and the modes, (B,) int64 or None, of numbered images."""
        index = torch.arange(numbers.start, numbers.stop, device=self.device)
        modes = None
        if self.source.num_modes:
            uniforms = draws.mode_uniforms(self.seed, index, self.mode_draw, f"{self.purpose}/mode")
            modes = self.source.draw_modes(uniforms)
        noise = rng.normal(self.seed, f"{self.purpose}/noise", index, self.latent_shape)
        return self.source.draw(modes, noise), modes

    def draw_labels(self, numbers: range, modes: Tensor | None) -> Tensor | None:
        """Return what the model sees of numbered images: their modes, class labels (B,) int64, or None."""
        condition = SETTINGS[self.setting].condition
        if condition != "class":
            return modes if condition == "mode" else None
        index = torch.arange(numbers.start, numbers.stop, device=self.device)
        return draws.class_labels(self.seed, index, self.num_labels, self.label_draw, f"{self.purpose}/label")

    @torch.no_grad()
    def latents(
        self, field: Field, numbers: range, watch: Callable[[int], None] = lambda evaluations: None
    ) -> tuple[Tensor, int]:
        """Follow the flow from the source of numbered images to their latents (B, C, H, W) float32.

        Args:
            watch: called with the evaluations so far of a solver that chooses its steps.

        Returns:
            the latents, and the evaluations that each took.
        """
        x, modes = self.draw_source(numbers)
        if len(self.times) == 1:
            return x, 0
        x, evaluations = solve(
            self.solver, field(self.draw_labels(numbers, modes)), x, self.times,
            dtype=self.dtype, rtol=self.rtol, atol=self.atol, watch=watch,
        )  # fmt: skip
        return x.float(), evaluations

    @torch.no_grad()
    def generate(
        self, field: Field, numbers: range, watch: Callable[[int], None] = lambda evaluations: None
    ) -> tuple[Tensor, int]:
        """Generate the images with these numbers: (B, 3, S, S) uint8, and the evaluations that each took.

        Raises:
            ValueError: the flow ended in values that are not finite.
        """
        latents, evaluations = self.latents(field, numbers, watch)
        if not latents.isfinite().all():  # would silently become black images
            raise ValueError(
                "the flow ends in NaN or Inf: damaged weights, too strong a guidance, or too high a learning rate"
            )
        return self.decode(latents), evaluations

    @torch.no_grad()
    def source_images(self, numbers: range) -> Tensor:
        """Decode the source itself, without any step of the flow: (B, 3, S, S) uint8."""
        return self.decode(self.draw_source(numbers)[0])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> images (B, 3, S, S) uint8."""
        return rae.to_uint8(self.autoencoder.decode(latents))
