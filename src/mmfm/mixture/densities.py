"""Log-densities of all components of a Gaussian mixture at once.

They are one matrix product of features of the data with a table of the components. Let c be the overall mean of the
mixture, z = x - c and m_k = mean_k - c. For diagonal variances v_k,

    log w_k N(x; mean_k, v_k) = constant_k + [z, z^2] . [m_k / v_k, -1 / (2 v_k)],
    constant_k = log w_k - (C log 2 pi + sum log v_k + sum m_k^2 / v_k) / 2.

Spherical variances need only the sum of z^2. A tied covariance needs one product with its whitening matrix first, full
covariances one product per component. No array is larger than (B, K) or (B, 2 C).

Precision. Centring keeps the terms small enough for float32 (but not for TF32 or bfloat16) if covariances are diagonal
or spherical. Tied and full covariances can be ill-conditioned, which whitening turns into rounding errors, so they are
always computed in float64. The terms of a narrow component far from the centre cancel even after centring: components
for which float32 is too coarse are computed in float64, and those for which float64 is too coarse, one by one from
deviations from their own means.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from mmfm.infra.precision import exact_float32
from mmfm.mixture.workspace import Workspace

FLOAT64_FROM = 2e4
"""Squared Mahalanobis distance of a component's mean from the centre above which it is computed in float64.

At C = 768 this is a mean that is 5 standard deviations from the centre along every axis.
"""

DIRECT_FROM = 1e12
"""The same above which densities are computed from deviations from the component's own mean: at this distance
cancellation costs a thousandth of a nat in float64."""


def arithmetic(covariance_type: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that densities are computed in if ``dtype`` is requested: float64 for ``tied`` and ``full``."""
    return dtype if covariance_type in ("diag", "spherical") else torch.float64


class Parameters(Protocol):
    """The part of :class:`mmfm.mixture.gaussian.Mixture` that densities are computed from."""

    weights: Tensor
    means: Tensor
    variances: Tensor
    covariance_type: str

    def centre(self, dtype: torch.dtype) -> Tensor:
        """The overall mean (C,), rounded to ``dtype``."""

    def whitening(self) -> Tensor:
        """Matrices that whiten the components (``tied``, ``full``)."""

    def log_determinants(self) -> Tensor:
        """Logarithms of the determinants of the covariances, (K,)."""

    def squared_mahalanobis(self) -> Tensor:
        """Squared Mahalanobis distances of the means from the centre, (K,)."""


class Densities:
    """Precomputed terms of the log-densities of a mixture.

    With F the number of features of a row, 2 C for ``diag`` and C + 1 otherwise:

    Args:
        dtype: requested dtype, see :func:`arithmetic`.

    Attributes:
        centre: (C,).
        constant: (K,).
        table: (F, K).
        in_float64: (S,) int64, components that need float64; empty if ``dtype`` is float64.
        direct: components computed from deviations from their own means; all of them for ``full``.
    """

    def __init__(self, mixture: Parameters, dtype: torch.dtype) -> None:
        self.dtype = arithmetic(mixture.covariance_type, dtype)
        # Don't keep the mixture: it keeps this object, and the cycle would delay freeing both.
        self._means, self._variances = mixture.means, mixture.variances
        k, c = mixture.means.shape
        self._diag = mixture.covariance_type == "diag"
        self._whitening = mixture.whitening() if mixture.covariance_type in ("tied", "full") else None
        m = mixture.means - mixture.centre(self.dtype)
        if self._whitening is None:
            v = mixture.variances.reshape(k, -1)
            linear, quadratic = m / v, v.reciprocal()
        else:
            linear = m = (m[:, None] @ self._whitening).squeeze(1)
            quadratic = torch.ones_like(m[:, :1])
        self._at_mean = mixture.weights.log() - 0.5 * (c * math.log(2 * math.pi) + mixture.log_determinants())
        constant = self._at_mean - 0.5 * (m * linear).sum(1)
        table = torch.cat((linear, -0.5 * quadratic), 1).T.contiguous()
        distances = mixture.squared_mahalanobis()
        full = mixture.covariance_type == "full"
        self.direct = [k for k, distance in enumerate(distances.tolist()) if full or distance > DIRECT_FROM]
        limit = FLOAT64_FROM if self.dtype == torch.float32 else math.inf
        self.in_float64 = (distances > limit).nonzero().squeeze(1)
        self._float64_terms = (constant[self.in_float64], table[:, self.in_float64].contiguous())
        self.centre, self.constant, self.table = (
            values.to(self.dtype) for values in (mixture.centre(self.dtype), constant, table)
        )

    def log_joint(self, x: Tensor, workspace: Workspace) -> Tensor:
        """Return log w_k N(x; mean_k, variance_k) for x (B, C), as (B, K) in ``workspace`` until the next call."""
        device = self.constant.device
        x, k = x.to(device), len(self.constant)
        result = workspace.empty("joint", self.dtype, len(x), k)
        with exact_float32(device.type):
            if len(self.direct) < k:
                features = self._features(x, self.centre, workspace)
                torch.addmm(self.constant, features, self.table, out=result)
            if len(self.in_float64) > len(self.direct):
                features = self._features(x, self.centre.double(), workspace)
                constant, table = self._float64_terms
                result[:, self.in_float64] = torch.addmm(constant, features, table).to(self.dtype)
        x = x.double() if self.direct else x
        for number in self.direct:
            result[:, number] = self._at_mean[number] - 0.5 * self._squared_mahalanobis(x, number)
        return result

    def _features(self, x: Tensor, centre: Tensor, workspace: Workspace) -> Tensor:
        """Return features of z = x - centre: [z, z^2] (B, 2 C) for ``diag``, otherwise [z, |z|^2] (B, C + 1)."""
        c = len(centre)
        features = workspace.empty("features", centre.dtype, len(x), 2 * c if self._diag else c + 1)
        z = torch.sub(x, centre, out=features[:, :c])
        if self._whitening is not None:
            z.copy_(z @ self._whitening)
        if self._diag:
            torch.mul(z, z, out=features[:, c:])
        else:
            torch.sum(z.square(), 1, keepdim=True, out=features[:, c:])
        return features

    def _squared_mahalanobis(self, x: Tensor, number: int) -> Tensor:
        """Return the squared Mahalanobis distances (B,) of x (B, C) float64 from one component."""
        deviation = x - self._means[number]
        if self._whitening is None:
            return deviation.square_().div_(self._variances[number]).sum(1)
        whitening = self._whitening if self._whitening.ndim == 2 else self._whitening[number]
        return (deviation @ whitening).square_().sum(1)
