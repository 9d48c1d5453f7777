"""The spatial mixture (over latents): its store, and the mean and variance of a mode from the moments of its images."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from mmfm.data.moments import Moments
from mmfm.mixture.mapped_rows import MappedRows

RELATIVE_FLOOR = 1e-3
"""Smallest variance of a position with ``diag``, relative to the mode's average over all positions."""

ABSOLUTE_FLOOR = 1e-6
"""Smallest variance of a position with ``diag``; the variance of normalised latents is 1."""


@dataclass(frozen=True)
class SpatialMixture:
    """A mixture of K Gaussians over latents (C, H, W), opened from ``spatial_gmm.zarr``.

    Attributes:
        means: zarr array (K, C, H, W) float32, one chunk per mode; 6.4 GB at K = 8192 and latents [768, 16, 16].
        variances: (K,) float64 for ``spherical``; zarr array (K, C, H, W) float32 for ``diag``.
        weights: (K,) float64, sum 1.
        counts: (K,) int64, images of each mode, not counting flips.
        attributes: ``digest``, and the digests of the inputs.
        path: location of the store.
    """

    means: Any
    variances: Any
    weights: np.ndarray
    counts: np.ndarray
    attributes: dict[str, Any]
    path: Path | None = None

    @classmethod
    def open(cls, path: str | Path) -> "SpatialMixture":
        """Open a finished store read-only, without reading its large arrays.

        Raises:
            FileNotFoundError: there is no store at ``path``.
            ValueError: it is incomplete, or not a spatial mixture.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no spatial mixture at '{path}'; run spatial_gmm")
        try:
            group: Any = zarr.open_group(path, mode="r")
            variances = group["variances"] if group["variances"].ndim == 4 else group["variances"][:]
            result = cls(group["means"], variances, group["weights"][:], group["counts"][:], dict(group.attrs), path)
        except (KeyError, ValueError, OSError, TypeError) as error:
            raise ValueError(
                f"'{path}' is not a spatial mixture ({error}); delete it and run spatial_gmm again"
            ) from error
        large = [result.means] + [result.variances] * (result.covariance_type == "diag")
        if "digest" not in result.attributes or any(a.nchunks_initialized < a.shape[0] for a in large):
            raise ValueError(f"spatial mixture '{path}' is incomplete; delete it and run spatial_gmm again")
        return result

    @property
    def n_components(self) -> int:
        """Number of modes K."""
        return self.means.shape[0]

    @property
    def covariance_type(self) -> str:
        """``spherical`` (one variance per mode) or ``diag`` (one per position)."""
        return "diag" if self.variances.ndim == 4 else "spherical"

    def load_variances(self) -> Tensor | MappedRows:
        """Return the variances: (K,) float64 for ``spherical``, memory-mapped rows (C, H, W) float32 for ``diag``.

        Raises:
            ValueError: the store is damaged.
        """
        if self.covariance_type != "diag":
            return torch.as_tensor(self.variances)
        with self._damage_named():
            rows = MappedRows(self.variances)
            rows.check()
        return rows

    def load_means(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, pinned: bool = False
    ) -> Tensor:
        """Copy the means (K, C, H, W) to a device; see :meth:`mmfm.mixture.mapped_rows.MappedRows.copy_to`.

        Args:
            pinned: whether to use pinned memory, which a GPU can read directly. PyTorch rounds its size up to a power
                of two.

        Raises:
            ValueError: the store is damaged.
        """
        result = torch.empty(self.means.shape, dtype=dtype, device=device, pin_memory=pinned)
        with self._damage_named():
            MappedRows(self.means).copy_to(result)
        return result

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(
                f"spatial mixture '{self.path}' is damaged ({error}); delete it and run spatial_gmm again"
            ) from error


def union_with_flips(moments: Moments) -> tuple[Tensor, float]:
    """Return the mean and spherical variance of latents together with their horizontal flips.

    With m the mean of the latents, the mean of the union is (m + flip m) / 2. Its population variance, averaged over
    C H W, is that of the latents plus mean((m - flip m)^2) / 4. The flips themselves are not needed.

    Args:
        moments: of the latents (C, H, W).

    Returns:
        The mean (C, H, W) float64 and the variance.
    """
    mean, flipped = moments.mean, moments.mean.flip(-1)
    variance = moments.variance().mean() + (mean - flipped).square().mean() / 4
    return (mean + flipped) / 2, float(variance)


def position_variances(moments: Moments) -> tuple[Tensor, int]:
    """Return the variance of latents together with their horizontal flips at every position.

    With m and v the mean and variance of the latents, the variance of the union is (v + flip v) / 2 + ((m - flip m) /
    2)^2. Modes of few images have too little variance at some positions (a single image has none where its latent is
    symmetric), and without variance the source would always have the same value there. Variances are therefore raised
    to at least :data:`ABSOLUTE_FLOOR`, and to :data:`RELATIVE_FLOOR` times the mode's average.

    Args:
        moments: of the latents (C, H, W).

    Returns:
        The variances (C, H, W) float64, and the number of positions that were raised.
    """
    mean, variance = moments.mean, moments.variance()
    union = (variance + variance.flip(-1)) / 2 + (mean - mean.flip(-1)).square() / 4
    floor = max(ABSOLUTE_FLOOR, RELATIVE_FLOOR * float(union.mean()))
    return union.clamp(min=floor), int((union < floor).sum())
