"""k-means over all processes: seeds from one, Lloyd's iterations from all.

Rows meet the centres near their last one (:mod:`mmfm.mixture.truncated`); with as many candidates as centres this is
Lloyd's algorithm, with fewer its approximation by Forster and Lucke (2018). Processes share sums, not rows, so at full
size all processes of a node work, where faiss would have one work and the others wait.
"""

import torch
from torch import Tensor

from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.moments import SufficientStatistics
from mmfm.mixture.streaming import Rows
from mmfm.mixture.truncated import Table, exact_winners, grouped_pass, nearest_centres

ITERATIONS = 50
MOVED = 1e-3
"""Lloyd's algorithm stops when no more than this share of the rows changes its cluster."""

CANDIDATES = 32

RELOCATIONS = (4, 8, 12)
"""Iterations after which small clusters are given up."""

SMALL = 0.1
"""Share of the average cluster's rows up to which a cluster is small."""


def nearest(rows: Rows, centres: Tensor) -> Tensor:
    """Return the nearest of the centres (K, C) for this process's rows: (n,) int32."""
    # The component with the largest posterior under equal spherical Gaussians is the nearest centre.
    k = len(centres)
    equal = Mixture(torch.full((k,), 1 / k, dtype=torch.float64), centres, torch.ones(k))
    return exact_winners(rows, equal, torch.float32)


def lloyd(rows: Rows, centres: Tensor, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """Run Lloyd's algorithm from centres (K, C) float32 until few rows move. A collective call.

    Seeds like outliers, which they can't leave again: after some iterations the centres with very few rows, and
    after every one those without rows, move to the largest clusters, which are split.

    Returns:
        Centres (K, C) float32, and the cluster of this process's rows (n,) int32 before the centres' last update.
    """
    winners = nearest(rows, centres)
    few = SMALL * rows.n / len(centres)
    for iteration in range(1, iterations + 1):
        last = winners.clone()
        statistics = _reassigned(rows, centres, winners)
        moved = float(rows.ranks.sum((winners != last).sum().double())) / rows.n
        centres, relocated = _updated(centres, statistics, few if iteration in RELOCATIONS else 0)
        if relocated:
            winners = nearest(rows, centres)
        elif moved <= MOVED and iteration > max(RELOCATIONS):
            break
    return centres, winners


def hard_moments(rows: Rows, centres: Tensor, winners: Tensor, covariance_type: str) -> SufficientStatistics:
    """Return the moments of all rows (shared), each given wholly to its one of the centres (K, C).

    Args:
        winners: (n,) cluster of this process's rows.
    """
    statistics = SufficientStatistics(centres.double(), covariance_type)
    for chunk, x in rows:
        start = chunk.start - rows.local.start
        component, row = winners[start : start + len(x)].long().sort(stable=True)
        statistics.add_pairs(x, component, row, torch.ones(len(x), dtype=torch.float64, device=x.device))
    return statistics.share(rows.ranks)


def _reassigned(rows: Rows, centres: Tensor, winners: Tensor) -> SufficientStatistics:
    """Give rows to the nearest of their candidates (``winners`` are overwritten) and return counts and sums, shared."""
    table = Table(centres, nearest_centres(centres - centres.mean(0), CANDIDATES), torch.float32)
    statistics = SufficientStatistics(table.means.double(), "spherical")
    grouped_pass(rows, table, winners, statistics, None)
    return statistics.share(rows.ranks)


def _updated(centres: Tensor, statistics: SufficientStatistics, few: float) -> tuple[Tensor, bool]:
    """Return the clusters' means, those of clusters with at most ``few`` rows moved, and whether any was."""
    count = statistics.count
    new = statistics.means + statistics.first / count.clamp_min(1)[:, None]
    small = (count <= few).nonzero().squeeze(1)
    donors = count.argsort(descending=True, stable=True)[: len(small)]
    donors = donors[count[donors] > max(1, 4 * few)]
    small = small[count[small].argsort(stable=True)][: len(donors)]
    shift = 1e-2 * new.std(0, correction=0)
    shift[::2] *= -1
    new[small], new[donors] = new[donors] + shift, new[donors] - shift
    return new.to(centres.dtype), len(small) > 0
