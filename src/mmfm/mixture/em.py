"""Streaming expectation-maximisation for Gaussian mixtures (Dempster, Laird and Rubin 1977; Bishop 2006, section 9.2).

The rows are cut into chunks by their global index. Only a chunk's (rows, K) responsibilities exist at a time; what is
kept are the sufficient statistics (:mod:`mmfm.mixture.moments`). Processes own ranges of whole chunks and share these
statistics alone, so the result is the same to rounding for any number of them.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfm.mixture import reseeding
from mmfm.mixture.densities import DIRECT_FROM, SHARP_FROM, arithmetic
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.moments import DROPPED_MASS, NARROW_FROM, SufficientStatistics, m_step
from mmfm.mixture.streaming import Rows
from mmfm.mixture.truncated import Truncation, exact_winners, truncated_e_step

_DENSE_SHARE = 1 / 16  # of the responsibilities that matter, above which two dense products are cheaper


def posteriors(joint: Tensor) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor, Tensor]]:
    """Normalise log-joints (b, K), which are overwritten.

    Only components within log(K / DROPPED_MASS) of a row's best can matter; where these are few, nothing else is
    exponentiated.

    Returns:
        log p(x) (b,) float64, and the responsibilities: (b, K), or where most are negligible the row (P,), component
        (P,) and responsibility (P,) float64 of those that aren't, sorted by component.
    """
    top = joint.amax(1, keepdim=True)
    # At least the best itself, also where so small a number is lost in the rounding of a huge one: with variances of
    # 1e-6, which some starts have, log-joints are -1e9.
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
    """Sum the weights (P,) of every row; by a sort on a GPU, whose additions have no fixed order."""
    if row.device.type == "cpu":
        return weight.new_zeros(n).index_add_(0, row, weight)
    ordered, order = row.sort(stable=True)
    lengths = torch.bincount(ordered, minlength=n)
    return torch.segment_reduce(weight[order], "sum", lengths=lengths, unsafe=True, initial=0)


def e_step(rows: Rows, mixture: Mixture, dtype: torch.dtype) -> SufficientStatistics:
    """Return the sufficient statistics of all rows under the mixture's posteriors, summed over the processes.

    Args:
        dtype: arithmetic of the product of the densities; sums are float64 always.
    """
    narrow = mixture.cancelling_terms() > NARROW_FROM
    statistics = SufficientStatistics(mixture.means, mixture.covariance_type, narrow)
    for _, x in rows:
        log_prob, responsibilities = posteriors(mixture.log_joint(x, dtype, rows.space))
        statistics.log_likelihood += log_prob.sum()
        if isinstance(responsibilities, Tensor):
            statistics.add_dense(x, responsibilities)
        else:
            row, component, weight = responsibilities
            statistics.add_pairs(x, component, row, weight)
    return statistics.share(rows.ranks)


@dataclass(frozen=True)
class EMState:
    """Where EM is after some iterations.

    Attributes:
        mixture: the parameters after the last M-step; the start where there was none.
        lower_bounds: mean log-likelihood (nats per row) in each iteration's E-step, before its M-step.
        converged: whether the last two differ by less than the tolerance.
        reseeded: number of components that were empty and moved, after each iteration's M-step.
        slack: how far the next lower bound may fall below the last: what ``reg_covar`` costs, and rounding.
        winners: (n,) int32, likeliest component of this process's rows; None in exact mode.
    """

    mixture: Mixture
    lower_bounds: tuple[float, ...] = ()
    converged: bool = False
    reseeded: tuple[int, ...] = ()
    slack: float = math.inf
    winners: Tensor | None = None

    @property
    def n_iter(self) -> int:
        """Iterations done."""
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
) -> Iterator[EMState]:
    """Run EM from a state, yielding the next one after every iteration, until convergence or ``max_iter`` in all.

    Converges as scikit-learn's GaussianMixture does: when the lower bound changes by less than ``tol``, here only if no
    component was reseeded just before, and with truncation only if all rows have just met all components.

    Args:
        truncation: how rows are matched to a few components each; None for exact responsibilities.

    Raises:
        ValueError: a lower bound that falls by more than regularisation, rounding and truncation explain.
    """
    while not state.converged and state.n_iter < max_iter:
        old, winners, settled = state.mixture, state.winners, _change(state.lower_bounds) < tol
        if truncation is None:
            statistics, slack, searched = e_step(rows, old, dtype), None, True
        else:
            searched = winners is None or settled or (state.n_iter and state.n_iter % truncation.refresh == 0)
            before = exact_winners(rows, old, dtype) if searched else winners
            statistics, winners = truncated_e_step(rows, old, before, dtype, truncation)
            slack = functools.partial(truncation.gap_limit, rows, old, before, dtype)
        bound = float(statistics.log_likelihood) / rows.n
        _check_rise(state, bound, slack, _remedy(old, dtype, truncation))
        mixture, loss = m_step(statistics, old.covariance_type, reg_covar)
        mixture, moved = reseeding.reseed(mixture, statistics.count, reg_covar, sum(n > 0 for n in state.reseeded))
        below_floor = bool(old.diagonal().min() < reg_covar)  # only a start: its bound may be out of reach
        undisturbed = not moved and not (state.reseeded and state.reseeded[-1])
        bounds = (*state.lower_bounds, bound)
        state = replace(
            state,
            mixture=mixture,
            lower_bounds=bounds,
            # Rows that a component has left behind hold a truncated bound where it is: it has converged if it stays
            # there after all of them have looked around.
            converged=undisturbed and bool(searched) and _change(bounds) < tol,
            reseeded=(*state.reseeded, moved),
            slack=math.inf if moved or below_floor else loss + rounding(old, mixture, bound, dtype),
            winners=winners,
        )
        yield state


def _change(bounds: tuple[float, ...]) -> float:
    """Return by how much the last two lower bounds differ; infinity before there are two."""
    return abs(bounds[-1] - bounds[-2]) if len(bounds) > 1 else math.inf


def rounding(old: Mixture, new: Mixture, bound: float, dtype: torch.dtype) -> float:
    """Return how wrong the difference of two mean log-likelihoods may be: by the size of the terms that are summed."""
    coarse, fine = 2 * (old.dimension + abs(bound)), 0.0
    for mixture in (old, new):
        terms = mixture.cancelling_terms()
        coarse += float(mixture.weights @ terms.clamp_max(SHARP_FROM))
        fine += float(mixture.weights @ terms.clamp_max(DIRECT_FROM))  # of the components computed in float64
    return 8 * (
        torch.finfo(arithmetic(old.covariance_type, dtype)).eps * coarse + torch.finfo(torch.float64).eps * fine
    )


FORGIVEN = 1e-6
"""A fall of the bound by so many nats per row stops no fit: it is a thousandth of the usual tolerance."""


def _remedy(mixture: Mixture, dtype: torch.dtype, truncation: Truncation | None) -> str:
    choices = ["set gmm.precision to float64"] * (arithmetic(mixture.covariance_type, dtype) != torch.float64)
    choices += ["set gmm.e_step to exact"] * (truncation is not None)
    return " or ".join([*choices, "raise gmm.reg_covar"])


def _check_rise(state: EMState, bound: float, hidden: Callable[[], float] | None, remedy: str) -> None:
    """Refuse a lower bound that fell by more than is explained; ``hidden`` measures what truncation may hide."""
    number = state.n_iter + 1
    if not math.isfinite(bound):
        raise ValueError(
            f"EM iteration {number}: the mean log-likelihood is {bound}; raise gmm.reg_covar, or start otherwise"
        )
    if not state.lower_bounds or bound >= state.lower_bounds[-1] - state.slack - FORGIVEN:
        return
    fall, allowed = state.lower_bounds[-1] - bound, state.slack + FORGIVEN
    if hidden is not None:
        allowed += hidden()
    if fall > allowed:
        raise ValueError(
            f"EM iteration {number}: the mean log-likelihood fell by {fall:.3g} nats to {bound:.6g}, and at most "
            f"{allowed:.3g} are explained; {remedy}, and report this"
        )
