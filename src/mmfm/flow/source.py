"""Sources of the flow: what x_source (t = 1) is, and which mode of it an image is coupled to.

Unconditional flow matching starts from N(0, I). Mixture-modelling flow matching starts from the spatial mixture, one
Gaussian per mode, and couples every image to noise of its own mode (Luo et al. 2026, "Mixture-Modeling Flow
Matching"). A source turns modes and standard noise into x_source; who draws the noise decides how it is keyed.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmfm.config.choices import ASSIGNMENTS, SETTINGS
from mmfm.infra.precision import uses_bf16
from mmfm.mixture.gaussian import Mixture, draw_from_weights, draw_modes
from mmfm.mixture.rows import MappedRows


class Source(Protocol):
    """x_source for given modes and noise; ``num_modes`` is 0 for a source without modes."""

    num_modes: int

    def draw_modes(self, uniforms: Tensor) -> Tensor | None:
        """Modes (B,) int64 for generation from uniforms (B,) in [0, 1); None for a source without modes."""

    def draw(self, modes: Tensor | None, noise: Tensor) -> Tensor:
        """x_source (B, C, H, W) float32 from modes (B,) and standard normal noise (B, C, H, W)."""


class GaussianSource:
    """N(0, I): the noise itself."""

    num_modes = 0

    def draw_modes(self, uniforms: Tensor) -> None:
        """No modes."""
        return None

    def draw(self, modes: Tensor | None, noise: Tensor) -> Tensor:
        """Return ``noise`` (B, C, H, W); ``modes`` must be None."""
        if modes is not None:
            raise ValueError("a Gaussian source has no modes, but some were given; pass modes=None")
        return noise


class MixtureSource:
    """Mixture of spherical or diagonal Gaussians in latent space: x_source = mean_k + sigma_k * noise.

    Args:
        means: (K, C, H, W), any floating dtype. They may lie on another device than the noise (8192 means of
            [768, 16, 16] are 6.4 GB in float32): the rows of a batch are then moved, from pinned memory one by one
            beside the GPU's work. That costs a wait for the modes.
        variances: (K,), one scalar per mode, or (K, C, H, W), one for every position; these may be rows that are read
            from disk batch by batch.
        weights: (K,), their probabilities up to a factor.
        device: where modes are drawn and x_source is made; None: where the means are.

    Raises:
        ValueError: shapes that do not fit, negative or non-finite variances or weights.
    """

    def __init__(
        self,
        means: Tensor,
        variances: Tensor | MappedRows,
        weights: Tensor,
        device: torch.device | str | None = None,
    ) -> None:
        k = len(means)
        if means.ndim != 4 or tuple(variances.shape) not in ((k,), tuple(means.shape)) or tuple(weights.shape) != (k,):
            raise ValueError(
                f"means {tuple(means.shape)}, variances {tuple(variances.shape)} and weights {tuple(weights.shape)} "
                "must be (K, C, H, W), (K,) or (K, C, H, W), and (K,); make the spatial mixture again"
            )
        for name, values in (("variances", variances), ("weights", weights)):
            # Rows on disk are looked at when they are used: all of them are gigabytes.
            if isinstance(values, Tensor) and (not values.isfinite().all() or (values < 0).any()):
                raise ValueError(f"the spatial mixture has negative or non-finite {name}; make it again")
        if weights.sum() <= 0:
            raise ValueError("the weights of the spatial mixture are all 0; make it again")
        self.device = means.device if device is None else torch.device(device)
        self.means = means
        self.sigma: Tensor | None = None
        self.mapped_variances: MappedRows | None = None
        if isinstance(variances, Tensor):
            self.sigma = variances.double().sqrt().float().to(self.device if variances.ndim == 1 else means.device)
        else:
            self.mapped_variances = variances
        # Drawing cumulates them, and a GPU's parallel scan may round differently from run to run.
        self.weights = weights.double().cpu()

    @property
    def num_modes(self) -> int:
        """K."""
        return len(self.means)

    def draw_modes(self, uniforms: Tensor) -> Tensor:
        """Draw k ~ weights by inverse CDF: the first mode whose cumulated weight exceeds the uniform.

        Args:
            uniforms: (B,) in [0, 1).

        Returns:
            (B,) int64 on the source's device; modes of weight 0 are never drawn.
        """
        return draw_from_weights(self.weights, uniforms).to(self.device)

    def draw(self, modes: Tensor | None, noise: Tensor) -> Tensor:
        """Return mean_k + sigma_k * noise, (B, C, H, W) float32, for modes (B,) int64 and standard normal noise."""
        if modes is None:
            raise ValueError("a mixture source needs the modes (B,); draw them with draw_modes or couple_modes")
        means = self._rows(modes, noise.device).float()
        return torch.addcmul(means, self._sigma(modes).to(noise.device), noise)

    def _sigma(self, modes: Tensor) -> Tensor:
        """Standard deviations (B, 1, 1, 1) or (B, C, H, W) float32 of modes (B,)."""
        if self.sigma is None:
            rows = self.mapped_variances[modes.cpu()].numpy()
            # NumPy rounds a root in float32 as well as one in float64, at a third of the memory; PyTorch does not.
            return torch.from_numpy(np.sqrt(rows, out=rows))
        sigma = self.sigma.index_select(0, modes.to(self.sigma.device))
        return sigma.view(-1, 1, 1, 1) if sigma.ndim == 1 else sigma

    def _rows(self, modes: Tensor, device: torch.device) -> Tensor:
        """Means of modes (B,) on ``device``, in the dtype that they are kept in."""
        rows = modes.to(self.means.device)
        if device.type != "cuda" or not self.means.is_pinned():
            return self.means.index_select(0, rows).to(device)
        gathered = torch.empty((len(rows), *self.means.shape[1:]), dtype=self.means.dtype, device=device)
        for place, row in enumerate(rows.tolist()):
            gathered[place].copy_(self.means[row], non_blocking=True)
        return gathered


def couple_modes(mixture: Mixture, tokens: Tensor, uniforms: Tensor, assignment: str) -> Tensor:
    """Choose the mode of every training image from the posterior of its global token.

    Args:
        mixture: the mixture of the global tokens, K modes.
        tokens: (B, C) float32, of the image as the model sees it (augmented).
        uniforms: (B,) in (0, 1), keyed by the image's place in the training run.
        assignment: ``soft`` draws k ~ p(k | token) by inverse CDF, ``hard`` takes the likeliest.

    Returns:
        (B,) int64.

    Raises:
        ValueError: another assignment.
    """
    ASSIGNMENTS.require(assignment)
    posterior = mixture.posterior(tokens)
    return posterior.argmax(dim=1) if assignment == "hard" else draw_modes(posterior, uniforms)


def source_for(
    setting: str,
    spatial_gmm: str | Path | None,
    device: torch.device | str,
    *,
    means_device: str = "device",
    precision: str = "float32",
) -> Source:
    """Build the source of a setting.

    Args:
        setting: a name in :data:`mmfm.config.choices.SETTINGS`.
        spatial_gmm: the spatial mixture's store; needed by the settings with a mixture, refused by the others' None.
        device: where x_source is made.
        means_device: where the means are kept: ``device``, or ``host``, which spares GPU memory for a transfer per
            batch.
        precision: of the means in memory, as a ``means_precision`` key; bf16 halves them and rounds them to 3 digits.

    Raises:
        ValueError: an unknown setting, or a mixture setting without a spatial mixture.
    """
    if not SETTINGS[setting].mixture:
        return GaussianSource()
    if spatial_gmm is None:
        raise ValueError(f"setting '{setting}' draws its source from a mixture: give --spatial-gmm")
    from mmfm.mixture.spatial import SpatialMixture

    spatial = SpatialMixture.open(spatial_gmm)
    device = torch.device(device)
    place = torch.device("cpu") if means_device == "host" else device
    dtype = torch.bfloat16 if uses_bf16(precision, device) else torch.float32
    means = spatial.load_means(place, dtype, pinned=place.type == "cpu" and device.type == "cuda")
    return MixtureSource(means, spatial.load_variances(), torch.as_tensor(spatial.weights), device)
