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
        distance: (B,) float64, squared Mahalanobis distance per dimension from the mean of the image's own mode.
    """

    nearest: np.ndarray
    distance: np.ndarray


class Real(NamedTuple):
    """Real images, and what the autoencoder leaves of them; arrays are (m,).

    Attributes:
        original: the images themselves; their own mode is the likeliest.
        decoded: the images after encoding and decoding, with distances from the same mode.
        kept: float64, the original's posterior of the mode in which the decoded image lies.
    """

    original: Placed
    decoded: Placed
    kept: np.ndarray


@torch.no_grad()
def place(mixture: Mixture, joint: Tensor, modes: Tensor | None = None) -> Placed:
    """Find the likeliest modes of tokens, and their distances from their own modes.

    Args:
        joint: (B, K) float64, the tokens' log-joints, from :func:`log_joint`.
        modes: (B,) int64, their own modes, of positive weight; None for the likeliest.
    """
    nearest = joint.argmax(1)
    own = nearest if modes is None else modes.to(joint.device)
    # log w N = log w - (C log 2 pi + log det + distance) / 2, for every type of covariance
    density = joint.gather(1, own[:, None]).squeeze(1) - mixture.weights.log()[own]
    determinants = mixture.log_determinants().expand(mixture.n_components)[own]
    distance = -2 * density - mixture.dimension * math.log(2 * math.pi) - determinants
    return Placed(nearest.cpu().numpy(), (distance / mixture.dimension).cpu().numpy())


@torch.no_grad()
def place_real(mixture: Mixture, original: Tensor, decoded: Tensor) -> tuple[Real, np.ndarray]:
    """Find where real images and their reconstructions lie.

    Args:
        original, decoded: (B, K) float64, log-joints of the tokens of both.

    Returns:
        Where they lie, and (K,) float64, the sums of the originals' posteriors.
    """
    posterior = original.softmax(1)
    before = place(mixture, original)
    after = place(mixture, decoded, torch.from_numpy(before.nearest))
    kept = posterior.gather(1, torch.from_numpy(after.nearest).to(posterior.device)[:, None]).squeeze(1)
    return Real(before, after, kept.cpu().numpy()), posterior.sum(0).cpu().numpy()


def log_joint(mixture: Mixture, tokens: Tensor) -> Tensor:
    """Return the log-joint densities of tokens (B, C) and modes, (B, K) float64.

    Raises:
        ValueError: tokens of another dimension than the mixture's.
    """
    if tokens.shape[1] != mixture.dimension:
        raise ValueError(
            f"the encoder's tokens have {tokens.shape[1]} dimensions, the mixture {mixture.dimension}; give the "
            "mixture of this encoder"
        )
    return mixture.log_joint(tokens.to(mixture.device))


def limits(hits: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and the upper confidence limit of the shares ``hits / n``, (K,) each; 0 and 1 where n is 0.

    Each limit is wrong with a probability of at most 1 - :data:`CONFIDENCE`, however small n is.

    Source: Clopper and Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of the
    binomial".
    """
    hits, n = np.asarray(hits, np.float64), np.asarray(n, np.float64)
    low, high = np.zeros(hits.shape), np.ones(hits.shape)
    some, few = hits > 0, hits < n
    low[some] = betaincinv(hits[some], n[some] - hits[some] + 1, 1 - CONFIDENCE)
    high[few] = betaincinv(hits[few] + 1, n[few] - hits[few], CONFIDENCE)
    return low, high


@dataclass(frozen=True)
class ModeQuality:
    """The quality of every mode; arrays are (K,), and NaN for a mode without the images that they are about.

    Attributes:
        n: generated images whose noise was drawn from the mode.
        returned: how many of them lie in it again.
        distance: their mean squared Mahalanobis distance per dimension from the mode's mean.
        expected: share that would return if the flow were perfect, by the real images.
        expected_of_all: the same of all modes together.
        n_real: real images that lie in the mode.
        real_distance, decoded_distance: their mean distance, before and after encoding and decoding.
        weights: of the mixture.
    """

    n: np.ndarray
    returned: np.ndarray
    distance: np.ndarray
    expected: np.ndarray
    expected_of_all: float
    n_real: np.ndarray
    real_distance: np.ndarray
    decoded_distance: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(
        cls, weights: np.ndarray, modes: np.ndarray, generated: Placed, real: Real, posteriors: np.ndarray
    ) -> "ModeQuality":
        """Summarise images by mode.

        A perfect flow turns noise of mode k into a real image x with density p(x) p(k | x) / w_k, since that is how
        training pairs them. The image lies where x lies after encoding and decoding, in k' say. So the expected share
        of k is the sum of p(k | x) over the x with k' = k, divided by that over all x.

        Args:
            weights: (K,) weights of the mixture.
            modes: (n,) modes that the generated images were drawn from.
            generated: the generated images, with distances from these modes.
            real: some real images.
            posteriors: (K,) sums of their posteriors.
        """
        k, own = len(weights), real.original.nearest

        def total(of: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
            return np.bincount(of, values, minlength=k)

        n, n_real = total(modes), total(own)
        with np.errstate(invalid="ignore", divide="ignore"):
            return cls(
                n=n,
                returned=total(modes[generated.nearest == modes]),
                distance=total(modes, generated.distance) / n,
                expected=np.where(n_real > 0, total(real.decoded.nearest, real.kept) / posteriors, np.nan),
                expected_of_all=float(real.kept.mean()),
                n_real=n_real,
                real_distance=total(own, real.original.distance) / n_real,
                decoded_distance=total(own, real.decoded.distance) / n_real,
                weights=weights,
            )

    @property
    def share(self) -> np.ndarray:
        """Share of the generated images that return to their mode; NaN without any."""
        with np.errstate(invalid="ignore"):
            return self.returned / self.n

    @property
    def shortfall(self) -> np.ndarray:
        """How far a mode's share certainly is below what is expected of all modes; NaN if the mode is not ranked.

        Certainly: by the upper limit of its share. Above 0, the mode is poor. Few images give a high limit, so few
        modes are poor by chance: 2.5 % at most, if all modes had the expected share.
        """
        short = self.expected_of_all - limits(self.returned, self.n)[1]
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
        return {
            "returned": returned,
            "share": returned / n,
            "share_limits": [float(low[0]), float(high[0])],
            "expected": self.expected_of_all,
            "chance": float(np.square(self.weights).sum()),
            "distance": float(np.nansum(self.n * self.distance) / n),
            "ranked_modes": len(ranked),
            "poor_modes": int((self.shortfall > 0).sum()),
            "poor_by_chance": round((1 - CONFIDENCE) * len(ranked), 1),
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
            "shortfall": self.shortfall,
            "distance": self.distance,
            "expected": self.expected,
            "n_real": self.n_real,
            "real_distance": self.real_distance,
            "decoded_distance": self.decoded_distance,
        }
        return {name: [None if v != v else v for v in _short(array)] for name, array in values.items()}


def _short(array: np.ndarray) -> list:
    """Return an array as a list; floating-point numbers with six significant digits."""
    if array.dtype.kind != "f":
        return array.tolist()
    return [float(f"{value:.6g}") for value in array.tolist()]
