"""What EM keeps of the data, and the mixture that follows from it."""

import torch
from torch import Tensor

from mmfm.infra.distributed import Ranks
from mmfm.mixture.gaussian import Mixture, covariance_shape
from mmfm.mixture.streaming import Rows

DROPPED_MASS = 1e-10
"""Posterior mass per image that the M-step may leave out, spread over all components."""

_PIECE = 1 << 24  # numbers of a float64 intermediate of the sparse M-step
_EMPTY = 10 * torch.finfo(torch.float64).eps  # scikit-learn's addition to every component's count


class SufficientStatistics:
    """Sums of responsibilities, of deviations and of squared deviations from reference means, in float64.

    The references are the components' present means: at convergence the sums of deviations vanish, so the variances are
    not differences of large numbers.

    Attributes:
        means: (K, C) the references.
        count: (K,) sum of responsibilities r.
        first: (K, C) sum of r (x - mean).
        second: sum of r (x - mean)^2, (K, C); for ``full`` of r (x - mean)(x - mean)^T, (K, C, C); for ``tied`` of
            (x - centre)(x - centre)^T over all rows, (C, C), where the centre is the mean of the references.
        log_likelihood: () sum of log p(x).
    """

    def __init__(self, means: Tensor, covariance_type: str = "diag") -> None:
        self.means, self.covariance_type = means, covariance_type
        self.centre = means.mean(0)
        self.count = means.new_zeros(len(means))
        self.first = torch.zeros_like(means)
        shape = covariance_shape("diag" if covariance_type == "spherical" else covariance_type, *means.shape)
        self.second = means.new_zeros(shape)
        self.log_likelihood = means.new_zeros(())

    def add_dense(self, x: Tensor, responsibilities: Tensor) -> None:
        """Add rows x (b, C) with responsibilities (b, K)."""
        r, z = responsibilities.double(), x.double() - self.centre
        if self.covariance_type == "full":
            for k in range(len(self.means)):
                self._add_scatter(k, z - (self.means[k] - self.centre), r[:, k])
        self._add_centred(r.sum(0), r.T @ z, lambda: r.T @ z.square(), slice(None))
        if self.covariance_type == "tied":
            self.second += z.T @ z

    def add_pairs(self, x: Tensor, component: Tensor, row: Tensor, weight: Tensor) -> None:
        """Add pairs (component, row of x, weight), each (P,), sorted by component; x is (b, C), weight float64.

        On a CPU with MKL this is a product with a sparse matrix. Elsewhere each component's pairs are summed in their
        order (a segmented reduction), so that the result is the same in every run, which atomic additions on a GPU
        don't give.
        """
        if self.covariance_type == "tied":
            z = x.double() - self.centre
            self.second += z.T @ z
        if x.device.type == "cpu" and torch.backends.mkl.is_available() and self.covariance_type != "full":
            self._add_sparse(x, component, row, weight)
        else:
            self._add_segments(x, component, row, weight)

    def _add_sparse(self, x: Tensor, component: Tensor, row: Tensor, weight: Tensor) -> None:
        found, lengths = torch.unique_consecutive(component, return_counts=True)
        starts = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        r = _sparse_matrix(starts, row, weight, (len(found), len(x)))
        z = x.double().sub_(self.centre)
        count = weight.new_zeros(len(found)).index_add_(0, _positions(lengths), weight)
        self._add_centred(count, r @ z, lambda: r @ z.square_(), found)

    def _add_centred(self, count: Tensor, first: Tensor, second, found: Tensor | slice) -> None:
        """Add moments of components about the centre; ``second`` makes the squares' if they are wanted."""
        offset = self.means[found] - self.centre
        if self.covariance_type in ("diag", "spherical"):
            self.second[found] += second() - offset * (2 * first - count[:, None] * offset)
        self.first[found] += first - count[:, None] * offset
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
            elif self.covariance_type != "tied":
                self.second[found] += _segment_sums(weighted.mul_(deviation), lengths)

    def _add_scatter(self, k: int, deviation: Tensor, weight: Tensor) -> None:
        self.second[k].addmm_((deviation * weight[:, None]).T, deviation)

    def share(self, ranks: Ranks) -> "SufficientStatistics":
        """Sum over the processes and return self: 100 MB at K = 8192 and C = 768."""
        for tensor in (self.count, self.first, self.second, self.log_likelihood):
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
    any keeps its mean, gets the variance ``reg_covar`` and that tiny weight. A spherical variance is the mean of the
    diagonal.

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
            offset = means - statistics.centre
            covariances = (statistics.second - (offset * count[:, None]).T @ offset) / count.sum()
        else:
            covariances = statistics.second / count[:, None, None] - shift[:, :, None] * shift[:, None, :]
        covariances = (covariances + covariances.mT) / 2
        eigenvalues = torch.linalg.eigvalsh(covariances).clamp_min_(0)
        covariances.diagonal(dim1=-2, dim2=-1).add_(reg_covar)
    loss = _regularisation_loss(eigenvalues, reg_covar) * (means.shape[1] if eigenvalues.shape == count.shape else 1)
    loss = loss.reshape(1 if covariance_type == "tied" else len(count), -1).sum(1)
    return Mixture(weights, means, covariances, covariance_type), float((weights * loss).sum())


def _regularisation_loss(spread: Tensor, reg_covar: float) -> Tensor:
    """Return the nats lost along an axis by the variance s + reg instead of max(s, reg), which is the best allowed."""
    if not reg_covar:
        return torch.zeros_like(spread)
    best, taken = spread.clamp_min(reg_covar), spread + reg_covar
    return 0.5 * ((taken / best).log() + spread / taken - spread / best)
