"""Streaming expectation-maximisation for Gaussian mixtures (Dempster, Laird and Rubin 1977; Bishop 2006, section 9.2).

The rows are cut into chunks by their global index. Only a chunk's (rows, K) responsibilities exist at a time; what is
kept are the sufficient statistics, (2 C + 1) K numbers in float64. Processes own ranges of whole chunks and share these
statistics alone, so the result is the same to rounding for any number of them.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mmfm import data
from mmfm.infra.distributed import Ranks
from mmfm.mixture.gaussian import Mixture

DROPPED_MASS = 1e-10
"""Posterior mass per image that the M-step may leave out, spread over all components."""

_DENSE_SHARE = 1 / 16  # of the responsibilities that matter, above which two dense products are cheaper
_PIECE = 1 << 24  # numbers of a float64 intermediate of the sparse M-step
_EMPTY = 10 * np.finfo(np.float64).eps  # scikit-learn's addition to every component's count


def finite_rows(read: Callable[[int, int], np.ndarray], wanted: range) -> np.ndarray:
    """Read rows as float32 (b, C).

    Raises:
        ValueError: a value that is not finite; the message names the row.
    """
    values = np.asarray(read(wanted.start, wanted.stop), np.float32)
    finite = np.isfinite(values).all(1)
    if not finite.all():
        row = wanted.start + int(np.argmin(finite))
        raise ValueError(
            f"row {row} of the tokens (image {row} of the listing) is not finite; look at that image and "
            "at the encoder, then run extract again"
        )
    return values


class Rows:
    """This process's chunks of N rows, float32, kept on its device as far as there is room.

    At N = 1.28 million and C = 768 all rows are 3.9 GB; over 8 processes 0.5 GB each.

    Args:
        read: (start, stop) -> float32 (stop - start, C).
        n: number of rows N.
        chunk_size: rows of a chunk; chunks are fixed by the global index, whatever the number of processes.
        cache_gb: most that is kept, 10^9 bytes, and never more than a quarter of the free memory.
    """

    def __init__(
        self, read: Callable[[int, int], np.ndarray], n: int, chunk_size: int, ranks: Ranks, cache_gb: float = math.inf
    ) -> None:
        self.n, self.ranks = n, ranks
        self._read = read
        chunks = data.ranges(0, n, chunk_size)
        self.ranges = chunks[ranks.rank * len(chunks) // ranks.world : (ranks.rank + 1) * len(chunks) // ranks.world]
        self._kept: dict[int, Tensor] = {}
        self._room = min(_free_memory(ranks) // 4, cache_gb * 1e9)

    def __iter__(self) -> Iterator[tuple[range, Tensor]]:
        """Yield each chunk's range of global indices and its rows (b, C) float32 on the device."""
        for chunk in self.ranges:
            if chunk.start in self._kept:
                yield chunk, self._kept[chunk.start]
                continue
            values = finite_rows(self._read, chunk)
            rows = torch.tensor(values, device=self.ranks.device)
            if values.nbytes <= self._room:
                self._room -= values.nbytes
                self._kept[chunk.start] = rows
            yield chunk, rows


def _free_memory(ranks: Ranks) -> int:
    if ranks.device.type == "cuda":
        return torch.cuda.mem_get_info(ranks.device)[0]
    available = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS lacks the first
    return os.sysconf(available) * os.sysconf("SC_PAGE_SIZE") // ranks.world


class SufficientStatistics:
    """Sums of responsibilities, of deviations and of squared deviations from reference means, in float64.

    The references are the components' present means: at convergence the sums of deviations vanish, so the variances are
    not differences of large numbers.

    Attributes:
        means: (K, C) the references.
        count: (K,) sum of responsibilities r.
        first: (K, C) sum of r (x - mean).
        second: (K, C) sum of r (x - mean)^2.
        log_likelihood: () sum of log p(x).
    """

    def __init__(self, means: Tensor) -> None:
        self.means = means
        self.centre = means.mean(0)
        self.count = means.new_zeros(len(means))
        self.first = torch.zeros_like(means)
        self.second = torch.zeros_like(means)
        self.log_likelihood = means.new_zeros(())

    def add(self, x: Tensor, responsibilities: Tensor) -> None:
        """Add rows x (b, C) with responsibilities (b, K); those below DROPPED_MASS / K may be left out."""
        keep = responsibilities > DROPPED_MASS / len(self.means)
        if int(keep.count_nonzero()) > _DENSE_SHARE * keep.numel():
            self._add_dense(x.double(), responsibilities.double())
        else:
            row, component = keep.nonzero().unbind(1)
            component, order = component.sort(stable=True)
            row = row[order]
            self.add_pairs(x, component, row, responsibilities[row, component].double())

    def _add_dense(self, x: Tensor, r: Tensor) -> None:
        z = x - self.centre
        count, first = r.sum(0), r.T @ z
        offset = self.means - self.centre
        self.second += r.T @ z.square_() - offset * (2 * first - count[:, None] * offset)
        self.first += first - count[:, None] * offset
        self.count += count

    def add_pairs(self, x: Tensor, component: Tensor, row: Tensor, weight: Tensor) -> None:
        """Add pairs (component, row of x, weight), each (P,), sorted by component; x is (b, C), weight float64.

        Each component's pairs are summed in their order (a segmented reduction), so that the result is the same in
        every run, which atomic additions on a GPU don't give.
        """
        step = max(1, _PIECE // x.shape[1])
        for start in range(0, len(component), step):
            piece = slice(start, start + step)
            found, lengths = torch.unique_consecutive(component[piece], return_counts=True)
            deviation = x[row[piece]].double() - self.means[component[piece]]
            weighted = deviation * weight[piece, None]
            self.count[found] += _segment_sums(weight[piece, None], lengths).squeeze(1)
            self.first[found] += _segment_sums(weighted, lengths)
            self.second[found] += _segment_sums(weighted.mul_(deviation), lengths)

    def share(self, ranks: Ranks) -> "SufficientStatistics":
        """Sum over the processes and return self: 100 MB at K = 8192 and C = 768."""
        for tensor in (self.count, self.first, self.second, self.log_likelihood):
            ranks.sum(tensor)
        return self


def _segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)


def m_step(statistics: SufficientStatistics, covariance_type: str, reg_covar: float) -> Mixture:
    """Return the mixture that maximises the expected log-likelihood, with ``reg_covar`` added to every variance.

    As in scikit-learn every component counts 10 machine epsilons more than its responsibilities. A component without
    any keeps its mean, gets the variance ``reg_covar`` and that tiny weight, and so stays empty. A spherical variance
    is the mean of the diagonal.
    """
    count = statistics.count + _EMPTY
    shift = statistics.first / count[:, None]
    variances = (statistics.second / count[:, None] - shift.square()).clamp_min_(0) + reg_covar
    if covariance_type == "spherical":
        variances = variances.mean(1)
    return Mixture(count / count.sum(), statistics.means + shift, variances, covariance_type)


def e_step(rows: Rows, mixture: Mixture, dtype: torch.dtype) -> SufficientStatistics:
    """Return the sufficient statistics of all rows under the mixture's posteriors, summed over the processes.

    Args:
        dtype: arithmetic of the two products of the densities; sums are float64 always.
    """
    statistics = SufficientStatistics(mixture.means)
    for _, x in rows:
        joint = mixture.log_joint(x, dtype)
        log_prob = joint.logsumexp(1)
        statistics.log_likelihood += log_prob.double().sum()
        statistics.add(x, joint.sub_(log_prob[:, None]).exp_())
    return statistics.share(rows.ranks)


@dataclass(frozen=True)
class EMState:
    """Where EM is after some iterations.

    Attributes:
        mixture: the parameters after the last M-step; the start where there was none.
        lower_bounds: mean log-likelihood (nats per row) in each iteration's E-step, before its M-step.
        converged: whether the last two differ by less than the tolerance.
    """

    mixture: Mixture
    lower_bounds: tuple[float, ...] = ()
    converged: bool = False

    @property
    def n_iter(self) -> int:
        """Iterations done."""
        return len(self.lower_bounds)


def em_iterations(
    rows: Rows, state: EMState, *, max_iter: int, tol: float, reg_covar: float, dtype: torch.dtype
) -> Iterator[EMState]:
    """Run EM from a state, yielding the next one after every iteration, until convergence or ``max_iter`` in all.

    Converges as scikit-learn's GaussianMixture does: when the lower bound changes by less than ``tol``. With float32
    products, an iteration whose variances are mostly the regularisation (a start from single points) is done in
    float64: at variances of 1e-6, float32 log-densities are wrong by hundreds.
    """
    while not state.converged and state.n_iter < max_iter:
        barely_spread = bool(state.mixture.variances.median() <= 10 * reg_covar)
        statistics = e_step(rows, state.mixture, torch.float64 if barely_spread else dtype)
        mixture = m_step(statistics, state.mixture.covariance_type, reg_covar)
        bound = float(statistics.log_likelihood) / rows.n
        converged = bool(state.lower_bounds) and abs(bound - state.lower_bounds[-1]) < tol
        state = replace(state, mixture=mixture, lower_bounds=(*state.lower_bounds, bound), converged=converged)
        yield state
