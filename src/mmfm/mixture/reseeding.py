"""Empty components take over half of the largest ones.

EM never revives a component without rows, as its weight is 0. Such a component is moved to the largest one, and the two
means are shifted apart. This needs no data and gives the same result on every process. Moving it to the rows of lowest
density instead would place it on outliers, and a component with a single row collapses.
"""

import torch
from torch import Tensor

from mmfm.mixture.gaussian import Mixture

ROUNDS = 5
"""Most iterations of a fit after which components are moved; components that become empty later stay empty."""

EMPTY_BELOW = 0.5
"""Number of rows (sum of responsibilities) below which a component is empty."""

_DIVISIBLE_FROM = 8  # rows


def reseed(mixture: Mixture, count: Tensor, reg_covar: float, rounds: int) -> tuple[Mixture, int]:
    """Move the empty components of a mixture to its largest ones, each of which is split at most once.

    Args:
        count: (K,), rows (sum of responsibilities) of each component.
        reg_covar: a component with no variance above ten times this consists of duplicates and is not split.
        rounds: number of earlier iterations of this fit that moved components.

    Returns:
        The mixture, and the number of components moved.
    """
    empty = (count < EMPTY_BELOW).nonzero().squeeze(1)
    if not len(empty) or rounds >= ROUNDS:
        return mixture, 0
    variances = mixture.diagonal()
    # Rounded, so that the order of equal components does not depend on the number of processes.
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
