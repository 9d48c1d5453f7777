"""Exact moments of data that arrive in batches, in float64 on any device.

Batches and partial results are merged with the update formula of Chan, Golub and LeVeque (1979, "Updating formulae and
a pairwise algorithm for computing sample variances"). Deviations are always taken from the mean of the data at hand, so
nothing cancels, however large the mean, and variances are never negative.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor


class _RunningMoments(ABC):
    """Count, mean and second moment of rows.

    Attributes:
        count: number of rows seen.
        mean: (*shape) float64.
        m2: float64, sum of squares or of outer products of the deviations from the mean.
    """

    def __init__(self, count: int, mean: Tensor, m2: Tensor) -> None:
        self.count, self.mean, self.m2 = int(count), mean, m2

    @staticmethod
    @abstractmethod
    def _second_moment(deviations: Tensor) -> Tensor:
        """Return the second moment of deviations (B, *shape), which may be overwritten."""

    @abstractmethod
    def _sum_of_squares(self) -> Tensor:
        """Return the sum of squared deviations of every element, (*shape)."""

    def update(self, batch: Tensor | np.ndarray) -> Self:
        """Add the rows of a batch (B, *shape) of any real dtype, and return self.

        Raises:
            ValueError: the rows have another shape.
        """
        rows = torch.as_tensor(batch).to(self.mean.device, torch.float64)
        if rows.shape[1:] != self.mean.shape:
            raise ValueError(
                f"rows have shape {tuple(rows.shape[1:])}, but the moments so far have {tuple(self.mean.shape)}"
            )
        if len(rows) == 0:
            return self
        mean = rows.mean(0)
        return self._add(len(rows), mean, self._second_moment(rows - mean))

    def merge(self, other: Self) -> Self:
        """Add the data summarised by ``other``, and return self."""
        return self._add(other.count, other.mean, other.m2) if other.count else self

    def _add(self, count: int, mean: Tensor, m2: Tensor) -> Self:
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + self._second_moment(delta[None]) * (self.count * count / total)
        self.count = total
        return self

    def variance(self) -> Tensor:
        """Return the population variance (divided by the count), (*shape) float64."""
        return self._sum_of_squares() / _at_least(self.count, 1)

    def unbiased_variance(self) -> Tensor:
        """Return the sample variance (divided by count - 1), (*shape) float64."""
        return self._sum_of_squares() / (_at_least(self.count, 2) - 1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return ``count`` (1,) int64, ``mean`` and ``m2`` float64 as NumPy arrays."""
        return {"count": np.array([self.count], np.int64), "mean": self.mean.cpu().numpy(), "m2": self.m2.cpu().numpy()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Restore moments from :meth:`to_arrays`. The arrays are copied, as they may be memory-mapped read-only."""
        return cls(int(arrays["count"][0]), torch.tensor(arrays["mean"]), torch.tensor(arrays["m2"]))


class Moments(_RunningMoments):
    """Elementwise moments of arrays: count, mean (*shape) and sum of squared deviations m2 (*shape); all float64."""

    @classmethod
    def zeros(cls, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Self:
        """Return the moments of no data."""
        mean = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(0, mean, torch.zeros_like(mean))

    @staticmethod
    def _second_moment(deviations: Tensor) -> Tensor:
        return deviations.square_().sum(0)

    def _sum_of_squares(self) -> Tensor:
        return self.m2


class CovarianceMoments(_RunningMoments):
    """Moments of vectors: count, mean (D,) and sum of outer products of deviations m2 (D, D); all float64."""

    @classmethod
    def zeros(cls, dimension: int, device: torch.device | str = "cpu") -> Self:
        """Return the moments of no data in ``dimension`` dimensions."""
        mean = torch.zeros(dimension, dtype=torch.float64, device=device)
        return cls(0, mean, torch.zeros((dimension, dimension), dtype=torch.float64, device=device))

    @staticmethod
    def _second_moment(deviations: Tensor) -> Tensor:
        return deviations.T @ deviations

    def _sum_of_squares(self) -> Tensor:
        return self.m2.diagonal()

    def covariance(self) -> Tensor:
        """Return the unbiased covariance (D, D) float64, exactly symmetric, as FID uses it.

        Raises:
            ValueError: fewer than two rows were seen.
        """
        covariance = self.m2 / (_at_least(self.count, 2) - 1)
        return (covariance + covariance.T) / 2


def _at_least(count: int, needed: int) -> int:
    if count < needed:
        raise ValueError(f"{count} rows seen, {needed} needed for this variance; add more data")
    return count
