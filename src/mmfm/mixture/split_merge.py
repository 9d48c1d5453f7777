"""Split and merge: clusters move from where they are superfluous to where they are missing.

Lloyd's algorithm and EM only shift components about where the seeds put them. Which of two thousand components should
leave one place for another is what decides the likelihood that a fit ends with. Ueda, Nakano, Ghahramani and Hinton
(2000, "SMEM algorithm for mixture models") merge two components and split a third, and keep what raises the likelihood.
The classification likelihood, of hard assignments (Celeux and Govaert 1992), changes by what follows from the clusters'
moments alone, so here all clusters are judged at once, and as many moves are made as pay.
"""

import torch
from torch import Tensor

from mmfm.mixture.groups import lloyd_iteration
from mmfm.mixture.moments import SufficientStatistics, hard_moments
from mmfm.mixture.streaming import Rows
from mmfm.mixture.truncated import nearest_centres

SHRINKAGE = 10.0
"""Rows that the average variance within clusters counts for: a cluster of few rows seems narrower than it is."""

PARTNERS = 16
"""Nearest clusters that a cluster may be merged with."""

_HALVINGS = 3  # iterations of 2-means in every cluster
_BLOCK = 64  # clusters whose merges are judged at a time


class ClusterMoments:
    """Moments of clusters, and what these say about the clusters' likelihood.

    Args:
        statistics: sums over each cluster's rows.
        n: rows in all.
        pool: (C,) float64 variance that small clusters are drawn to; None: the average within these clusters.
    """

    def __init__(self, statistics: SufficientStatistics, n: int, pool: Tensor | None = None) -> None:
        self.n, self.count = n, statistics.count
        per_row = statistics.count.clamp_min(1)[:, None]
        shift = statistics.first / per_row
        self.means = statistics.means + shift
        self.variances = (statistics.second / per_row - shift.square()).clamp_min_(0)
        self.pool = (self.count @ self.variances) / n if pool is None else pool

    def classification_likelihood(self, count: Tensor, variances: Tensor) -> Tensor:
        """Return the log-likelihood (nats, up to a constant a row) of clusters of count (...) rows given to them alone.

        A cluster's weight is its share of the rows; its variances (..., C) are drawn to the pool.
        """
        shrunk = (count[..., None] * variances + SHRINKAGE * self.pool) / (count[..., None] + SHRINKAGE)
        shrunk.clamp_min_(torch.finfo(shrunk.dtype).tiny)  # all rows are equal along an axis
        spread = (shrunk.log() + variances / shrunk).sum(-1)
        return count * ((count.clamp_min(1) / self.n).log() - 0.5 * spread)

    def cheapest_merges(self) -> tuple[Tensor, Tensor]:
        """Return for every cluster the best one to merge it with (K,) int64, and what that costs (K,), nats."""
        near = nearest_centres((self.means - self.means.mean(0)).float(), PARTNERS + 1)[:, 1:]
        own = self.classification_likelihood(self.count, self.variances)
        partners, losses = [], []
        for start in range(0, len(near), _BLOCK):
            j = near[start : start + _BLOCK]
            i = torch.arange(start, start + len(j), device=near.device)[:, None]
            both = self.count[i] + self.count[j]
            share = (self.count[i] / both.clamp_min(1))[..., None]
            between = (self.means[j] - self.means[i]).square_().mul_(share * (1 - share))
            within = self.variances[i] * share + self.variances[j] * (1 - share)
            loss, place = (own[i] + own[j] - self.classification_likelihood(both, within.add_(between))).min(1)
            partners.append(j.gather(1, place[:, None]).squeeze(1))
            losses.append(loss)
        partner, loss = torch.cat(partners), torch.cat(losses)
        # Two that choose each other are one merge: rounding must not say which of them is the cheaper.
        mutual = partner[partner] == torch.arange(len(partner), device=partner.device)
        return partner, loss.where(~mutual, (loss + loss[partner]) / 2)


def redistribute(rows: Rows, centres: Tensor, winners: Tensor) -> tuple[Tensor, Tensor, int]:
    """Merge clusters that cost little to merge, and split as many others that gain more. A collective call.

    Args:
        centres: (K, C) float32, points near the clusters' means.
        winners: (n,) int32, cluster of this process's rows.

    Returns:
        The new clusters' means (K, C) float32, the cluster of this process's rows (n,) int32, and the number of moves.
    """
    k = len(centres)
    if k < 3:
        return centres, winners, 0
    clusters = ClusterMoments(hard_moments(rows, centres, winners, "diag"), rows.n)
    halves, sides = _halve(rows, clusters, winners)
    parts = ClusterMoments(hard_moments(rows, halves, sides, "diag"), rows.n, clusters.pool)
    gains = parts.classification_likelihood(parts.count, parts.variances).view(k, 2).sum(1)
    gains -= clusters.classification_likelihood(clusters.count, clusters.variances)
    gains[(parts.count.view(k, 2) < 1).any(1)] = -torch.inf
    partners, losses = clusters.cheapest_merges()
    # One process decides: rounding may differ between machines, and all must make the same moves.
    moves = rows.ranks.from_main(lambda: _moves(_rounded(gains), _rounded(losses), partners.tolist()))
    if not moves:
        return clusters.means.to(centres.dtype), winners, 0
    split, given, kept = torch.tensor(moves, device=centres.device).T
    new, merged = clusters.means.clone(), torch.arange(k, dtype=winners.dtype, device=winners.device)
    share = (clusters.count[given] / (clusters.count[given] + clusters.count[kept]).clamp_min(1))[:, None]
    new[kept] += share * (clusters.means[given] - clusters.means[kept])
    new[split], new[given] = parts.means[2 * split], parts.means[2 * split + 1]
    merged[given] = kept.to(merged.dtype)
    places = merged.repeat_interleave(2)  # of the halves: that of their cluster, unless it is split
    places[2 * split], places[2 * split + 1] = split.to(merged.dtype), given.to(merged.dtype)
    return new.to(centres.dtype), places[sides.long()], len(moves)


def _halve(rows: Rows, clusters: ClusterMoments, winners: Tensor) -> tuple[Tensor, Tensor]:
    """Run 2-means in every cluster; return the halves' centres (2 K, C) float32 and the half of every row (n,)."""
    k = len(clusters.means)
    spread, axis = clusters.variances.max(1)
    shift = torch.zeros_like(clusters.means).scatter_(1, axis[:, None], spread.sqrt()[:, None])
    halves = torch.stack((clusters.means + shift, clusters.means - shift), 1).flatten(0, 1).float()
    pairs = torch.arange(2 * k, device=halves.device)
    candidates, sides = torch.stack((pairs, pairs ^ 1), 1), 2 * winners
    for _ in range(_HALVINGS):
        halves = lloyd_iteration(rows, halves, candidates, sides)
    return halves, sides


def _rounded(values: Tensor) -> list[float]:
    """Thousandths of a nat: equal clusters must not be ordered by the rounding of sums over other processes."""
    return [round(value, 3) for value in values.tolist()]


def _moves(gains: list[float], losses: list[float], partners: list[int]) -> list[tuple[int, int, int]]:
    """Pair the best splits with the cheapest merges, each cluster in one of them at most, as long as that pays.

    Returns:
        Clusters (split, given up, merged with): one half of the first takes the number of the second.
    """
    merges = iter(sorted(range(len(losses)), key=losses.__getitem__))
    busy: set[int] = set()
    moves = []
    for split in sorted(range(len(gains)), key=gains.__getitem__, reverse=True):
        if split in busy:
            continue
        merge = next((i for i in merges if not {i, partners[i]} & (busy | {split})), None)
        if merge is None or gains[split] <= losses[merge]:
            break
        moves.append((split, merge, partners[merge]))
        busy |= {split, merge, partners[merge]}
    return moves
