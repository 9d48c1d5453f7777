"""The sufficient statistics of EM, and the M-step."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from mmfm.infra.distributed import Ranks
from mmfm.mixture.gaussian import Mixture, covariance_shape
from mmfm.mixture.reseeding import EMPTY_BELOW
from mmfm.mixture.streaming import Rows

DROPPED_MASS = 1e-10
"""Posterior mass per row, summed over all components, that the M-step may neglect."""

NARROW_FROM = 1e8
"""Squared Mahalanobis distance of a mean from the centre above which its component is narrow: its moments are then not
taken about the centre, where float64 would leave a variance only eight digits."""

_PIECE = 1 << 24  # elements of a float64 intermediate in a segmented sum
_COUNT_EPSILON = 10 * torch.finfo(torch.float64).eps  # added to every count, as in scikit-learn


class SufficientStatistics:
    """Sums of responsibilities and of first and second moments about reference points, all float64.

    The reference points are the current means of the components. At convergence the first moments vanish, so that
    variances are not differences of large numbers. Matrix products over all components use rows relative to the centre
    of the means; the resulting moments are then shifted to the reference points. For components too narrow for that,
    deviations are taken from the component's own mean.

    Args:
        means: (K, C), the reference points.
        covariance_type: determines the second moments; None if there are none (k-means).
        narrow: (K,) bool, the narrow components.

    Attributes:
        centre: (C,), the mean of the reference points.
        count: (K,), sum of responsibilities r.
        first: (K, C), sum of r (x - mean).
        second: sum of r (x - mean)^2, (K, C), for ``diag`` and ``spherical``; sum of r (x - mean)(x - mean)^T, (K, C,
            C) for ``full`` and (C, C) over all components for ``tied``; empty without a covariance type.
        log_likelihood: (), sum of log p(x).
    """

    def __init__(self, means: Tensor, covariance_type: str | None = "diag", narrow: Tensor | None = None) -> None:
        self.means, self.covariance_type = means, covariance_type
        self.centre = means.mean(0)
        self.count = means.new_zeros(len(means))
        self.first = torch.zeros_like(means)
        shape: tuple[int, ...] = (0,)
        if covariance_type is not None:
            k, c = means.shape
            shape = covariance_shape("diag" if covariance_type == "spherical" else covariance_type, k, c)
        self.second = means.new_zeros(shape)
        self.log_likelihood = means.new_zeros(())
        self._narrow = narrow if narrow is not None and narrow.any() else None

    def add_dense(self, x: Tensor, responsibilities: Tensor) -> None:
        """Add rows x (b, C) with a matrix of responsibilities (b, K), which may be overwritten."""
        r = responsibilities.double()
        if self._narrow is not None:
            narrow = self._narrow.nonzero().squeeze(1)
            weights = r[:, narrow].T
            which, row = weights.nonzero().unbind(1)
            self._add_segments(x, narrow[which], row, weights[which, row])
            r[:, narrow] = 0
        z = x.double() - self.centre
        if self.covariance_type == "full":
            for k in range(len(self.means)):
                self._add_scatter(k, z - (self.means[k] - self.centre), r[:, k])
        mass = r.sum(1) if self.covariance_type == "tied" else None
        self._add_centred(z, r.sum(0), mass, lambda rows: r.T @ rows, slice(None))

    def add_pairs(self, x: Tensor, component: Tensor, row: Tensor, weight: Tensor) -> None:
        """Add rows with sparse responsibilities.

        On a CPU with MKL this is a product with a sparse matrix. Otherwise, and for narrow components, it is a
        segmented sum, which (unlike atomic additions on a GPU) gives the same result in every run.

        Args:
            x: (b, C).
            component: (P,) int64, ascending.
            row: (P,) int64, rows of ``x``.
            weight: (P,) float64, responsibility of each component for each row.
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
        count = weight.new_zeros(len(found)).index_add_(0, _segment_ids(lengths), weight)
        mass = weight.new_zeros(len(x)).index_add_(0, row, weight) if self.covariance_type == "tied" else None
        self._add_centred(x.double().sub_(self.centre), count, mass, lambda rows: r @ rows, found)

    def _add_centred(
        self, z: Tensor, count: Tensor, mass: Tensor | None, sums: Callable[[Tensor], Tensor], found: Tensor | slice
    ) -> None:
        """Add moments about the centre, shifted to the reference points.

        Args:
            z: (b, C), rows relative to the centre; overwritten.
            count: (F,), sums of responsibilities over rows.
            mass: (b,), sums of responsibilities over components; required for ``tied``, otherwise None.
            sums: function from values of the rows (b, C) to their responsibility-weighted sums (F, C).
            found: the F components.
        """
        offset, first = self.means[found] - self.centre, sums(z)
        shift = count[:, None] * offset
        if mass is not None:
            cross = offset.T @ (first - shift / 2)
            self.second += (z * mass[:, None]).T @ z - cross - cross.T
        elif self.covariance_type in ("diag", "spherical"):
            self.second[found] += sums(z.square_()) - offset * (2 * first - shift)
        self.first[found] += first - shift
        self.count[found] += count

    def _add_segments(self, x: Tensor, component: Tensor, row: Tensor, weight: Tensor) -> None:
        """Add pairs by segmented sums of deviations from the components' own means; see :meth:`add_pairs`."""
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
                for k, deviations, weights in parts:
                    self._add_scatter(k, deviations, weights)
            elif self.covariance_type == "tied":
                self.second.addmm_(weighted.T, deviation)
            elif self.covariance_type is not None:
                self.second[found] += _segment_sums(weighted.mul_(deviation), lengths)

    def _add_scatter(self, k: int, deviation: Tensor, weight: Tensor) -> None:
        self.second[k].addmm_((deviation * weight[:, None]).T, deviation)

    def share(self, ranks: Ranks) -> "SufficientStatistics":
        """Sum over all processes and return self. A collective call; 100 MB at K = 8192 and C = 768."""
        for tensor in (self.count, self.first, self.second, self.log_likelihood):
            if tensor.numel():
                ranks.sum(tensor)
        return self


def hard_moments(rows: Rows, centres: Tensor, winners: Tensor, covariance_type: str) -> SufficientStatistics:
    """Return the statistics of all rows under a hard assignment to clusters. A collective call.

    Args:
        centres: (K, C), reference points near the means of the clusters.
        winners: (n,), cluster of each of this process's rows.
    """
    statistics = SufficientStatistics(centres.double(), covariance_type)
    for chunk, x in rows:
        component, row = winners[rows.position(chunk)].long().sort(stable=True)
        statistics.add_pairs(x, component, row, torch.ones(len(x), dtype=torch.float64, device=x.device))
    return statistics.share(rows.ranks)


def _sparse_matrix(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*beta state")
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


def _segment_ids(lengths: Tensor) -> Tensor:
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)


def _segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)


def row_adder(index: Tensor) -> Callable[[Tensor, Tensor], None]:
    """Return a function of a target and values (P, ...) that adds these to the target's rows ``index`` (P,) in place.

    They are added in a fixed order on every device.
    """
    if index.device.type == "cpu":
        return lambda target, values: target.index_add_(0, index, values)  # type: ignore[return-value]
    ordered, order = index.sort(stable=True)
    found, lengths = torch.unique_consecutive(ordered, return_counts=True)

    def add(target: Tensor, values: Tensor) -> None:
        target[found] += _segment_sums(values[order], lengths)

    return add


def m_step(
    statistics: SufficientStatistics,
    covariance_type: str,
    reg_covar: float,
    shrinkage: float = 0.0,
    before: Tensor | None = None,
) -> tuple[Mixture, float]:
    """Maximise the expected log-likelihood, then add ``reg_covar`` to every variance.

    As in scikit-learn, 10 machine epsilons are added to the count of every component, and spherical variances are the
    means of diagonal ones. An empty component keeps its mean and has a negligible weight and the variance
    ``reg_covar`` (or the average variance if that is 0); with shrinkage, the pooled variance.

    With ``shrinkage`` m above 0, the variances of a component of n rows are (n v_k + m v) / (n + m) instead of v_k,
    where v is the pooled variance within the components, the diagonal of the tied covariance. They maximise the
    expected log-likelihood plus the logarithm of a conjugate (inverse-gamma) prior with its mode at v, worth m rows, as
    in Fraley and Raftery 2007, "Bayesian regularization for normal mixture estimation and model-based clustering".

    Args:
        shrinkage: m, in rows; requires ``diag``.
        before: (K, C), variances before this step, to bound the loss by shrinkage; None if the loss is of no interest.

    Returns:
        The mixture, and the most by which the lower bound of EM can fall (nats per row): what adding ``reg_covar`` can
        cost relative to the best mixture with variances of at least ``reg_covar``, and what the prior gained.

    Raises:
        ValueError: a variance is 0 and so is ``reg_covar``, or shrinkage is asked for with another covariance type.
    """
    if shrinkage and covariance_type != "diag":
        raise ValueError(
            f"shrinkage of variances needs diag covariances, not {covariance_type}; set gmm.shrinkage to 0"
        )
    count = statistics.count + _COUNT_EPSILON
    shift = statistics.first / count[:, None]
    means, weights = statistics.means + shift, count / count.sum()
    rows, loss_of_prior = count, torch.zeros_like(count[0])
    if covariance_type in ("diag", "spherical"):
        spread = (statistics.second / count[:, None] - shift.square()).clamp_min_(0)
        if covariance_type == "spherical":
            spread = spread.mean(1)
        _fill_empty(spread, weights, statistics.count, reg_covar)
        if shrinkage:
            pool, rows = weights @ spread, count + shrinkage
            spread = (count[:, None] * spread + shrinkage * pool) / rows[:, None]
        if not reg_covar and not spread.all():
            at = (spread == 0).nonzero()[0].tolist()
            along = f" along dimension {at[1]}" if len(at) > 1 else ""
            raise ValueError(
                f"component {at[0]} of the mixture has no spread{along}: all its tokens are equal there; "
                "set gmm.reg_covar above 0"
            )
        covariances, eigenvalues = spread + reg_covar, spread
        if shrinkage and before is not None:
            gained = _log_prior(covariances, pool) - _log_prior(before, pool)
            loss_of_prior = shrinkage / count.sum() * gained.clamp_min(0)
    else:
        if covariance_type == "tied":
            covariances = (statistics.second - (shift * count[:, None]).T @ shift) / count.sum()
        else:
            covariances = statistics.second / count[:, None, None] - shift[:, :, None] * shift[:, None, :]
            _fill_empty(covariances, weights, statistics.count, reg_covar)
        covariances, eigenvalues = clip_eigenvalues((covariances + covariances.mT) / 2)
        covariances.diagonal(dim1=-2, dim2=-1).add_(reg_covar)
    loss = _regularisation_loss(eigenvalues, reg_covar) * (means.shape[1] if eigenvalues.shape == count.shape else 1)
    loss = loss.reshape(1 if covariance_type == "tied" else len(count), -1).sum(1)
    total = (rows / count.sum() * loss).sum() + loss_of_prior
    return Mixture(weights, means, covariances, covariance_type), float(total)


def _log_prior(variances: Tensor, pool: Tensor) -> Tensor:
    """Return the logarithm of the prior worth one row of all variances (K, C), up to a constant."""
    return -0.5 * (variances.log() + pool / variances).sum()


def _fill_empty(spread: Tensor, weights: Tensor, count: Tensor, reg_covar: float) -> None:
    """If ``reg_covar`` is 0, give empty components the weighted average of all variances, in place."""
    if not reg_covar:
        spread[count < EMPTY_BELOW] = torch.tensordot(weights, spread, 1)


def clip_eigenvalues(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Return symmetric matrices (..., C, C) and their eigenvalues (..., C), with negative eigenvalues set to 0."""
    eigenvalues = torch.linalg.eigvalsh(covariances)
    if (eigenvalues < 0).any():
        eigenvalues, axes = torch.linalg.eigh(covariances)
        eigenvalues = eigenvalues.clamp_min_(0)
        covariances = (axes * eigenvalues[..., None, :]) @ axes.mT
    return covariances, eigenvalues


def _regularisation_loss(spread: Tensor, reg_covar: float) -> Tensor:
    """Return the nats lost along each axis by the variance s + reg instead of the best one allowed, max(s, reg)."""
    if not reg_covar:
        return torch.zeros_like(spread)
    best, used = spread.clamp_min(reg_covar), spread + reg_covar
    return 0.5 * ((used / best).log() + spread / used - spread / best)
