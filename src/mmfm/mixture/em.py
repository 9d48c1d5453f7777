"""Streaming expectation-maximisation for Gaussian mixtures (Dempster, Laird and Rubin 1977; Bishop 2006, section 9.2).

Rows are processed in chunks fixed by their global index. Only one chunk's responsibilities (rows, K) exist at a time;
they are reduced to sufficient statistics (:mod:`mmfm.mixture.moments`). Each process has a range of chunks, and only
the statistics are exchanged, so the result is the same up to rounding for any number of processes.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfm.mixture import reseeding
from mmfm.mixture.densities import DIRECT_FROM, FLOAT64_FROM, arithmetic
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.moments import DROPPED_MASS, NARROW_FROM, SufficientStatistics, m_step
from mmfm.mixture.streaming import Rows
from mmfm.mixture.truncated import Truncation, exact_winners, truncated_e_step

FALL_TOLERANCE = 1e-6
"""Fall of the lower bound, in nats per row, that is always accepted: a thousandth of the usual ``tol``."""

_DENSE_SHARE = 1 / 16  # share of responsibilities that matter above which dense products are faster


def posteriors(joint: Tensor) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor, Tensor]]:
    """Normalise log-joints (b, K), which are overwritten.

    Only components within log(K / DROPPED_MASS) of the best one of a row can matter. If they are few, only these are
    exponentiated.

    Returns:
        log p(x), (b,) float64, and the responsibilities: a matrix (b, K), or if most are negligible, the row, component
        and responsibility (float64) of the others, each (P,), sorted by component.
    """
    top = joint.amax(1, keepdim=True)
    # The best component itself always passes, even if log-joints are so large (-1e9 with the variances of 1e-6 of some
    # starts) that subtracting the logarithm changes nothing.
    close = joint >= top - math.log(joint.shape[1] / DROPPED_MASS)
    if int(close.count_nonzero()) > _DENSE_SHARE * close.numel():
        weight = joint.sub_(top).exp_()
        total = weight.sum(1, dtype=torch.float64)
        return top.squeeze(1).double() + total.log(), weight.div_(total[:, None].to(weight.dtype))
    row, component = close.nonzero().unbind(1)
    component, order = component.sort(stable=True)
    row = row[order]
    weight = (joint[row, component] - top[row, 0]).double().exp_()
    total = _row_sums(row, weight, len(joint))
    return top.squeeze(1).double() + total.log(), (row, component, weight / total[row])


def _row_sums(row: Tensor, weight: Tensor, n: int) -> Tensor:
    """Sum the weights (P,) of each row, (n,). On a GPU they are sorted first, as its atomic additions are unordered."""
    if row.device.type == "cpu":
        return weight.new_zeros(n).index_add_(0, row, weight)
    ordered, order = row.sort(stable=True)
    lengths = torch.bincount(ordered, minlength=n)
    return torch.segment_reduce(weight[order], "sum", lengths=lengths, unsafe=True, initial=0)


def e_step(rows: Rows, mixture: Mixture, dtype: torch.dtype) -> SufficientStatistics:
    """Return the sufficient statistics of all rows under the mixture's posteriors. A collective call.

    Args:
        dtype: dtype of the log-densities; sums are always float64.
    """
    narrow = mixture.squared_mahalanobis() > NARROW_FROM
    statistics = SufficientStatistics(mixture.means, mixture.covariance_type, narrow)
    for _, x in rows:
        log_prob, responsibilities = posteriors(mixture.log_joint(x, dtype, rows.workspace))
        statistics.log_likelihood += log_prob.sum()
        if isinstance(responsibilities, Tensor):
            statistics.add_dense(x, responsibilities)
        else:
            row, component, weight = responsibilities
            statistics.add_pairs(x, component, row, weight)
    return statistics.share(rows.ranks)


@dataclass(frozen=True)
class EMState:
    """The state of EM between iterations.

    Attributes:
        mixture: parameters after the last M-step, or the initial ones.
        lower_bounds: mean log-likelihood (nats per row) from each iteration's E-step, so before its M-step.
        converged: whether EM has converged.
        reseeded: number of empty components moved after each M-step.
        slack: how far the next lower bound may fall below the last, owing to ``reg_covar`` and rounding.
        winners: (n,) int32, likeliest component of each of this process's rows; None with exact posteriors.
    """

    mixture: Mixture
    lower_bounds: tuple[float, ...] = ()
    converged: bool = False
    reseeded: tuple[int, ...] = ()
    slack: float = math.inf
    winners: Tensor | None = None

    @property
    def n_iter(self) -> int:
        """Number of completed iterations."""
        return len(self.lower_bounds)


def em_iterations(
    rows: Rows,
    state: EMState,
    *,
    max_iter: int,
    tol: float,
    reg_covar: float,
    dtype: torch.dtype,
    truncation: Truncation | None = None,
    shrinkage: float = 0.0,
) -> Iterator[EMState]:
    """Run EM, yielding the state after every iteration, until convergence or iteration ``max_iter``.

    As in scikit-learn's ``GaussianMixture``, EM has converged when the lower bound changes by less than ``tol``. In
    addition, no component may just have been reseeded, and with truncation the last E-step must have compared all rows
    with all components.

    Args:
        max_iter: most iterations in total, including those before ``state``.
        tol: smallest change of the lower bound, in nats per row, that is not yet convergence.
        dtype: dtype of the log-densities.
        truncation: how posteriors are truncated to a few components; None for exact posteriors.
        shrinkage: how much the variances of ``diag`` are shrunk, see :func:`mmfm.mixture.moments.m_step`. The lower
            bound, which leaves out the prior, need not rise then.

    Raises:
        ValueError: the lower bound fell by more than regularisation, rounding and truncation can explain.
    """
    while not state.converged and state.n_iter < max_iter:
        old, winners, searched, gap = state.mixture, state.winners, True, None
        if truncation is None:
            statistics = e_step(rows, old, dtype)
        else:
            settled = _change(state.lower_bounds) < tol
            if winners is None or settled or (state.n_iter > 0 and state.n_iter % truncation.refresh == 0):
                winners = exact_winners(rows, old, dtype)
            else:
                searched = False
            gap = functools.partial(truncation.gap_limit, rows, old, winners, dtype)
            statistics, winners = truncated_e_step(rows, old, winners, dtype, truncation)
        bound = float(statistics.log_likelihood) / rows.n
        _check_monotone(state, bound, gap, _remedy(old, dtype, truncation))
        mixture, loss = m_step(statistics, old.covariance_type, reg_covar, shrinkage, old.variances)
        mixture, moved = reseeding.reseed(mixture, statistics.count, reg_covar, sum(n > 0 for n in state.reseeded))
        # True of some initial mixtures only; the bound of these may be out of reach.
        below_floor = bool(old.diagonal().min() < reg_covar)
        undisturbed = not moved and not (state.reseeded and state.reseeded[-1])
        bounds = (*state.lower_bounds, bound)
        state = replace(
            state,
            mixture=mixture,
            lower_bounds=bounds,
            # A truncated bound also stalls when rows can't find the components that now fit them best. It has converged
            # only if a search among all components doesn't change it either.
            converged=undisturbed and searched and _change(bounds) < tol,
            reseeded=(*state.reseeded, moved),
            slack=math.inf if moved or below_floor else loss + rounding_error(old, mixture, bound, dtype),
            winners=winners,
        )
        yield state


def _change(bounds: tuple[float, ...]) -> float:
    """Return the absolute difference of the last two lower bounds, or infinity if there are fewer."""
    return abs(bounds[-1] - bounds[-2]) if len(bounds) > 1 else math.inf


def rounding_error(old: Mixture, new: Mixture, bound: float, dtype: torch.dtype) -> float:
    """Return an estimate of the rounding error of the difference of two mean log-likelihoods, in nats per row.

    It is proportional to the size of the terms that are summed.
    """
    coarse, fine = 2 * (old.dimension + abs(bound)), 0.0
    for mixture in (old, new):
        terms = mixture.squared_mahalanobis()
        coarse += float(mixture.weights @ terms.clamp_max(FLOAT64_FROM))
        fine += float(mixture.weights @ terms.clamp_max(DIRECT_FROM))  # components computed in float64
    return 8 * (
        torch.finfo(arithmetic(old.covariance_type, dtype)).eps * coarse + torch.finfo(torch.float64).eps * fine
    )


def _remedy(mixture: Mixture, dtype: torch.dtype, truncation: Truncation | None) -> str:
    choices = ["set gmm.precision to float64"] * (arithmetic(mixture.covariance_type, dtype) != torch.float64)
    choices += ["set gmm.e_step to exact"] * (truncation is not None)
    return " or ".join([*choices, "raise gmm.reg_covar"])


def _check_monotone(state: EMState, bound: float, gap: Callable[[], float] | None, remedy: str) -> None:
    """Raise ValueError if the lower bound fell by more than can be explained.

    Args:
        gap: measures the gap between truncated bound and log-likelihood; called only if the bound fell.
    """
    number = state.n_iter + 1
    if not math.isfinite(bound):
        raise ValueError(
            f"EM iteration {number}: the mean log-likelihood is {bound}; raise gmm.reg_covar or choose another gmm.init"
        )
    if not state.lower_bounds or bound >= state.lower_bounds[-1] - state.slack - FALL_TOLERANCE:
        return
    fall, allowed = state.lower_bounds[-1] - bound, state.slack + FALL_TOLERANCE
    if gap is not None:
        allowed += gap()
    if fall > allowed:
        raise ValueError(
            f"EM iteration {number}: the mean log-likelihood fell by {fall:.3g} nats to {bound:.6g}, where at most "
            f"{allowed:.3g} can be explained. Please report this; to go on, {remedy}"
        )
