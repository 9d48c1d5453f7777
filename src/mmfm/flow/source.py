"""Sources of the flow, the distributions of x_source (t = 1), and the coupling of images to their modes.

Standard flow matching starts from N(0, I). MM-FM starts from the spatial mixture, one Gaussian per mode, and couples
each image to noise from its own mode (Luo et al. 2026, "Flow Matching for Multimodal Distributions"). The caller draws
standard normal noise, which a source turns into x_source.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmfm.config.choices import ASSIGNMENTS, SETTINGS
from mmfm.infra.precision import uses_bf16
from mmfm.infra.transfer import to_device
from mmfm.mixture.gaussian import Mixture, draw_from_weights, draw_modes
from mmfm.mixture.mapped_rows import MappedRows


class Source(Protocol):
    """A distribution of x_source, with or without modes."""

    @property
    def num_modes(self) -> int:
        """Number of modes; 0 for a source without modes."""

    def draw_modes(self, uniforms: Tensor) -> Tensor | None:
        """Draw modes for generation from uniforms (B,) in [0, 1): (B,) int64 on the CPU; None if there are no modes."""

    def draw(self, modes: Tensor | None, noise: Tensor) -> Tensor:
        """Return x_source (B, C, H, W) for modes (B,) and standard normal noise (B, C, H, W), in the noise's dtype.

        The modes may be on the CPU or on the noise's device.
        """


class GaussianSource:
    """N(0, I): the noise itself."""

    num_modes = 0

    def draw_modes(self, uniforms: Tensor) -> None:
        """Return None: there are no modes."""
        return None

    def draw(self, modes: Tensor | None, noise: Tensor) -> Tensor:
        """Return ``noise`` (B, C, H, W); ``modes`` must be None."""
        if modes is not None:
            raise ValueError("a Gaussian source has no modes; pass modes=None")
        return noise


class MixtureSource:
    """Mixture of spherical or diagonal Gaussians in latent space: x_source = mean_k + sigma_k * noise.

    Args:
        means: (K, C, H, W), any floating dtype. They may be on the CPU while the noise is on a GPU, to save its memory
            (8192 means of (768, 16, 16) take 6.4 GB in float32). Each batch then copies the rows that it needs, from
            pinned memory in parallel with the GPU's work.
        variances: (K,), one per mode, or (K, C, H, W), one per latent value; the latter may be read from disk for each
            batch.
        weights: (K,) probabilities, not necessarily normalised.
        device: where x_source is computed; the device of the means by default.
        rounded: whether standard deviations are rounded to bfloat16.

    Raises:
        ValueError: the shapes don't match, or variances or weights are negative or not finite.
    """

    def __init__(
        self,
        means: Tensor,
        variances: Tensor | MappedRows,
        weights: Tensor,
        device: torch.device | str | None = None,
        rounded: bool = False,
    ) -> None:
        k = len(means)
        if means.ndim != 4 or tuple(variances.shape) not in ((k,), tuple(means.shape)) or tuple(weights.shape) != (k,):
            raise ValueError(
                f"means {tuple(means.shape)}, variances {tuple(variances.shape)} and weights {tuple(weights.shape)} "
                "must be (K, C, H, W), (K,) or (K, C, H, W), and (K,); run spatial_gmm again"
            )
        for name, values in (("variances", variances), ("weights", weights)):
            # Variances on disk are gigabytes, too much to check here.
            if isinstance(values, Tensor) and (not values.isfinite().all() or (values < 0).any()):
                raise ValueError(f"the spatial mixture has negative or non-finite {name}; run spatial_gmm again")
        if weights.sum() <= 0:
            raise ValueError("the weights of the spatial mixture are all 0; run spatial_gmm again")
        self.device = means.device if device is None else torch.device(device)
        self.means, self.rounded = means, rounded
        self.sigma: Tensor | MappedRows = variances  # rows on disk stay variances; _sigma takes their square root
        if isinstance(variances, Tensor):
            self.sigma = variances.double().sqrt().float().to(self.device if variances.ndim == 1 else means.device)
        # On the CPU, because the cumulative sum of a GPU may round differently from run to run.
        self.weights = weights.double().cpu()

    @property
    def num_modes(self) -> int:
        """Number of modes K."""
        return len(self.means)

    def draw_modes(self, uniforms: Tensor) -> Tensor:
        """Draw k ~ weights by inverse CDF: the first mode whose cumulative weight exceeds the uniform number.

        Args:
            uniforms: (B,) in [0, 1).

        Returns:
            modes (B,) int64 on the CPU; modes of weight 0 are never drawn.
        """
        return draw_from_weights(self.weights, uniforms)

    def draw(self, modes: Tensor | None, noise: Tensor) -> Tensor:
        """Return mean_k + sigma_k * noise, (B, C, H, W), for modes (B,) int64 and standard normal noise.

        If means or variances are rows that the host looks up, and the modes are on a GPU, it waits for them, once.

        The arithmetic has the noise's dtype: with bfloat16 noise the mean, sigma, the product and the sum are rounded.
        """
        if modes is None:
            raise ValueError("a mixture source needs modes (B,); draw them with draw_modes or couple_modes")
        if self.means.device.type == "cpu" or isinstance(self.sigma, MappedRows):
            modes = modes.cpu()
        means = self._means(modes, noise.device).to(noise.dtype)
        sigma = to_device(self._sigma(modes, noise.device), noise.device)
        if self.rounded:
            sigma = sigma.bfloat16()
        sigma = sigma.to(noise.dtype)
        if noise.dtype == torch.bfloat16:
            return means + sigma * noise  # addcmul would round only once
        return torch.addcmul(means, sigma, noise)

    def _sigma(self, modes: Tensor, device: torch.device) -> Tensor:
        """Standard deviations (B, 1, 1, 1) or (B, C, H, W) float32 of modes (B,), still to be copied to ``device``."""
        if isinstance(self.sigma, MappedRows):
            rows = self.sigma.gather(modes, pinned=device.type == "cuda")
            # NumPy's float32 square root is correctly rounded, so it equals the float64 path above in a third of the
            # memory; PyTorch's is not.
            np.sqrt(rows.numpy(), out=rows.numpy())
            return rows
        sigma = self.sigma.index_select(0, to_device(modes, self.sigma.device))
        return sigma.view(-1, 1, 1, 1) if sigma.ndim == 1 else sigma

    def _means(self, modes: Tensor, device: torch.device) -> Tensor:
        """Means of modes (B,) on ``device``, in the dtype in which they are stored."""
        rows = to_device(modes, self.means.device)
        if device.type != "cuda" or not self.means.is_pinned():
            return to_device(self.means.index_select(0, rows), device)
        gathered = torch.empty((len(rows), *self.means.shape[1:]), dtype=self.means.dtype, device=device)
        for place, row in enumerate(rows.tolist()):
            gathered[place].copy_(self.means[row], non_blocking=True)
        return gathered


def couple_modes(mixture: Mixture, tokens: Tensor, uniforms: Tensor, assignment: str) -> Tensor:
    """Choose the mode of each training image from the posterior of its global token.

    Args:
        mixture: the mixture over global tokens.
        tokens: (B, C) float32, of the augmented images that the model sees.
        uniforms: (B,) in (0, 1), keyed by the image's position in the training run.
        assignment: ``soft`` draws k ~ p(k | token) by inverse CDF, ``hard`` takes the most likely mode.

    Returns:
        modes (B,) int64.

    Raises:
        ValueError: unknown assignment.
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
        setting: name in :data:`mmfm.config.choices.SETTINGS`.
        spatial_gmm: store of the spatial mixture; ignored by settings without a mixture.
        device: where x_source is computed.
        means_device: where the means are kept: ``device``, or ``host``, which saves GPU memory at the cost of a
            transfer per batch.
        precision: of the means in memory, a value of ``means_precision``; bf16 halves them and keeps 3 digits, and
            ``reference`` also rounds the standard deviations to bf16.

    Raises:
        ValueError: unknown setting, or a setting with a mixture but no `spatial_gmm`.
    """
    if not SETTINGS[setting].mixture:
        return GaussianSource()
    if spatial_gmm is None:
        raise ValueError(f"setting '{setting}' draws its source from a mixture; give --spatial-gmm")
    from mmfm.mixture.spatial import SpatialMixture

    spatial = SpatialMixture.open(spatial_gmm)
    device = torch.device(device)
    place = torch.device("cpu") if means_device == "host" else device
    dtype = torch.bfloat16 if uses_bf16(precision, device) else torch.float32
    means = spatial.load_means(place, dtype, pinned=place.type == "cpu" and device.type == "cuda")
    weights, rounded = torch.as_tensor(spatial.weights), precision == "reference"
    return MixtureSource(means, spatial.load_variances(), weights, device, rounded)
