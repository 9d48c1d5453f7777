"""The mixture over latents: its store, and mean and variance of a mode from the moments of its images."""

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
from mmfm.mixture.rows import MappedRows

RELATIVE_FLOOR = 1e-3
"""Smallest variance of a position with ``diag``, as a share of the mode's variance averaged over all positions."""


ABSOLUTE_FLOOR = 1e-6
"""Smallest variance of a position with ``diag`` in any case; the data's own variance is 1."""


@dataclass(frozen=True)
class SpatialMixture:
    """Mixture of K Gaussians over latents (C, H, W), opened from ``spatial_gmm.zarr``.

    Attributes:
        means: zarr array (K, C, H, W) float32, one chunk a mode; 6.4 GB at K = 8192 and [768, 16, 16].
        variances: ``spherical``: (K,) float64; ``diag``: zarr array (K, C, H, W) float32, as large as the means.
        weights: (K,) float64, sum 1.
        counts: (K,) int64, images of each mode (flips not counted).
        attributes: ``digest`` and the digests of what it was made from.
        path: where it lies.
    """

    means: Any
    variances: Any
    weights: np.ndarray
    counts: np.ndarray
    attributes: dict[str, Any]
    path: Path | None = None

    @classmethod
    def open(cls, path: str | Path) -> "SpatialMixture":
        """Open a finished store read-only; arrays (K, C, H, W) are not read.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is unfinished or something else.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no spatial mixture at '{path}'; run the stage spatial_gmm")
        try:
            group = zarr.open_group(path, mode="r")
            variances = group["variances"] if group["variances"].ndim == 4 else group["variances"][:]
            result = cls(group["means"], variances, group["weights"][:], group["counts"][:], dict(group.attrs), path)
        except (KeyError, ValueError, OSError, TypeError) as error:
            raise ValueError(f"'{path}' is no spatial mixture ({error}); delete it, run spatial_gmm again") from error
        large = [result.means] + [result.variances] * (result.covariance_type == "diag")
        if "digest" not in result.attributes or any(a.nchunks_initialized < a.shape[0] for a in large):
            raise ValueError(f"spatial mixture '{path}' is not whole; delete it and run spatial_gmm again")
        return result

    @property
    def n_components(self) -> int:
        """Number of modes K."""
        return self.means.shape[0]

    @property
    def covariance_type(self) -> str:
        """``spherical`` (one variance a mode) or ``diag`` (one a position)."""
        return "diag" if self.variances.ndim == 4 else "spherical"

    def load_variances(self) -> Tensor | MappedRows:
        """Return the variances: (K,) float64, or with ``diag`` rows (C, H, W) that are read batch by batch.

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
        """Copy the means (K, C, H, W) to a device; see :meth:`mmfm.mixture.rows.MappedRows.copy_to`.

        Args:
            pinned: of the host's memory, take what a GPU can read by itself. PyTorch rounds its size up to a power of
                two.

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
    """Return mean (C, H, W) and spherical variance of latents and their horizontal flips, from the latents' moments.

    A flip is linear, so the union's mean is (m + flip m) / 2 and its population variance, averaged over C H W, is that
    of the latents plus mean((m - flip m)^2) / 4.
    """
    mean, flipped = moments.mean, moments.mean.flip(-1)
    variance = moments.variance().mean() + (mean - flipped).square().mean() / 4
    return (mean + flipped) / 2, float(variance)


def position_variances(moments: Moments) -> tuple[Tensor, int]:
    """Return the variance (C, H, W) float64 of latents and their flips at every position, and how many were raised.

    The union's variance at a position is (v + flip v) / 2 + ((m - flip m) / 2)^2. A mode of one image has none where
    its latent is symmetric, and modes of a few images have too little here and there. A source without variance
    collapses many latents to one value, so what is below the larger of :data:`ABSOLUTE_FLOOR` and
    :data:`RELATIVE_FLOOR` times the mode's average variance is raised to it.
    """
    mean, variance = moments.mean, moments.variance()
    union = (variance + variance.flip(-1)) / 2 + (mean - mean.flip(-1)).square() / 4
    floor = max(ABSOLUTE_FLOOR, RELATIVE_FLOOR * float(union.mean()))
    return union.clamp(min=floor), int((union < floor).sum())
