"""Held-out likelihood of a mixture: how much of its fit carries over to images that it has not seen."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from mmfm.data.moments import Moments
from mmfm.mixture.gaussian import Mixture

FEW_IMAGES = 100
"""Images per mode below which diagonal covariances of encoder tokens over-fit visibly."""

_SIMPLER = {
    "diag": "fewer modes, gmm.shrinkage, or tied covariances (gmm.covariance_type)",
    "full": "fewer modes, or tied or diag covariances (gmm.covariance_type)",
}
"""What narrows the gap, by covariance type; for the others it is fewer modes alone."""


@dataclass(frozen=True)
class MeanLikelihood:
    """Mean log-likelihood of images' tokens.

    Attributes:
        mean: nats per image.
        standard_error: of the mean, nats; 0 for one image.
        count: number of images.
    """

    mean: float
    standard_error: float
    count: int


def mean_likelihood(mixture: Mixture, tokens: Iterable[Tensor]) -> MeanLikelihood:
    """Return the mean log-likelihood of tokens that arrive in batches (B, C), under a mixture in C dimensions.

    Raises:
        ValueError: no tokens, or tokens of another dimension or that are not finite.
    """
    moments = Moments.zeros(())
    for batch in tokens:
        if batch.ndim != 2 or batch.shape[1] != mixture.dimension:
            raise ValueError(
                f"tokens are {tuple(batch.shape)}, but the mixture has {mixture.dimension} dimensions; extract them "
                "with its encoder"
            )
        values = mixture.log_prob(batch.to(mixture.device))
        if not values.isfinite().all():
            raise ValueError("a token's log-likelihood is NaN or Inf; extract the tokens again")
        moments.update(values)
    if not moments.count:
        raise ValueError("there are no tokens to take the likelihood of; set data.holdout or data.heldout_root")
    error = math.sqrt(moments.unbiased_variance().item() / moments.count) if moments.count > 1 else 0.0
    return MeanLikelihood(moments.mean.item(), error, moments.count)


def gap_warnings(mixture: Mixture, training: MeanLikelihood, heldout: MeanLikelihood) -> list[str]:
    """Return what the two likelihoods say about over-fitting: a sentence each, none if they agree."""
    lines = []
    gap = training.mean - heldout.mean
    if gap > 3 * math.hypot(training.standard_error, heldout.standard_error):
        lines.append(
            f"the mixture is {gap:.1f} nats per image better on its training images than on held-out ones: it "
            f"over-fits; {_SIMPLER.get(mixture.covariance_type, 'fewer modes')} narrow the gap"
        )
    if training.count < FEW_IMAGES * mixture.n_components:
        lines.append(
            f"{training.count / mixture.n_components:.0f} training images a mode are few for {mixture.dimension} "
            "dimensions; compare held-out likelihoods before trusting more modes"
        )
    return lines
