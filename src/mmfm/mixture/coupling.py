"""How far the source is from the data: E ||x_source - x_data||^2 for three ways of pairing them, from moments alone."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class CouplingCost:
    """Expected squared distance of paired source and data, per dimension of the latent.

    For independent a and b, E ||a - b||^2 = ||E a - E b||^2 + tr Var a + tr Var b, so mean and variance of every mode
    say all. Data are the images and their horizontal flips; a flip has its image's mode.

    Args:
        weights: (K,) probability of each mode in the source.
        counts: (K,) images of each mode.
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
            mean: (C, H, W), of the source and, where the mode has images, of these and their flips.
            source_variance: of the source, averaged over C H W.
            data_variance: population variance of the images and flips, averaged alike; of no weight without images.
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
        """Return the cost of the Gaussian source, the mixture independent of the image, and its mode's own source.

        They are those of the settings ``uncond``, of ``gmm`` and ``mode`` if modes were drawn from the weights alone,
        and of ``gmm`` and ``mode`` with ``train.assignment: hard``.
        """
        inner = float(np.mean(self._source_mean * self._data_mean))
        return {
            "gaussian": self._data_square + 1.0,
            "mixture_independent": self._source_square + self._data_square - 2 * inner,
            "mode_coupled": self._coupled,
        }
