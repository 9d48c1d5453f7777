"""A pass over the rows in groups: every row meets the candidates of the component that won it last.

Rows with the same last winner share their candidates, so a group's scores and its share of the sums are two small dense
products. Groups of about the same size are padded to one and computed as a batch: few large operations instead of many
small ones, which two threads or a GPU can share.

Deviations are taken from the winner's mean, so float32 is accurate for it even where its variances are tiny. For
another narrow candidate it is not, until that one has won the row.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mmfm.infra.precision import exact_float32
from mmfm.mixture.moments import SufficientStatistics, add_rows
from mmfm.mixture.streaming import Rows
from mmfm.mixture.workspace import Workspace

GROUP_ROWS = 64
"""Rows per component that should be in memory together, for groups that are worth a product."""

_LARGEST = 512  # rows of a group; sums within are in the products' precision
_FLUSH = 1 << 18  # numbers of the pending sums
_NUMBERS = {"cpu": 1 << 21, "cuda": 1 << 26}  # of a batch's features and tables


class Table:
    """Parameters of the components for groups' products, in one precision, and every component's candidates.

    Args:
        means: (K, C); rounded to ``dtype`` they are the points from which deviations are taken.
        candidates: (K, M) int64, a component's own number first.
        precisions: (K, C), None for unit ones.
        constants: (K,) log-density of each component at its own mean, with its weight; None for none.
    """

    def __init__(
        self,
        means: Tensor,
        candidates: Tensor,
        dtype: torch.dtype,
        precisions: Tensor | None = None,
        constants: Tensor | None = None,
    ) -> None:
        self.means, self.candidates = means.to(dtype), candidates
        self.precisions = None if precisions is None else precisions.to(dtype)
        self.constants = None if constants is None else constants.to(dtype)

    @property
    def width(self) -> int:
        """Features of a row, F: C deviations, and with precisions C squares."""
        return self.means.shape[1] * (1 if self.precisions is None else 2)

    def features(self, x: Tensor, k: Tensor, space: Workspace) -> Tensor:
        """Return [x - mean_k, (x - mean_k)^2] or the first half, (G, R, F), of rows x (G, R, C) won by k (G,)."""
        means, c = self.means.index_select(0, k)[:, None], x.shape[-1]
        result = space.take("features", self.means.dtype, *x.shape[:2], self.width)
        deviation = torch.sub(x, means, out=result[..., :c])
        if self.precisions is not None:
            torch.mul(deviation, deviation, out=result[..., c:])
        return result

    def joint(self, k: Tensor, features: Tensor, space: Workspace) -> Tensor:
        """Return log-joints (G, R, M) of rows won by k (G,) with features (G, R, F) and their candidates."""
        own, c = self.candidates.index_select(0, k), self.means.shape[1]
        offset = space.rows("offset", self.means, own).sub_(self.means.index_select(0, k)[:, None])
        result = space.take("joint", features.dtype, *features.shape[:2], own.shape[1])
        if self.precisions is None:
            constant = offset.square().sum(2).mul_(-0.5)
            return torch.baddbmm(constant[:, None], features, offset.mT, out=result)
        precision = space.rows("precision", self.precisions, own)
        weights = space.take("weights", features.dtype, *own.shape, self.width)
        linear = torch.mul(offset, precision, out=weights[..., :c])
        torch.mul(precision, -0.5, out=weights[..., c:])
        constant = self.constants[own].sub_(offset.mul_(linear).sum(2), alpha=0.5)
        return torch.baddbmm(constant[:, None], features, weights.mT, out=result)


class _Pending:
    """Moments about the groups' winners, moved to the components' own means and added a few thousand at a time."""

    def __init__(self, statistics: SufficientStatistics) -> None:
        self.statistics = statistics
        self._parts: list[tuple[Tensor, ...]] = []
        self._size = 0

    def add(self, k: Tensor, component: Tensor, count: Tensor, sums: Tensor) -> None:
        """Add counts (P,) and sums (P, F) of deviations from the means of k (P,) for components (P,)."""
        self._parts.append((k, component, count, sums))
        self._size += sums.numel()
        if self._size > _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Add what is pending to the statistics."""
        if not self._parts:
            return
        s, (k, component, count, sums) = self.statistics, map(torch.cat, zip(*self._parts, strict=True))
        count, sums = count.double(), sums.double()
        offset = s.means.index_select(0, component).sub_(s.means.index_select(0, k))
        c = offset.shape[1]
        first = sums[:, :c]
        if sums.shape[1] > c:
            add_rows(s.second, component, sums[:, c:] - offset * (2 * first - count[:, None] * offset))
        add_rows(s.first, component, first - count[:, None] * offset)
        add_rows(s.count, component, count)
        self._parts, self._size = [], 0


def grouped_pass(
    rows: Rows, table: Table, winners: Tensor, statistics: SufficientStatistics, mass: float | None
) -> Tensor:
    """Match every row to the candidates of its last winner and add its moments to the statistics.

    Args:
        winners: (n,) int32, last winners of this process's rows; overwritten with the new ones.
        statistics: its references must be the table's means.
        mass: of a row's posterior that may be left out; None gives rows wholly to their best candidate (k-means).

    Returns:
        () float64: the sum over this process's rows of log-sum-joint, or for k-means of the best score.
    """
    total, pending, space = statistics.means.new_zeros(()), _Pending(statistics), rows.space
    with exact_float32(statistics.means.device.type):
        for where, x in rows.stretches():
            last = winners[where]
            new = torch.empty_like(last)
            for k, index, padding in _batches(last, table):
                best, value = _match(space.rows("x", x, index), k, padding, table, pending, mass, space)
                new[index[~padding]] = best[~padding]
                total += value
            winners[where] = new
    pending.flush()
    return total


def lloyd_iteration(rows: Rows, centres: Tensor, candidates: Tensor, winners: Tensor) -> Tensor:
    """Give rows to the nearest of their candidates and return the clusters' means. A collective call.

    Args:
        centres: (K, C) float32.
        candidates: (K, M) int64, see :class:`Table`.
        winners: (n,) int32, cluster of this process's rows; overwritten.

    Returns:
        (K, C) float32; a cluster without rows stays where it is.
    """
    table = Table(centres, candidates, torch.float32)
    statistics = SufficientStatistics(table.means.double(), None)
    grouped_pass(rows, table, winners, statistics, None)
    statistics.share(rows.ranks)
    return (statistics.means + statistics.first / statistics.count.clamp_min(1)[:, None]).float()


def _batches(winners: Tensor, table: Table) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield groups of rows in batches.

    Yields:
        The groups' last winners k (G,), their rows (G, R) int64, and which of these are padding (G, R); these repeat a
        row of the group.
    """
    order = winners.sort(stable=True).indices
    found, lengths = torch.unique(winners, return_counts=True)
    starts = lengths.cumsum(0) - lengths
    pieces = (lengths + _LARGEST - 1) // _LARGEST
    piece = torch.arange(int(pieces.sum()), device=winners.device)
    group = torch.arange(len(found), device=winners.device).repeat_interleave(pieces)
    first = (piece - (pieces.cumsum(0) - pieces)[group]) * _LARGEST
    length = (lengths[group] - first).clamp_max_(_LARGEST)
    length, by_length = length.sort(descending=True, stable=True)
    start, k = (starts[group] + first)[by_length], found[group][by_length].long()
    at, sizes = 0, length.tolist()
    per_table = 2 * table.width * table.candidates.shape[1]
    while at < len(sizes):
        count = max(1, _NUMBERS[winners.device.type] // (2 * sizes[at] * table.width + per_table))
        part = slice(at, at + count)
        place = torch.arange(sizes[at], device=winners.device)
        padding = place >= length[part, None]
        yield k[part], order[start[part, None] + place.where(~padding, 0)], padding
        at += count


def _match(
    x: Tensor, k: Tensor, padding: Tensor, table: Table, pending: _Pending, mass: float | None, space: Workspace
) -> tuple[Tensor, Tensor]:
    """Match a batch of groups x (G, R, C): return the rows' new winners (G, R) int32 and the sum of their values."""
    features = table.features(x, k, space)
    joint = table.joint(k, features, space)
    own = table.candidates[k]
    top, place = joint.max(2, keepdim=True)
    if mass is None:
        value = top.squeeze(2)
        r = torch.zeros_like(joint).scatter_(2, place, 1.0)
        threshold = 0.0
    else:
        r = joint.sub_(top).exp_()
        total = r.sum(2, keepdim=True)
        value = top.add_(total.log()).squeeze(2)
        r.div_(total)
        threshold = mass / own.shape[1]
    r.masked_fill_(padding[..., None], 0.0)
    group, candidate = (r.amax(1) > threshold).nonzero().unbind(1)
    pair = group * own.shape[1] + candidate
    sums = torch.bmm(r.mT, features, out=space.take("sums", r.dtype, len(k), own.shape[1], table.width))
    pending.add(k[group], own[group, candidate], r.sum(1).flatten()[pair], sums.flatten(0, 1)[pair])
    best = own.gather(1, place.squeeze(2)).to(torch.int32)
    return best, value.masked_fill(padding, 0.0).sum(dtype=torch.float64)


def itself_first(scores: Tensor, start: int, m: int) -> Tensor:
    """Return the m best columns (b, m) of scores (b, K), which are overwritten; row i's own, start + i, comes first."""
    index = torch.arange(len(scores), device=scores.device)
    scores[index, start + index] = math.inf
    return scores.topk(m, dim=1).indices
