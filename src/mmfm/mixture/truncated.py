"""Truncated E-steps: a row meets the components near its last winner, not all of them.

Variational EM with truncated posteriors (Lucke and Eggert 2010, "Expectation truncation and the benefits of
preselection in training generative models"; Forster and Lucke 2018, "Can clustering scale sublinearly with its
clusters?"): rows are grouped by the component that won them last, and a group's candidates are the M components with
the largest expected log-joint over that component's own distribution. Group times candidates is a small dense product,
which a CPU does at nearly its full speed; a search for every row alone would spend its time fetching. The bound is that
of the log-sum over the candidates, which is never above the log-likelihood.

Deviations are taken from the winner's mean, so float32 is accurate for it even where its variances are tiny.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfm.infra.precision import exact_float32
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.groups import Table, grouped_pass, itself_first
from mmfm.mixture.moments import SufficientStatistics
from mmfm.mixture.streaming import Rows

_BLOCK = 1024  # components whose scores with all others are held at a time


@dataclass(frozen=True)
class Truncation:
    """How far posteriors are truncated.

    Attributes:
        candidates: components that a row meets, M; the last iteration's winner is always among them.
        mass: posterior mass per row (among the candidates) that the M-step may leave out.
        refresh: iterations after which all rows look for their winner among all components again. Without this a row
            that a component has left behind stays with its old neighbourhood, and such rows make most of what the
            truncated bound loses.
        sample: rows on which the truncated bound is compared with the log-likelihood.
    """

    candidates: int = 16
    mass: float = 1e-6
    refresh: int = 10
    sample: int = 4096

    def gap_limit(self, rows: Rows, mixture: Mixture, winners: Tensor, dtype: torch.dtype) -> float:
        """Return what truncation hides of a mean log-likelihood (nats per row), from all rows: an exact pass.

        A sample would not do: a few rows that lost their component make most of the gap.
        """
        return measure_gap(rows, mixture, winners, replace(self, sample=rows.n), dtype)[0]


def table_of(mixture: Mixture, truncation: Truncation, dtype: torch.dtype) -> Table:
    """Return the table of a diagonal or spherical mixture."""
    v = mixture.diagonal()
    constants = mixture.weights.log() - 0.5 * (v.log().sum(1) + mixture.dimension * math.log(2 * math.pi))
    candidates = neighbours(mixture, truncation.candidates)
    return Table(mixture.means, candidates, dtype, v.reciprocal(), constants)


def neighbours(mixture: Mixture, m: int) -> Tensor:
    """Return the candidates of every component's rows, (K, min(m, K)) int64, the component itself first.

    With H(i, j) the expectation of log w_j N(x; mean_j, v_j) over x from component i: half are the components best for
    the rows that are there, the largest H(k, j); half are those whose own rows are likeliest to be there by mistake,
    the largest H(j, k) - H(j, j). This knows what distances of means don't: the wide components that take their
    neighbours' outliers, and the narrow ones that must get theirs back. H is a product of moments with the table.
    """
    own = mixture.densities(torch.float32)
    centre, constant, table = own.centre, own.constant, own.table
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
            best = itself_first(torch.addmm(constant, moments[own], table), start, half)
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
            result[start : start + _BLOCK] = itself_first(scores, start, result.shape[1])
    return result


def truncated_e_step(
    rows: Rows, mixture: Mixture, winners: Tensor, dtype: torch.dtype, truncation: Truncation
) -> tuple[SufficientStatistics, Tensor]:
    """Return the statistics of all rows under truncated posteriors, summed over the processes, and the new winners.

    Args:
        winners: (n,) int32, likeliest component of this process's rows in the last iteration.
    """
    table = table_of(mixture, truncation, dtype)
    statistics = SufficientStatistics(table.means.double(), mixture.covariance_type)
    winners = winners.clone()
    statistics.log_likelihood += grouped_pass(rows, table, winners, statistics, truncation.mass)
    return statistics.share(rows.ranks), winners


def exact_winners(rows: Rows, mixture: Mixture, dtype: torch.dtype) -> Tensor:
    """Return the likeliest component of this process's rows (n,) int32, of all components."""
    winners = torch.empty(len(rows.local), dtype=torch.int32, device=mixture.device)
    for chunk, x in rows:
        winners[chunk.start - rows.local.start :][: len(x)] = mixture.log_joint(x, dtype, rows.space).argmax(1)
    return winners


def measure_gap(
    rows: Rows, mixture: Mixture, winners: Tensor, truncation: Truncation, dtype: torch.dtype
) -> tuple[float, float, int]:
    """Return how far the truncated bound is below the mean log-likelihood: nats per row, their standard error, rows.

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
    return total / n, math.sqrt(max(squares / n - (total / n) ** 2, 0) / n), int(n)
