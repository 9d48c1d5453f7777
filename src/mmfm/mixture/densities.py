"""Log-densities of all components of a Gaussian mixture at once.

The log-density of all components is one matrix product of features of the data with a table of the components. With x
and the means taken relative to the mixture's overall mean c, and z = x - c, m = mean - c, for diagonal variances v:

    log w_k N(x; mean_k, v_k) = constant_k + [z, z^2] . [m_k / v_k, -1 / (2 v_k)],
    constant_k = log w_k - (C log 2 pi + sum log v_k + sum m_k^2 / v_k) / 2

Spherical variances need only the sum of z^2, a tied covariance one product with its whitening matrix first, and full
ones a product for each component. Nothing larger than (B, K) or (B, 2 C) is made. Centring keeps the terms small, so
that float32 is enough for variances; TF32 and bfloat16 are not. Covariances (tied, full) can be ill-conditioned, and
whitening multiplies every rounding by that: they are computed in float64.

Even centred, the terms of a narrow component far off cancel: components that float32 is not enough for (``sharp``) are
computed in float64, and those that float64 is not enough for (``direct``) from deviations from their own means, one
after the other.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from mmfm.infra.precision import exact_float32
from mmfm.mixture.workspace import Workspace

SHARP_FROM = 2e4
"""Sum of m^2 / v from which float32 terms cancel too much; such components are computed in float64.

At D = 768 this is a component whose mean is 5 standard deviations off the centre along every axis.
"""

DIRECT_FROM = 1e12
"""The same from which float64 terms cancel too much, by a thousandth of a nat; then deviations are taken from the mean
itself."""


def arithmetic(covariance_type: str, dtype: torch.dtype) -> torch.dtype:
    """Return in what densities are computed where ``dtype`` is asked for: float64 with covariances."""
    return dtype if covariance_type in ("diag", "spherical") else torch.float64


class Parameters(Protocol):
    """What densities need of a mixture: see :class:`mmfm.mixture.gaussian.Mixture`."""

    weights: Tensor
    means: Tensor
    variances: Tensor
    covariance_type: str

    def centre(self, dtype: torch.dtype) -> Tensor:
        """The overall mean (C,), as ``dtype`` holds it."""

    def whitening(self) -> Tensor:
        """Matrices that make covariances (``tied``, ``full``) the identity."""

    def log_determinants(self) -> Tensor:
        """Logarithms of the covariances' determinants, (K,)."""

    def cancelling_terms(self) -> Tensor:
        """Sums of m^2 / v, (K,)."""


class Densities:
    """What the densities of a mixture are computed from, in one arithmetic; F is 2 C, or C + 1 with one precision.

    Args:
        mixture: the mixture.
        dtype: arithmetic, see :func:`arithmetic`.

    Attributes:
        centre: (C,).
        constant: (K,).
        table: (F, K).
        sharp: (S,) int64, components whose densities need float64 where the arithmetic is float32.
        direct: components whose deviations have to be taken from their means; all of ``full``.
    """

    def __init__(self, mixture: Parameters, dtype: torch.dtype) -> None:
        self.dtype = arithmetic(mixture.covariance_type, dtype)
        # Not the mixture itself, which keeps this object: a cycle would hold the memory of many iterations.
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
        terms = mixture.cancelling_terms()
        everywhere = mixture.covariance_type == "full"
        self.direct = [number for number, size in enumerate(terms.tolist()) if everywhere or size > DIRECT_FROM]
        sharp_from = SHARP_FROM if self.dtype == torch.float32 else math.inf
        self.sharp = (terms > sharp_from).nonzero().squeeze(1)
        self._of_sharp = (constant[self.sharp], table[:, self.sharp].contiguous())
        self.centre, self.constant, self.table = (
            values.to(self.dtype) for values in (mixture.centre(self.dtype), constant, table)
        )

    def log_joint(self, x: Tensor, space: Workspace) -> Tensor:
        """Return log w_k N(x; mean_k, variance_k) for x (B, C): (B, K), in ``space`` until the next call."""
        device = self.constant.device
        x, k = x.to(device), len(self.constant)
        result = space.take("joint", self.dtype, len(x), k)
        with exact_float32(device.type):
            if len(self.direct) < k:
                features = self._features(x, self.centre, space)
                torch.addmm(self.constant, features, self.table, out=result)
            if len(self.sharp) > len(self.direct):
                features = self._features(x, self.centre.double(), space)
                constant, table = self._of_sharp
                result[:, self.sharp] = torch.addmm(constant, features, table).to(self.dtype)
        x = x.double() if self.direct else x
        for number in self.direct:
            result[:, number] = self._at_mean[number] - 0.5 * self._distances(x, number)
        return result

    def _features(self, x: Tensor, centre: Tensor, space: Workspace) -> Tensor:
        """Return [z, z^2] (B, 2 C), or with one precision for all axes [z, |z|^2] (B, C + 1), of z = x - centre."""
        c = len(centre)
        features = space.take("features", centre.dtype, len(x), 2 * c if self._diag else c + 1)
        z = torch.sub(x, centre, out=features[:, :c])
        if self._whitening is not None:
            z.copy_(z @ self._whitening)
        if self._diag:
            torch.mul(z, z, out=features[:, c:])
        else:
            torch.sum(z.square(), 1, keepdim=True, out=features[:, c:])
        return features

    def _distances(self, x: Tensor, number: int) -> Tensor:
        """Return the squared distances of x (B, C) float64 from a component's mean in units of its spread, (B,)."""
        deviation = x - self._means[number]
        if self._whitening is None:
            return deviation.square_().div_(self._variances[number]).sum(1)
        own = self._whitening if self._whitening.ndim == 2 else self._whitening[number]
        return (deviation @ own).square_().sum(1)
