"""Truncated E-steps: a row meets the components near its last winner, not all of them.

Variational EM with truncated posteriors (Lucke and Eggert 2010, "Expectation truncation and the benefits of
preselection in training generative models"; Forster and Lucke 2018, "Can clustering scale sublinearly with its
clusters?"): rows are grouped by the component that won them last, and a group's candidates are the M components with
the largest expected log-joint over that component's own distribution. Group times candidates is a small dense product,
which a CPU does at nearly its full speed; a search for every row alone would spend its time fetching. The bound is that
of the log-sum over the candidates, which is never above the log-likelihood.

Deviations are taken from the winner's mean, so float32 is accurate even where variances are tiny.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfm.mixture.gaussian import Mixture, exact_float32
from mmfm.mixture.moments import SufficientStatistics, add_rows
from mmfm.mixture.streaming import Rows

GROUP_ROWS = 128
"""Rows per component that should be in memory together, for groups that are worth a product."""

_BLOCK = 1024  # rows of a group in one product; sums within are in the products' precision
_FLUSH = 1 << 22  # numbers of the pending float64 sums


@dataclass(frozen=True)
class Truncation:
    """How far posteriors are truncated.

    Attributes:
        candidates: components that a row meets, M; the last iteration's winner is always among them.
        mass: posterior mass per row (among the candidates) that the M-step may leave out.
        sample: rows on which the truncated bound is compared with the log-likelihood.
    """

    candidates: int = 32
    mass: float = 1e-6
    sample: int = 4096

    def gap_limit(self, rows: Rows, mixture: Mixture, winners: Tensor, dtype: torch.dtype) -> float:
        """Return what truncation hides of a mean log-likelihood (nats per row), from all rows: an exact pass.

        A sample would not do: a few rows that lost their component make most of the gap.
        """
        return measure_gap(rows, mixture, winners, replace(self, sample=rows.n), dtype)[0]


class Table:
    """Parameters of the components for groups' products, in one precision, and every component's candidates.

    Args:
        means: (K, C); rounded to ``dtype`` they are the points from which deviations are taken.
        candidates: (K, M), a component's own number first.
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

    @classmethod
    def of(cls, mixture: Mixture, truncation: Truncation, dtype: torch.dtype) -> "Table":
        """Make the table of a diagonal or spherical mixture."""
        v = mixture.diagonal()
        constants = mixture.weights.log() - 0.5 * (v.log().sum(1) + mixture.dimension * math.log(2 * math.pi))
        candidates = neighbours(mixture, truncation.candidates)
        return cls(mixture.means, candidates, dtype, v.reciprocal(), constants)

    def joint(self, k: int, features: Tensor) -> Tensor:
        """Return log-joints (n, M) of rows with features [x - mean_k, (x - mean_k)^2] (n, 2 C) or the first half."""
        own = self.candidates[k]
        offset = self.means.index_select(0, own).sub_(self.means[k])
        if self.precisions is None:
            return torch.addmm(offset.square().sum(1).mul_(-0.5), features, offset.T)
        precision = self.precisions.index_select(0, own)
        linear = offset * precision
        constant = self.constants.index_select(0, own).sub_(offset.mul_(linear).sum(1), alpha=0.5)
        return torch.addmm(constant, features, torch.cat((linear, precision.mul_(-0.5)), 1).T)


def neighbours(mixture: Mixture, m: int) -> Tensor:
    """Return the candidates of every component's rows, (K, min(m, K)) int64, the component itself first.

    With H(i, j) the expectation of log w_j N(x; mean_j, v_j) over x from component i: half are the components best for
    the rows that are there, the largest H(k, j); half are those whose own rows are likeliest to be there by mistake,
    the largest H(j, k) - H(j, j). This knows what distances of means don't: the wide components that take their
    neighbours' outliers, and the narrow ones that must get theirs back. H is a product of moments with the table.
    """
    centre, constant, table = mixture._prepared(torch.float32)[:3]
    means, variances = (mixture.means - centre).float(), mixture.diagonal().float()
    squares = means.square() + variances
    if mixture.covariance_type == "spherical":
        squares = squares.sum(1, keepdim=True)
    moments, k = torch.cat((means, squares), 1), len(means)
    at_home = constant + (moments * table.T).sum(1)
    result = torch.empty(k, min(m, k), dtype=torch.int64, device=means.device)
    half = -(-result.shape[1] // 2)
    with exact_float32(means.device.type):
        for start in range(0, k, _BLOCK):
            own = slice(start, start + _BLOCK)
            best = _itself_first(torch.addmm(constant, moments[own], table), start, half)
            mistaken = torch.addmm(constant[own, None] - at_home, table[:, own].T, moments.T)
            rest = mistaken.scatter_(1, best, -math.inf).topk(result.shape[1] - half, dim=1).indices
            result[own] = torch.cat((best, rest), 1)
    return result


def nearest_centres(centres: Tensor, m: int) -> Tensor:
    """Return the m nearest centres of every centre (K, C), (K, min(m, K)) int64, itself first."""
    k, half = len(centres), centres.square().sum(1) / 2
    result = torch.empty(k, min(m, k), dtype=torch.int64, device=centres.device)
    with exact_float32(centres.device.type):
        for start in range(0, k, _BLOCK):
            scores = torch.addmm(-half, centres[start : start + _BLOCK], centres.T)
            result[start : start + _BLOCK] = _itself_first(scores, start, result.shape[1])
    return result


def _itself_first(scores: Tensor, start: int, m: int) -> Tensor:
    index = torch.arange(len(scores), device=scores.device)
    scores[index, start + index] = math.inf
    return scores.topk(m, dim=1).indices


class _Pending:
    """Moments about the groups' winners, moved to the candidates' own means and added a few thousand at a time."""

    def __init__(self, statistics: SufficientStatistics, squares: bool) -> None:
        self.statistics, self.squares = statistics, squares
        self._parts: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self._size = 0

    def add(self, k: int, component: Tensor, count: Tensor, sums: Tensor) -> None:
        """Add counts (a,) and sums (a, C) or (a, 2 C) of deviations from the mean of k for components (a,)."""
        self._parts.append((k, component, count, sums))
        self._size += sums.numel()
        if self._size > _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Add what is pending to the statistics."""
        if not self._parts:
            return
        s, (group, components, counts, sums) = self.statistics, zip(*self._parts, strict=True)
        lengths = torch.tensor([len(c) for c in components])
        group = torch.tensor(group).repeat_interleave(lengths).to(s.means.device)
        component, count, sums = torch.cat(components), torch.cat(counts).double(), torch.cat(sums).double()
        offset = s.means[component].sub_(s.means[group])
        first = sums[:, : offset.shape[1]]
        if self.squares:
            add_rows(s.second, component, sums[:, offset.shape[1] :] - offset * (2 * first - count[:, None] * offset))
        add_rows(s.first, component, first - count[:, None] * offset)
        add_rows(s.count, component, count)
        self._parts, self._size = [], 0


def grouped_pass(
    rows: Rows, table: Table, winners: Tensor, statistics: SufficientStatistics, mass: float | None
) -> Tensor:
    """Match every row to the candidates of its last winner and add its moments to the statistics.

    Args:
        winners: (n,) last winners of this process's rows; overwritten with the new ones.
        statistics: its references must be the table's means.
        mass: of a row's posterior that may be left out; None gives rows wholly to their best candidate (k-means).

    Returns:
        () float64: the sum over this process's rows of log-sum-joint, or for k-means of the best score.
    """
    total = statistics.means.new_zeros(())
    pending = _Pending(statistics, squares=table.precisions is not None)
    with exact_float32(statistics.means.device.type):
        for where, x in rows.stretches():
            order = winners[where].sort(stable=True).indices
            counts = torch.bincount(winners[where], minlength=len(table.means)).tolist()
            start, new = 0, torch.empty_like(winners[where])
            for k, n in enumerate(counts):
                for a in range(start, start + n, _BLOCK):
                    own = order[a : min(a + _BLOCK, start + n)]
                    best, value = _match(x.index_select(0, own), k, table, pending, mass)
                    new[own] = best
                    total += value
                start += n
            winners[where] = new
    pending.flush()
    return total


def _match(x: Tensor, k: int, table: Table, pending: _Pending, mass: float | None) -> tuple[Tensor, Tensor]:
    """Match rows (n, C) won by k; return their new winners (n,) and the sum of their values."""
    z = x.to(table.means.dtype).sub_(table.means[k])
    features = z if table.precisions is None else torch.cat((z, z.square()), 1)
    joint = table.joint(k, features)
    top, place = joint.max(1, keepdim=True)
    own = table.candidates[k]
    if mass is None:
        value = top.sum(dtype=torch.float64)
        r = torch.zeros_like(joint).scatter_(1, place, 1.0)
        keep = r.any(0).nonzero().squeeze(1)
    else:
        r = joint.sub_(top).exp_()
        total = r.sum(1, keepdim=True)
        value = (top + total.log()).sum(dtype=torch.float64)
        r.div_(total)
        keep = (r.amax(0) > mass / len(own)).nonzero().squeeze(1)
    kept = r.index_select(1, keep)
    pending.add(k, own[keep], kept.sum(0), kept.T @ features)
    return own[place.squeeze(1)].to(torch.int32), value


def truncated_e_step(
    rows: Rows, mixture: Mixture, winners: Tensor, dtype: torch.dtype, truncation: Truncation
) -> tuple[SufficientStatistics, Tensor]:
    """Return the statistics of all rows under truncated posteriors, summed over the processes, and the new winners.

    Args:
        winners: (n,) int32, likeliest component of this process's rows in the last iteration.
    """
    table = Table.of(mixture, truncation, dtype)
    statistics = SufficientStatistics(table.means.double(), mixture.covariance_type)
    winners = winners.clone()
    statistics.log_likelihood += grouped_pass(rows, table, winners, statistics, truncation.mass)
    return statistics.share(rows.ranks), winners


def exact_winners(rows: Rows, mixture: Mixture, dtype: torch.dtype) -> Tensor:
    """Return the likeliest component of this process's rows (n,) int32, of all components."""
    found = [mixture.log_joint(x, dtype).argmax(1).int() for _, x in rows]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int32, device=mixture.device)


def measure_gap(
    rows: Rows, mixture: Mixture, winners: Tensor, truncation: Truncation, dtype: torch.dtype
) -> tuple[float, float]:
    """Return how far the truncated bound is below the mean log-likelihood: nats per row, and its standard error.

    Measured on rows spread evenly over the chunks, the same for any number of processes.
    """
    candidates = neighbours(mixture, truncation.candidates)
    per_chunk = -(-truncation.sample * rows.chunk_size // rows.n)
    sums = torch.zeros(3, dtype=torch.float64, device=mixture.device)
    for chunk, x in rows:
        some = torch.arange(0, len(x), max(1, len(x) // per_chunk), device=x.device)
        joint = mixture.log_joint(x[some], dtype)
        last = winners[some + (chunk.start - rows.local.start)].long()
        gap = (joint.logsumexp(1) - joint.gather(1, candidates[last]).logsumexp(1)).double()
        sums += torch.stack((gap.new_tensor(len(gap)), gap.sum(), gap.square().sum()))
    n, total, squares = rows.ranks.sum(sums).tolist()
    return total / n, math.sqrt(max(squares / n - (total / n) ** 2, 0) / n)
