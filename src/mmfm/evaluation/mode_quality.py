"""Whether generated images look like the images of their own mode, for every mode of the token mixture."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from mmfm.mixture.gaussian import Mixture

MIN_IMAGES = 5
"""Generated images from which a mode is ranked: with fewer, even none that returns may be chance."""

CONFIDENCE = 0.975
"""One-sided confidence of the limits of a share."""


class Placed(NamedTuple):
    """Where the tokens of some images lie in the mixture; on the CPU.

    Attributes:
        nearest: (B,) int64, the mode with the largest posterior.
        posterior: (B,) float64, that posterior.
        distance: (B,) float64, squared Mahalanobis distance per dimension from the mean of a given mode.
    """

    nearest: np.ndarray
    posterior: np.ndarray
    distance: np.ndarray


@torch.no_grad()
def place(mixture: Mixture, tokens: Tensor, modes: Tensor | None = None) -> tuple[Placed, np.ndarray]:
    """Find the likeliest modes of tokens, and their distances from the modes that they should belong to.

    Args:
        tokens: (B, C) float32.
        modes: (B,) int64, modes of positive weight whose means the distances are from; None for the likeliest.

    Returns:
        Where the tokens lie, and (K,) float64, the sum of their posteriors for each mode.

    Raises:
        ValueError: tokens of another dimension than the mixture's.
    """
    if tokens.shape[1] != mixture.dimension:
        raise ValueError(
            f"the encoder's tokens have {tokens.shape[1]} dimensions, the mixture {mixture.dimension}; give the mixture "
            "that was fitted to this encoder's tokens"
        )
    joint = mixture.log_joint(tokens.to(mixture.device))
    posterior = joint.softmax(1)
    largest, nearest = posterior.max(1)
    own = nearest if modes is None else modes.to(mixture.device)
    # log w N = log w - (C log 2 pi + log det + distance) / 2, for every type of covariance
    determinants = mixture.log_determinants().expand(mixture.n_components)
    density = joint.gather(1, own[:, None]).squeeze(1) - mixture.weights.log()[own]
    distance = -2 * density - mixture.dimension * math.log(2 * math.pi) - determinants[own]
    placed = Placed(*(values.cpu().numpy() for values in (nearest, largest, distance / mixture.dimension)))
    return placed, posterior.sum(0).cpu().numpy()


def limits(hits: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and the upper confidence limit of the shares ``hits / n``, (K,) each; 0 and 1 where n is 0.

    Each limit is wrong with a probability of at most 1 - :data:`CONFIDENCE`, however small n is.

    Source: Clopper and Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of the binomial".
    """
    hits, n = np.asarray(hits, np.float64), np.asarray(n, np.float64)
    low, high = np.zeros(hits.shape), np.ones(hits.shape)
    some, few = hits > 0, hits < n
    low[some] = betaincinv(hits[some], n[some] - hits[some] + 1, 1 - CONFIDENCE)
    high[few] = betaincinv(hits[few] + 1, n[few] - hits[few], CONFIDENCE)
    return low, high


@dataclass(frozen=True)
class ModeQuality:
    """The quality of every mode; arrays are (K,).

    Attributes:
        n: generated images whose noise was drawn from the mode.
        returned: how many of them lie in it again.
        expected: share that would return if the flow were perfect: a training image x that is paired with the mode,
            which happens with probability p(k | x), lies in it with this probability. NaN for a mode without images.
        distance: mean squared Mahalanobis distance per dimension of the generated images from the mode's mean; NaN
            without any.
        n_training: training images that lie in the mode.
        training_distance: their mean distance; NaN without any.
        weights: of the mixture.
    """

    n: np.ndarray
    returned: np.ndarray
    expected: np.ndarray
    distance: np.ndarray
    n_training: np.ndarray
    training_distance: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(
        cls, weights: np.ndarray, modes: np.ndarray, generated: Placed, training: Placed, posteriors: np.ndarray
    ) -> "ModeQuality":
        """Summarise images by mode.

        Args:
            weights: (K,) weights of the mixture.
            modes: (n,) modes that the generated images were drawn from, from whose means their distances are.
            generated: the generated images.
            training: the training images, with distances from their likeliest modes.
            posteriors: (K,) sums of the training images' posteriors.
        """
        k = len(weights)

        def total(of: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
            return np.bincount(of, values, minlength=k)

        n, n_training = total(modes), total(training.nearest)
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = total(training.nearest, training.posterior) / posteriors
            return cls(
                n,
                total(modes[generated.nearest == modes]),
                np.where(n_training > 0, np.minimum(expected, 1), np.nan),
                total(modes, generated.distance) / n,
                n_training,
                total(training.nearest, training.distance) / n_training,
                weights,
            )

    @property
    def share(self) -> np.ndarray:
        """Share of the generated images that return to their mode; NaN without any."""
        with np.errstate(invalid="ignore"):
            return self.returned / self.n

    @property
    def shortfall(self) -> np.ndarray:
        """How much lower than expected the share certainly is: expected minus the upper limit; NaN if not ranked.

        Above 0, the mode is poor. Few images give a high limit, so a mode is not poor by chance: a perfect flow has at
        most 2.5 % of poor modes.
        """
        short = self.expected - limits(self.returned, self.n)[1]
        return np.where(self.n >= MIN_IMAGES, short, np.nan)

    def ranking(self) -> np.ndarray:
        """Return the ranked modes, the worst first: by shortfall, ties by distance."""
        short = self.shortfall
        ranked = np.flatnonzero(~np.isnan(short))
        return ranked[np.lexsort((-self.distance[ranked], -short[ranked]))]

    def summary(self) -> dict[str, Any]:
        """Return the numbers of all modes together as JSON values."""
        n, returned, ranked = int(self.n.sum()), int(self.returned.sum()), self.ranking()
        low, high = limits(np.array([returned]), np.array([n]))
        drawn = (self.n > 0) & ~np.isnan(self.expected)
        return {
            "returned": returned,
            "share": returned / n,
            "share_limits": [float(low[0]), float(high[0])],
            "expected": float(self.n[drawn] @ self.expected[drawn] / self.n[drawn].sum()) if drawn.any() else None,
            "chance": float(np.square(self.weights).sum()),
            "distance": float(np.nansum(self.n * np.nan_to_num(self.distance)) / n),
            "ranked_modes": len(ranked),
            "poor_modes": int((self.shortfall > 0).sum()),
            "poor_by_chance": (1 - CONFIDENCE) * len(ranked),
            "modes_without_images": int((self.n == 0).sum()),
        }

    def columns(self) -> dict[str, list]:
        """Return the numbers of every mode as columns of length K, JSON values; null where there is nothing to say."""
        low, high = limits(self.returned, self.n)
        values = {
            "n_images": self.n,
            "returned": self.returned,
            "share": self.share,
            "share_low": np.where(self.n > 0, low, np.nan),
            "share_high": np.where(self.n > 0, high, np.nan),
            "expected": self.expected,
            "shortfall": self.shortfall,
            "distance": self.distance,
            "n_training": self.n_training,
            "training_distance": self.training_distance,
        }
        return {name: [None if v != v else v for v in _short(array)] for name, array in values.items()}


def _short(array: np.ndarray) -> list:
    """Return an array as a list; floating-point numbers with six significant digits."""
    if array.dtype.kind != "f":
        return array.tolist()
    return [float(f"{value:.6g}") for value in array.tolist()]
