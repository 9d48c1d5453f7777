"""What EM keeps of the data, and the mixture that follows from it."""

from collections.abc import Callable

import torch
from torch import Tensor

from mmfm.infra.distributed import Ranks
from mmfm.mixture.gaussian import Mixture, covariance_shape
from mmfm.mixture.reseeding import EMPTY_BELOW
from mmfm.mixture.streaming import Rows

DROPPED_MASS = 1e-10
"""Posterior mass per image that the M-step may leave out, spread over all components."""

NARROW_FROM = 1e8
"""Squared distance of a mean from the centre, in units of its component's spread, from which its rows' moments are not
taken about the centre: float64 leaves eight digits of a variance that follows from those."""

_PIECE = 1 << 24  # numbers of a float64 intermediate of the sparse M-step
_EMPTY = 10 * torch.finfo(torch.float64).eps  # scikit-learn's addition to every component's count


class SufficientStatistics:
    """Sums of responsibilities, of deviations and of squared deviations from reference means, in float64.

    The references are the components' present means: at convergence the sums of deviations vanish, so the variances are
    not differences of large numbers. Products over all components take the rows about the centre, and what is made of
    them is moved to the references; components that are too narrow for that have the deviations of their rows taken
    from their own means.

    Args:
        narrow: (K,) bool, these components.

    Attributes:
        means: (K, C) the references.
        count: (K,) sum of responsibilities r.
        first: (K, C) sum of r (x - mean).
        second: sum of r (x - mean)^2, (K, C); for ``full`` of r (x - mean)(x - mean)^T, (K, C, C); for ``tied`` of the
            same over all components, (C, C); None where no covariance type is given.
        log_likelihood: () sum of log p(x).
    """

    def __init__(self, means: Tensor, covariance_type: str | None = "diag", narrow: Tensor | None = None) -> None:
        self.means, self.covariance_type = means, covariance_type
        self.centre = means.mean(0)
        self.count = means.new_zeros(len(means))
        self.first = torch.zeros_like(means)
        self.second = None
        if covariance_type is not None:
            shape = covariance_shape("diag" if covariance_type == "spherical" else covariance_type, *means.shape)
            self.second = means.new_zeros(shape)
        self.log_likelihood = means.new_zeros(())
        self._narrow = narrow if narrow is not None and narrow.any() else None

    def add_dense(self, x: Tensor, responsibilities: Tensor) -> None:
        """Add rows x (b, C) with responsibilities (b, K), which may be overwritten."""
        r = responsibilities.double()
        if self._narrow is not None:
            numbers = self._narrow.nonzero().squeeze(1)
            own = r[:, numbers].T
            which, row = own.nonzero().unbind(1)
            self._add_segments(x, numbers[which], row, own[which, row])
            r[:, numbers] = 0
        z = x.double() - self.centre
        if self.covariance_type == "full":
            for k in range(len(self.means)):
                self._add_scatter(k, z - (self.means[k] - self.centre), r[:, k])
        mass = r.sum(1) if self.covariance_type == "tied" else None
        self._add_centred(z, r.sum(0), mass, lambda rows: r.T @ rows, slice(None))

    def add_pairs(self, x: Tensor, component: Tensor, row: Tensor, weight: Tensor) -> None:
        """Add pairs (component, row of x, weight), each (P,), sorted by component; x is (b, C), weight float64.

        On a CPU with MKL this is a product with a sparse matrix. Elsewhere, and for narrow components, each component's
        pairs are summed in their order (a segmented reduction), so that the result is the same in every run, which
        atomic additions on a GPU don't give.
        """
        if x.device.type != "cpu" or not torch.backends.mkl.is_available() or self.covariance_type == "full":
            self._add_segments(x, component, row, weight)
            return
        if self._narrow is not None:
            narrow = self._narrow[component]
            self._add_segments(x, component[narrow], row[narrow], weight[narrow])
            component, row, weight = component[~narrow], row[~narrow], weight[~narrow]
        self._add_sparse(x, component, row, weight)

    def _add_sparse(self, x: Tensor, component: Tensor, row: Tensor, weight: Tensor) -> None:
        found, lengths = torch.unique_consecutive(component, return_counts=True)
        starts = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        r = _sparse_matrix(starts, row, weight, (len(found), len(x)))
        count = weight.new_zeros(len(found)).index_add_(0, _positions(lengths), weight)
        mass = weight.new_zeros(len(x)).index_add_(0, row, weight) if self.covariance_type == "tied" else None
        self._add_centred(x.double().sub_(self.centre), count, mass, lambda rows: r @ rows, found)

    def _add_centred(
        self, z: Tensor, count: Tensor, mass: Tensor | None, sums: Callable[[Tensor], Tensor], found: Tensor | slice
    ) -> None:
        """Add moments of rows z (b, C) about the centre, which are overwritten.

        Args:
            count: (F,) responsibilities by component.
            mass: (b,) responsibilities by row, of which ``tied`` has need.
            sums: from values of the rows (b, C) to their sums by component, weighted by responsibility, (F, C).
            found: the components.
        """
        offset, first = self.means[found] - self.centre, sums(z)
        moved = count[:, None] * offset
        if self.covariance_type == "tied":
            crossed = offset.T @ (first - moved / 2)
            self.second += (z * mass[:, None]).T @ z - crossed - crossed.T
        elif self.covariance_type in ("diag", "spherical"):
            self.second[found] += sums(z.square_()) - offset * (2 * first - moved)
        self.first[found] += first - moved
        self.count[found] += count

    def _add_segments(self, x: Tensor, component: Tensor, row: Tensor, weight: Tensor) -> None:
        step = max(1, _PIECE // x.shape[1])
        for start in range(0, len(component), step):
            piece = slice(start, start + step)
            found, lengths = torch.unique_consecutive(component[piece], return_counts=True)
            deviation = x[row[piece]].double() - self.means[component[piece]]
            weighted = deviation * weight[piece, None]
            self.count[found] += _segment_sums(weight[piece, None], lengths).squeeze(1)
            self.first[found] += _segment_sums(weighted, lengths)
            if self.covariance_type == "full":
                parts = zip(
                    found.tolist(),
                    deviation.split(lengths.tolist()),
                    weight[piece].split(lengths.tolist()),
                    strict=True,
                )
                for k, own, share in parts:
                    self._add_scatter(k, own, share)
            elif self.covariance_type == "tied":
                self.second.addmm_(weighted.T, deviation)
            elif self.covariance_type is not None:
                self.second[found] += _segment_sums(weighted.mul_(deviation), lengths)

    def _add_scatter(self, k: int, deviation: Tensor, weight: Tensor) -> None:
        self.second[k].addmm_((deviation * weight[:, None]).T, deviation)

    def share(self, ranks: Ranks) -> "SufficientStatistics":
        """Sum over the processes and return self: 100 MB at K = 8192 and C = 768."""
        for tensor in (self.count, self.first, self.second, self.log_likelihood):
            if tensor is not None:
                ranks.sum(tensor)
        return self


def hard_moments(rows: Rows, centres: Tensor, winners: Tensor, covariance_type: str) -> SufficientStatistics:
    """Return the moments of all rows (shared), each given wholly to its one of the centres (K, C).

    Args:
        winners: (n,) cluster of this process's rows.
    """
    statistics = SufficientStatistics(centres.double(), covariance_type)
    for chunk, x in rows:
        start = chunk.start - rows.local.start
        component, row = winners[start : start + len(x)].long().sort(stable=True)
        statistics.add_pairs(x, component, row, torch.ones(len(x), dtype=torch.float64, device=x.device))
    return statistics.share(rows.ranks)


def _sparse_matrix(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*beta state")
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


def _positions(lengths: Tensor) -> Tensor:
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)


def _segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)


def add_rows(target: Tensor, index: Tensor, values: Tensor) -> None:
    """Add values (P, ...) to rows ``index`` (P,) of the target, in a fixed order on every device."""
    if target.device.type == "cpu":
        target.index_add_(0, index, values)
        return
    ordered, order = index.sort(stable=True)
    found, lengths = torch.unique_consecutive(ordered, return_counts=True)
    target[found] += _segment_sums(values[order], lengths)


def m_step(statistics: SufficientStatistics, covariance_type: str, reg_covar: float) -> tuple[Mixture, float]:
    """Return the mixture that maximises the expected log-likelihood, with ``reg_covar`` added to every variance.

    As in scikit-learn every component counts 10 machine epsilons more than its responsibilities. A component without
    any keeps its mean, gets that tiny weight and the variance ``reg_covar`` (where that is 0, the average one). A
    spherical variance is the mean of the diagonal.

    Returns:
        The mixture, and how much expected log-likelihood (nats per row) the addition of ``reg_covar`` costs at most
        against the best mixture whose variances are at least that: EM's bound may fall by no more than this.

    Raises:
        ValueError: a variance of 0 that nothing is added to.
    """
    count = statistics.count + _EMPTY
    shift = statistics.first / count[:, None]
    means, weights = statistics.means + shift, count / count.sum()
    if covariance_type in ("diag", "spherical"):
        spread = (statistics.second / count[:, None] - shift.square()).clamp_min_(0)
        if covariance_type == "spherical":
            spread = spread.mean(1)
        _fill_empty(spread, weights, statistics.count, reg_covar)
        if not reg_covar and not spread.all():
            at = (spread == 0).nonzero()[0].tolist()
            along = f" along dimension {at[1]}" if len(at) > 1 else ""
            raise ValueError(
                f"component {at[0]} of the mixture has no spread{along}: its tokens are equal or constant there; "
                "set gmm.reg_covar above 0"
            )
        covariances, eigenvalues = spread + reg_covar, spread
    else:
        if covariance_type == "tied":
            covariances = (statistics.second - (shift * count[:, None]).T @ shift) / count.sum()
        else:
            covariances = statistics.second / count[:, None, None] - shift[:, :, None] * shift[:, None, :]
            _fill_empty(covariances, weights, statistics.count, reg_covar)
        covariances, eigenvalues = positive((covariances + covariances.mT) / 2)
        covariances.diagonal(dim1=-2, dim2=-1).add_(reg_covar)
    loss = _regularisation_loss(eigenvalues, reg_covar) * (means.shape[1] if eigenvalues.shape == count.shape else 1)
    loss = loss.reshape(1 if covariance_type == "tied" else len(count), -1).sum(1)
    return Mixture(weights, means, covariances, covariance_type), float((weights * loss).sum())


def _fill_empty(spread: Tensor, weights: Tensor, count: Tensor, reg_covar: float) -> None:
    """Give components without rows the average spread where nothing is added to theirs, which is 0."""
    if not reg_covar:
        spread[count < EMPTY_BELOW] = torch.tensordot(weights, spread, 1)


def positive(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Return covariances (..., C, C) and their eigenvalues (..., C), without the negative ones that rounding made."""
    eigenvalues = torch.linalg.eigvalsh(covariances)
    if (eigenvalues < 0).any():
        eigenvalues, axes = torch.linalg.eigh(covariances)
        eigenvalues = eigenvalues.clamp_min_(0)
        covariances = (axes * eigenvalues[..., None, :]) @ axes.mT
    return covariances, eigenvalues


def _regularisation_loss(spread: Tensor, reg_covar: float) -> Tensor:
    """Return the nats lost along an axis by the variance s + reg instead of max(s, reg), which is the best allowed."""
    if not reg_covar:
        return torch.zeros_like(spread)
    best, taken = spread.clamp_min(reg_covar), spread + reg_covar
    return 0.5 * ((taken / best).log() + spread / taken - spread / best)
