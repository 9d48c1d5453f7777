"""Passes over the rows that compare each row with a few candidate components only.

The *winner* of a row is the component that fits it best. Rows with the same last winner form a group and share their
candidates, which are components near that winner. The scores of a group and its sums are then two small dense matrix
products. Groups of similar size are padded and computed as a batch, so that a few large operations, which parallelise
well, replace many small ones.

Deviations are taken from the winner's mean, which makes float32 accurate for the winner however small its variances.
For other narrow candidates it is accurate only once they have become the winner.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mmfm.infra.precision import exact_float32
from mmfm.mixture.moments import SufficientStatistics, row_adder
from mmfm.mixture.streaming import Rows
from mmfm.mixture.workspace import Workspace

GROUP_ROWS = 64
"""Rows per component to hold in memory together, so that groups are large enough for efficient products."""

_GROUP_LIMIT = 512  # rows; larger groups are split, as sums over a group are in the dtype of the products
_PENDING_LIMIT = 1 << 18  # elements
_BATCH_LIMIT = {"cpu": 1 << 21, "cuda": 1 << 26}  # elements of a batch's features and parameters


class CandidateTable:
    """Candidates of each component, and the parameters of all components in one dtype.

    The score of a row x for component j is constant_j - sum precision_j (x - mean_j)^2 / 2.

    Args:
        means: (K, C). Rounded to ``dtype``, they are the points from which deviations are taken.
        candidates: (K, M) int64, each component first among its own candidates.
        precisions: (K, C), inverse variances; None for k-means, where they are 1.
        constants: (K,), log of weight times density of each component at its own mean; None for k-means, where they
            are 0.
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
        self.constants = self.means.new_zeros(len(means)) if constants is None else constants.to(dtype)

    @property
    def width(self) -> int:
        """Number of features F of a row: C deviations, and C squared deviations if there are precisions."""
        return self.means.shape[1] * (1 if self.precisions is None else 2)

    def features(self, x: Tensor, k: Tensor, workspace: Workspace) -> Tensor:
        """Return features [x - mean_k, (x - mean_k)^2] (G, R, F) of groups of rows x (G, R, C) with winners k (G,)."""
        means, c = self.means.index_select(0, k)[:, None], x.shape[-1]
        result = workspace.empty("features", self.means.dtype, *x.shape[:2], self.width)
        deviation = torch.sub(x, means, out=result[..., :c])
        if self.precisions is not None:
            torch.mul(deviation, deviation, out=result[..., c:])
        return result

    def joint(self, k: Tensor, features: Tensor, workspace: Workspace) -> Tensor:
        """Return scores (G, R, M) of rows with features (G, R, F) for the candidates of their winners k (G,).

        They are log-joints, or for k-means minus half the squared distance up to a constant for each row.
        """
        own, c = self.candidates.index_select(0, k), self.means.shape[1]
        offset = workspace.gather_rows("offset", self.means, own).sub_(self.means.index_select(0, k)[:, None])
        result = workspace.empty("joint", features.dtype, *features.shape[:2], own.shape[1])
        if self.precisions is None:
            constant = offset.square().sum(2).mul_(-0.5)
            return torch.baddbmm(constant[:, None], features, offset.mT, out=result)
        precision = workspace.gather_rows("precision", self.precisions, own)
        weights = workspace.empty("weights", features.dtype, *own.shape, self.width)
        linear = torch.mul(offset, precision, out=weights[..., :c])
        torch.mul(precision, -0.5, out=weights[..., c:])
        constant = self.constants[own].sub_(offset.mul_(linear).sum(2), alpha=0.5)
        return torch.baddbmm(constant[:, None], features, weights.mT, out=result)


class _PendingSums:
    """Sums of deviations from winners' means, shifted to the components' own means and added in large batches."""

    def __init__(self, statistics: SufficientStatistics) -> None:
        self.statistics = statistics
        self._parts: list[tuple[Tensor, ...]] = []
        self._size = 0

    def add(self, k: Tensor, component: Tensor, count: Tensor, sums: Tensor) -> None:
        """Add counts (P,) and feature sums (P, F) of components (P,); the features are relative to winners k (P,)."""
        self._parts.append((k, component, count, sums))
        self._size += sums.numel()
        if self._size > _PENDING_LIMIT:
            self.flush()

    def flush(self) -> None:
        """Add the pending sums to the statistics."""
        if not self._parts:
            return
        s, (k, component, count, sums) = self.statistics, map(torch.cat, zip(*self._parts, strict=True))
        count, sums = count.double(), sums.double()
        offset = s.means.index_select(0, component).sub_(s.means.index_select(0, k))
        c, add = offset.shape[1], row_adder(component)
        first = sums[:, :c]
        if sums.shape[1] > c:
            add(s.second, sums[:, c:] - offset * (2 * first - count[:, None] * offset))
        add(s.first, first - count[:, None] * offset)
        add(s.count, count)
        self._parts, self._size = [], 0


def grouped_pass(
    rows: Rows, table: CandidateTable, winners: Tensor, statistics: SufficientStatistics, mass: float | None
) -> Tensor:
    """Compare every row with the candidates of its last winner, and add its moments to the statistics.

    Args:
        winners: (n,) int32, last winner of each of this process's rows; overwritten with the new winner.
        statistics: its reference points must be the means of the table.
        mass: posterior mass per row that may be neglected; None assigns rows to their best candidate (k-means).

    Returns:
        () float64, the sum over this process's rows of the log-sum of their joints, or for k-means of the best score.
    """
    total, pending, workspace = statistics.means.new_zeros(()), _PendingSums(statistics), rows.workspace
    with exact_float32(statistics.means.device.type):
        for position, x in rows.blocks():
            last = winners[position]
            new = last.new_empty(len(last) + 1)  # the last element takes what padding says
            for k, index, padding in _batches(last, table):
                batch = workspace.gather_rows("x", x, index)
                best, value = _process(batch, k, padding, table, pending, mass, workspace)
                new[index.masked_fill_(padding, len(last))] = best
                total += value
            winners[position] = new[:-1]
    pending.flush()
    return total


def lloyd_iteration(rows: Rows, centres: Tensor, candidates: Tensor, winners: Tensor) -> Tensor:
    """Assign rows to the nearest of their candidates, and return the means of the clusters. A collective call.

    Args:
        centres: (K, C) float32.
        candidates: (K, M) int64, see :class:`CandidateTable`.
        winners: (n,) int32, cluster of each of this process's rows; overwritten.

    Returns:
        (K, C) float32; the centre of an empty cluster does not change.
    """
    table = CandidateTable(centres, candidates, torch.float32)
    statistics = SufficientStatistics(table.means.double(), None)
    grouped_pass(rows, table, winners, statistics, None)
    statistics.share(rows.ranks)
    return (statistics.means + statistics.first / statistics.count.clamp_min(1)[:, None]).float()


def _batches(winners: Tensor, table: CandidateTable) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Group rows by their winners, and yield the groups in batches of similar size.

    Yields:
        The winners k (G,) of the groups, the rows of the groups (G, R) int64, and which of these are padding (G, R)
        bool. Padding repeats a row of the group.
    """
    order = winners.sort(stable=True).indices
    found, lengths = torch.unique(winners, return_counts=True)
    starts = lengths.cumsum(0) - lengths
    pieces = (lengths + _GROUP_LIMIT - 1) // _GROUP_LIMIT
    piece = torch.arange(int(pieces.sum()), device=winners.device)
    group = torch.arange(len(found), device=winners.device).repeat_interleave(pieces, output_size=len(piece))
    first = (piece - (pieces.cumsum(0) - pieces)[group]) * _GROUP_LIMIT
    length = (lengths[group] - first).clamp_max_(_GROUP_LIMIT)
    length, by_length = length.sort(descending=True, stable=True)
    start, k = (starts[group] + first)[by_length], found[group][by_length].long()
    at, sizes = 0, length.tolist()
    parameters = 2 * table.width * table.candidates.shape[1]
    while at < len(sizes):
        count = max(1, _BATCH_LIMIT[winners.device.type] // (2 * sizes[at] * table.width + parameters))
        part = slice(at, at + count)
        place = torch.arange(sizes[at], device=winners.device)
        padding = place >= length[part, None]
        yield k[part], order[start[part, None] + place.where(~padding, 0)], padding
        at += count


def _process(
    x: Tensor,
    k: Tensor,
    padding: Tensor,
    table: CandidateTable,
    pending: _PendingSums,
    mass: float | None,
    workspace: Workspace,
) -> tuple[Tensor, Tensor]:
    """Compare a batch of groups x (G, R, C) with their candidates, as in :func:`grouped_pass`.

    Returns:
        The new winners of the rows (G, R) int32, and the sum of the rows' values ().
    """
    features = table.features(x, k, workspace)
    joint = table.joint(k, features, workspace)
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
    sums = torch.bmm(r.mT, features, out=workspace.empty("sums", r.dtype, len(k), own.shape[1], table.width))
    pending.add(k[group], own[group, candidate], r.sum(1).flatten()[pair], sums.flatten(0, 1)[pair])
    best = own.gather(1, place.squeeze(2)).to(torch.int32)
    return best, value.masked_fill(padding, 0.0).sum(dtype=torch.float64)


def topk_with_self(scores: Tensor, start: int, m: int) -> Tensor:
    """Return the m best columns (b, m) of scores (b, K), which are overwritten; column start + i is first in row i."""
    index = torch.arange(len(scores), device=scores.device)
    scores[index, start + index] = math.inf
    return scores.topk(m, dim=1).indices
