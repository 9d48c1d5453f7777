"""Exact moments of data that arrive in batches, in torch float64 on any device.

Batches and partial results are combined by the update of Chan, Golub and LeVeque ("Updating formulae and a pairwise
algorithm for computing sample variances", 1979): deviations are always taken from a mean of the data at hand, so
nothing cancels however large the mean is, and a variance can't become negative.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class Moments:
    """Count, mean and sum of squared deviations of every element of arrays of one shape.

    Attributes:
        count: rows seen.
        mean: (*shape) float64.
        m2: (*shape) float64, sum of squared deviations from the mean.
    """

    def __init__(self, count: int, mean: Tensor, m2: Tensor) -> None:
        self.count, self.mean, self.m2 = int(count), mean, m2

    @classmethod
    def zeros(cls, shape: tuple[int, ...], device: torch.device | str = "cpu") -> "Moments":
        """Return the moments of no data."""
        mean = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(0, mean, torch.zeros_like(mean))

    def update(self, batch: Tensor | np.ndarray) -> "Moments":
        """Add the rows of a batch (B, *shape), of any real dtype, and return self.

        Raises:
            ValueError: rows of another shape.
        """
        rows = _rows(batch, self.mean.shape, self.mean.device)
        if len(rows) == 0:
            return self
        mean = rows.mean(0)
        return self.merge(Moments(len(rows), mean, (rows - mean).square_().sum(0)))

    def merge(self, other: "Moments") -> "Moments":
        """Add the data behind ``other`` and return self."""
        if other.count:
            total = self.count + other.count
            delta = other.mean - self.mean
            self.mean = self.mean + delta * (other.count / total)
            self.m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / total)
            self.count = total
        return self

    def variance(self) -> Tensor:
        """Return the population variance (division by the count), (*shape) float64."""
        return self.m2 / _at_least(self.count, 1)

    def unbiased_variance(self) -> Tensor:
        """Return the variance with division by count - 1, (*shape) float64."""
        return self.m2 / (_at_least(self.count, 2) - 1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return ``count`` (1,) int64, ``mean`` and ``m2`` (*shape) float64 as NumPy arrays."""
        return {"count": np.array([self.count], np.int64), "mean": self.mean.cpu().numpy(), "m2": self.m2.cpu().numpy()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Moments":
        """Rebuild moments from :meth:`to_arrays`; read-only (memory-mapped) arrays are copied."""
        return cls(int(arrays["count"][0]), torch.tensor(arrays["mean"]), torch.tensor(arrays["m2"]))


class CovarianceMoments(Moments):
    """Count, mean (D,) and sum of outer products of deviations m2 (D, D) of feature vectors; all float64."""

    @classmethod
    def zeros(cls, dimension: int, device: torch.device | str = "cpu") -> "CovarianceMoments":
        """Return the moments of no data in ``dimension`` dimensions."""
        mean = torch.zeros(dimension, dtype=torch.float64, device=device)
        return cls(0, mean, torch.zeros((dimension, dimension), dtype=torch.float64, device=device))

    def update(self, batch: Tensor | np.ndarray) -> "CovarianceMoments":
        """Add the rows of a batch (B, D), of any real dtype, and return self.

        Raises:
            ValueError: rows of another length.
        """
        rows = _rows(batch, self.mean.shape, self.mean.device)
        if len(rows) == 0:
            return self
        mean = rows.mean(0)
        deviations = rows - mean
        return self.merge(CovarianceMoments(len(rows), mean, deviations.T @ deviations))

    def merge(self, other: "CovarianceMoments") -> "CovarianceMoments":
        """Add the data behind ``other`` and return self."""
        if other.count:
            total = self.count + other.count
            delta = other.mean - self.mean
            self.mean = self.mean + delta * (other.count / total)
            self.m2 = self.m2 + other.m2 + torch.outer(delta, delta) * (self.count * other.count / total)
            self.count = total
        return self

    def covariance(self) -> Tensor:
        """Return the unbiased covariance (D, D) float64, exactly symmetric: the convention of FID.

        Raises:
            ValueError: fewer than two rows.
        """
        covariance = self.m2 / (_at_least(self.count, 2) - 1)
        return (covariance + covariance.T) / 2

    def variance(self) -> Tensor:
        """Return the population variances (D,) float64."""
        return self.m2.diagonal() / _at_least(self.count, 1)

    def unbiased_variance(self) -> Tensor:
        """Return the variances (D,) float64 with division by count - 1."""
        return self.m2.diagonal() / (_at_least(self.count, 2) - 1)


def _rows(batch: Tensor | np.ndarray, shape: torch.Size, device: torch.device) -> Tensor:
    rows = torch.as_tensor(batch).to(device, torch.float64)
    if rows.shape[1:] != shape:
        raise ValueError(
            f"rows are {tuple(rows.shape[1:])}, the moments so far {tuple(shape)}; use one shape throughout"
        )
    return rows


def _at_least(count: int, needed: int) -> int:
    if count < needed:
        raise ValueError(f"{count} rows seen, {needed} needed for this variance; add more data")
    return count
