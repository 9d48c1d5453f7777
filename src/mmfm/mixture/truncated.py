"""Truncated E-steps, which compare a row only with components near its last winner.

This is variational EM with truncated posteriors (Lücke and Eggert 2010, "Expectation truncation and the benefits of
preselection in training generative models"; Forster and Lücke 2018, "Can clustering scale sublinearly with its
clusters?"). Rows are grouped by their last winner (:mod:`mmfm.mixture.groups`), and the candidates of a group are the M
components chosen by :func:`neighbours`. A group times its candidates is a small dense product, which runs at nearly
the peak speed of a CPU, whereas a separate search for every row would be limited by memory access. The lower bound
sums over the candidates only, so it never exceeds the log-likelihood.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfm.infra.precision import exact_float32
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.groups import CandidateTable, grouped_pass, topk_with_self
from mmfm.mixture.moments import SufficientStatistics
from mmfm.mixture.streaming import Rows

_BLOCK = 1024  # components compared with all others at a time


@dataclass(frozen=True)
class Truncation:
    """How posteriors are truncated.

    Attributes:
        candidates: number of components M that a row is compared with; its last winner is always one of them.
        mass: posterior mass per row, among the candidates, that the M-step may neglect.
        refresh: number of iterations between searches for the winners among all components. Without these, a row whose
            component has moved away never leaves its old neighbourhood; such rows account for most of the gap.
        sample: number of rows used to estimate the gap between truncated bound and log-likelihood.
    """

    candidates: int = 16
    mass: float = 1e-6
    refresh: int = 10
    sample: int = 4096

    def gap_limit(self, rows: Rows, mixture: Mixture, winners: Tensor, dtype: torch.dtype) -> float:
        """Return the gap between truncated bound and mean log-likelihood, in nats per row, from an exact pass.

        A sample would not be enough, because a few rows account for most of the gap.
        """
        return measure_gap(rows, mixture, winners, replace(self, sample=rows.n), dtype)[0]


def candidate_table(mixture: Mixture, truncation: Truncation, dtype: torch.dtype) -> CandidateTable:
    """Return the candidates and parameters of a diagonal or spherical mixture."""
    v = mixture.diagonal()
    constants = mixture.weights.log() - 0.5 * (v.log().sum(1) + mixture.dimension * math.log(2 * math.pi))
    candidates = neighbours(mixture, truncation.candidates)
    return CandidateTable(mixture.means, candidates, dtype, v.reciprocal(), constants)


def neighbours(mixture: Mixture, m: int) -> Tensor:
    """Return the candidates for the rows of each component, (K, min(m, K)) int64, the component itself first.

    Let H(i, j) be the expectation of log w_j N(x; mean_j, v_j) over x from component i. Half of the candidates of
    component k are those that fit its rows best, with the largest H(k, j). The other half are those whose own rows are
    most likely to be assigned to k by mistake, with the largest H(j, k) - H(j, j). Unlike distances between means, this
    accounts for wide components that attract their neighbours' outliers, and for narrow ones that must regain theirs.
    H is a matrix product of the components' moments with the table of :class:`mmfm.mixture.densities.Densities`.
    """
    densities = mixture.densities(torch.float32)
    centre, constant, table = densities.centre, densities.constant, densities.table
    means, variances = (mixture.means - centre).float(), mixture.diagonal().float()
    squares = means.square() + variances
    if mixture.covariance_type == "spherical":
        squares = squares.sum(1, keepdim=True)
    moments, k = torch.cat((means, squares), 1), len(means)
    to_self = constant + (moments * table.T).sum(1)  # H(j, j)
    result = torch.empty(k, min(m, k), dtype=torch.int64, device=means.device)
    half = -(-result.shape[1] // 2)
    with exact_float32(means.device.type):
        for start in range(0, k, _BLOCK):
            block = slice(start, start + _BLOCK)
            best = topk_with_self(torch.addmm(constant, moments[block], table), start, half)
            confusion = torch.addmm(constant[block, None] - to_self, table[:, block].T, moments.T)
            rest = confusion.scatter_(1, best, -math.inf).topk(result.shape[1] - half, dim=1).indices
            result[block] = torch.cat((best, rest), 1)
    return result


def nearest_centres(centres: Tensor, m: int) -> Tensor:
    """Return the m nearest centres to each centre (K, C), as (K, min(m, K)) int64 with the centre itself first."""
    k, half = len(centres), centres.square().sum(1) / 2
    result = torch.empty(k, min(m, k), dtype=torch.int64, device=centres.device)
    with exact_float32(centres.device.type):
        for start in range(0, k, _BLOCK):
            scores = torch.addmm(-half, centres[start : start + _BLOCK], centres.T)
            result[start : start + _BLOCK] = topk_with_self(scores, start, result.shape[1])
    return result


def truncated_e_step(
    rows: Rows, mixture: Mixture, winners: Tensor, dtype: torch.dtype, truncation: Truncation
) -> tuple[SufficientStatistics, Tensor]:
    """Return the sufficient statistics of all rows under truncated posteriors. A collective call.

    Args:
        winners: (n,) int32, last winner of each of this process's rows.

    Returns:
        The statistics, and the new winners (n,) int32.
    """
    table = candidate_table(mixture, truncation, dtype)
    statistics = SufficientStatistics(table.means.double(), mixture.covariance_type)
    winners = winners.clone()
    statistics.log_likelihood += grouped_pass(rows, table, winners, statistics, truncation.mass)
    return statistics.share(rows.ranks), winners


def exact_winners(rows: Rows, mixture: Mixture, dtype: torch.dtype) -> Tensor:
    """Return the likeliest of all components for each of this process's rows, (n,) int32."""
    winners = torch.empty(len(rows.local), dtype=torch.int32, device=mixture.device)
    for chunk, x in rows:
        winners[rows.position(chunk)] = mixture.log_joint(x, dtype, rows.workspace).argmax(1)
    return winners


def measure_gap(
    rows: Rows, mixture: Mixture, winners: Tensor, truncation: Truncation, dtype: torch.dtype
) -> tuple[float, float, int]:
    """Measure how far the truncated bound is below the mean log-likelihood. A collective call.

    The sampled rows are spread evenly over the chunks and do not depend on the number of processes.

    Returns:
        The gap and its standard error, in nats per row, and the number of rows sampled.
    """
    candidates = neighbours(mixture, truncation.candidates)
    per_chunk = -(-truncation.sample * rows.chunk_size // rows.n)
    sums = torch.zeros(3, dtype=torch.float64, device=mixture.device)
    for chunk, x in rows:
        some = torch.arange(0, len(x), max(1, len(x) // per_chunk), device=x.device)
        joint = mixture.log_joint(x[some], dtype)
        last = winners[rows.position(chunk)][some].long()
        gap = (joint.logsumexp(1) - joint.gather(1, candidates[last]).logsumexp(1)).double()
        sums += torch.stack((gap.new_tensor(len(gap)), gap.sum(), gap.square().sum()))
    n, total, squares = rows.ranks.sum(sums).tolist()
    return total / n, math.sqrt(max(squares / n - (total / n) ** 2, 0) / n), int(n)
