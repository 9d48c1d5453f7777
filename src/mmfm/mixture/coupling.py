"""The transport cost E ||x_source - x_data||^2 of three couplings of source and data, from moments alone."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class CouplingCost:
    """Expected squared distance between coupled source and data, per dimension of the latent.

    For independent a and b, E ||a - b||^2 = ||E a - E b||^2 + tr Var a + tr Var b, so the means and variances of the
    modes are sufficient. The data are the images and their horizontal flips, which have the same mode as the image.

    Args:
        weights: (K,), probability of each mode in the source.
        counts: (K,), images of each mode.
    """

    weights: np.ndarray
    counts: np.ndarray
    _source_mean: np.ndarray | float = field(default=0.0, repr=False)
    _data_mean: np.ndarray | float = field(default=0.0, repr=False)
    _source_square: float = 0.0
    _data_square: float = 0.0
    _coupled: float = 0.0

    def add(self, mode: int, mean: np.ndarray, source_variance: float, data_variance: float) -> None:
        """Add a mode.

        Args:
            mean: (C, H, W), mean of the source, and of the images and flips if there are any.
            source_variance: variance of the source, averaged over C H W.
            data_variance: population variance of the images and flips, averaged over C H W; ignored without images.
        """
        weight, share = float(self.weights[mode]), float(self.counts[mode] / self.counts.sum())
        mean = mean.astype(np.float64)
        square = float(np.square(mean).mean())
        self._source_mean = self._source_mean + weight * mean
        self._source_square += weight * (square + source_variance)
        if share:
            self._data_mean = self._data_mean + share * mean
            self._data_square += share * (square + data_variance)
            self._coupled += share * (source_variance + data_variance)

    def result(self) -> dict[str, float]:
        """Return the cost of each coupling.

        * ``gaussian``: the standard Gaussian source, as in the setting ``uncond``.
        * ``mixture_independent``: the mixture with modes drawn from the weights, independently of the image.
        * ``mode_coupled``: each image with its own mode, as in the settings ``gmm`` and ``mode`` with
          ``train.assignment: hard``.
        """
        inner = float(np.mean(self._source_mean * self._data_mean))
        return {
            "gaussian": self._data_square + 1.0,
            "mixture_independent": self._source_square + self._data_square - 2 * inner,
            "mode_coupled": self._coupled,
        }
