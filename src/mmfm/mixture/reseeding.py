"""Components that lost all their rows get half of the largest ones.

A component without rows has no way back: its weight is 0. It is moved onto the largest component and both are shifted
apart, which needs no data and is the same for every process. The lowest-density rows would be the other choice; but
these are outliers, and a component on one row collapses onto it.
"""

import torch
from torch import Tensor

from mmfm.mixture.gaussian import Mixture

ROUNDS = 5
"""Iterations of a fit after which components are moved, at most; those that are empty later stay empty."""

EMPTY_BELOW = 0.5
"""Rows (sum of responsibilities) below which a component is empty."""

_DIVISIBLE_FROM = 8  # rows


def reseed(mixture: Mixture, count: Tensor, reg_covar: float, rounds: int) -> tuple[Mixture, int]:
    """Move the empty components of a mixture to its largest ones, each of which is split once.

    Args:
        count: (K,) rows of every component.
        reg_covar: components whose variances are no more than ten times this are duplicates and can't be split.
        rounds: iterations of this fit in which components were moved.

    Returns:
        The mixture, and how many components were moved.
    """
    empty = (count < EMPTY_BELOW).nonzero().squeeze(1)
    if not len(empty) or rounds >= ROUNDS:
        return mixture, 0
    variances = mixture.diagonal()
    # Rounded: sums over other numbers of processes must not order equal components differently.
    size = (count * 1e3).round()
    order = size.argsort(descending=True, stable=True)
    divisible = (count >= _DIVISIBLE_FROM) & (variances.amax(1) > 10 * reg_covar)
    donors = order[divisible[order]][: len(empty)]
    empty = empty[: len(donors)]
    if not len(empty):
        return mixture, 0
    weights, means, covariances = mixture.weights.clone(), mixture.means.clone(), mixture.variances.clone()
    axis = variances[donors].argmax(1)
    shift = torch.zeros_like(means[donors])
    shift[torch.arange(len(donors)), axis] = variances[donors, axis].sqrt()
    means[empty], means[donors] = means[donors] + shift, means[donors] - shift
    weights[donors] /= 2
    weights[empty] = weights[donors]
    if mixture.covariance_type != "tied":
        covariances[empty] = covariances[donors]
    return Mixture(weights / weights.sum(), means, covariances, mixture.covariance_type), len(empty)
