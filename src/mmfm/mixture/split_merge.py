"""Split-and-merge moves, which take clusters from regions with too many to regions with too few.

Lloyd's algorithm and EM move components only locally, so the final likelihood of a fit depends mostly on how many
components the seeds put into each region. Ueda, Nakano, Ghahramani and Hinton (2000, "SMEM algorithm for mixture
models") merge two components, split a third, and accept the move if it raises the likelihood. Here the criterion is the
classification likelihood of the hard assignment (Celeux and Govaert 1992). It follows from the moments of the clusters,
so that all clusters are evaluated at once and every move that raises it is made.
"""

import torch
from torch import Tensor

from mmfm.mixture.groups import lloyd_iteration
from mmfm.mixture.moments import SufficientStatistics, hard_moments
from mmfm.mixture.streaming import Rows
from mmfm.mixture.truncated import nearest_centres

SHRINKAGE = 10.0
"""Weight, in rows, of the pooled variance in a cluster's variance, as small clusters seem narrower than they are."""

PARTNERS = 16
"""Number of nearest clusters considered for a merge."""

_HALVINGS = 3  # iterations of 2-means in every cluster
_BLOCK = 64  # clusters whose merges are evaluated at a time


class ClusterMoments:
    """Moments of clusters, and the classification likelihoods that follow from them.

    Args:
        statistics: sums over the rows of each cluster.
        n: total number of rows.
        pool: (C,) float64, variances towards which those of small clusters are shrunk; by default the average within
            these clusters.

    Attributes:
        count: (K,), rows of each cluster.
        means: (K, C).
        variances: (K, C), without shrinkage.
    """

    def __init__(self, statistics: SufficientStatistics, n: int, pool: Tensor | None = None) -> None:
        self.n, self.count = n, statistics.count
        per_row = statistics.count.clamp_min(1)[:, None]
        shift = statistics.first / per_row
        self.means = statistics.means + shift
        self.variances = (statistics.second / per_row - shift.square()).clamp_min_(0)
        self.pool = (self.count @ self.variances) / n if pool is None else pool

    def classification_likelihood(self, count: Tensor, variances: Tensor) -> Tensor:
        """Return the classification log-likelihood of clusters, in nats, up to a constant per row.

        Args:
            count: (...), rows of each cluster; its weight is its share of all rows.
            variances: (..., C), before shrinkage towards the pool.
        """
        shrunk = (count[..., None] * variances + SHRINKAGE * self.pool) / (count[..., None] + SHRINKAGE)
        shrunk.clamp_min_(torch.finfo(shrunk.dtype).tiny)  # 0 if all rows are equal along an axis
        spread = (shrunk.log() + variances / shrunk).sum(-1)
        return count * ((count.clamp_min(1) / self.n).log() - 0.5 * spread)

    def cheapest_merges(self) -> tuple[Tensor, Tensor]:
        """Return the best partner of each cluster for a merge (K,) int64, and the loss of likelihood (K,), in nats."""
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
        # Clusters that choose each other describe the same merge, whose loss must not depend on rounding.
        mutual = partner[partner] == torch.arange(len(partner), device=partner.device)
        return partner, loss.where(~mutual, (loss + loss[partner]) / 2)


def redistribute(rows: Rows, centres: Tensor, winners: Tensor) -> tuple[Tensor, Tensor, int]:
    """Merge clusters at little cost, and split as many others at a larger gain. A collective call.

    Args:
        centres: (K, C) float32, points near the means of the clusters.
        winners: (n,) int32, cluster of each of this process's rows.

    Returns:
        Means of the new clusters (K, C) float32, new cluster of each of this process's rows (n,) int32, and number of
        moves.
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
    # The main process decides for all: rounding may differ between machines.
    moves = rows.ranks.from_main(lambda: _moves(_rounded(gains), _rounded(losses), partners.tolist()))
    if not moves:
        return clusters.means.to(centres.dtype), winners, 0
    split, given, kept = torch.tensor(moves, device=centres.device).T
    new, merged = clusters.means.clone(), torch.arange(k, dtype=winners.dtype, device=winners.device)
    share = (clusters.count[given] / (clusters.count[given] + clusters.count[kept]).clamp_min(1))[:, None]
    new[kept] += share * (clusters.means[given] - clusters.means[kept])
    new[split], new[given] = parts.means[2 * split], parts.means[2 * split + 1]
    merged[given] = kept.to(merged.dtype)
    of_half = merged.repeat_interleave(2)  # new cluster of each half
    of_half[2 * split], of_half[2 * split + 1] = split.to(merged.dtype), given.to(merged.dtype)
    return new.to(centres.dtype), of_half[sides.long()], len(moves)


def _halve(rows: Rows, clusters: ClusterMoments, winners: Tensor) -> tuple[Tensor, Tensor]:
    """Run 2-means in every cluster; return the centres of the halves (2 K, C) float32 and the half of each row (n,)."""
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
    """Round to thousandths of a nat, so that the order of equal clusters does not depend on the number of processes."""
    return [round(value, 3) for value in values.tolist()]


def _moves(gains: list[float], losses: list[float], partners: list[int]) -> list[tuple[int, int, int]]:
    """Pair the best splits with the cheapest merges, using each cluster once, while the gain exceeds the loss.

    Returns:
        Triples of clusters (split, given up, merged with). One half of the first is numbered as the second.
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
