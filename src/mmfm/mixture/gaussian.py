"""Gaussian mixtures with diagonal or spherical covariances: densities, posteriors, draws, files.

The log-density of all components is two matrix products. With x and the means taken relative to the mixture's overall
mean c, and z = x - c, m = mean - c:

    log w_k N(x; mean_k, v_k) = constant_k + z . (m_k / v_k) - z^2 . (1 / v_k) / 2,
    constant_k = log w_k - (C log 2 pi + sum log v_k + sum m_k^2 / v_k) / 2

Nothing larger than (B, K) is made. Centring keeps the terms small, so that float32 is enough; TF32 and bfloat16 are
not.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfm.infra import rng, store

COVARIANCE_TYPES = ("diag", "spherical")


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """Multiply float32 matrices in float32 inside the block: no autocast, TF32 or bfloat16; restored afterwards."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class Mixture:
    """A mixture of K Gaussians in C dimensions.

    Args:
        weights: (K,), sum 1.
        means: (K, C).
        variances: (K, C) for ``diag``, (K,) for ``spherical``.
        covariance_type: ``diag`` or ``spherical``; by default what the shape of the variances says.
        metadata: whatever the file said besides (``digest``, ``listing_digest``, ...).

    All three become float64 tensors on the device of the means.

    Raises:
        ValueError: shapes that do not fit, variances that are not positive, weights that do not sum to 1.
    """

    def __init__(
        self,
        weights: Tensor | np.ndarray,
        means: Tensor | np.ndarray,
        variances: Tensor | np.ndarray,
        covariance_type: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.means = torch.as_tensor(means).double()
        self.weights = torch.as_tensor(weights).to(self.means.device, torch.float64)
        self.variances = torch.as_tensor(variances).to(self.means.device, torch.float64)
        self.covariance_type = covariance_type or ("spherical" if self.variances.ndim == 1 else "diag")
        self.metadata = dict(metadata or {})
        self._operands: dict[torch.dtype, tuple[Tensor, ...]] = {}
        self._check()

    def _check(self) -> None:
        if self.covariance_type not in COVARIANCE_TYPES:
            raise ValueError(f"covariance_type is '{self.covariance_type}'; it must be one of diag, spherical")
        shape = self.means.shape if self.covariance_type == "diag" else self.means.shape[:1]
        if self.means.ndim != 2 or self.weights.shape != self.means.shape[:1] or self.variances.shape != shape:
            raise ValueError(
                f"a {self.covariance_type} mixture can't have weights {tuple(self.weights.shape)}, means "
                f"{tuple(self.means.shape)} and variances {tuple(self.variances.shape)}; fit or fetch it again"
            )
        if not (self.variances > 0).all() or not self.means.isfinite().all():
            bad = (~(self.variances > 0)).reshape(len(self.means), -1).any(1) | ~self.means.isfinite().all(1)
            raise ValueError(
                f"component {int(bad.nonzero()[0])} of the mixture has a variance that is not positive or a mean that "
                "is not finite; raise gmm.reg_covar, or fetch the mixture again"
            )
        if not (self.weights >= 0).all() or abs(float(self.weights.sum()) - 1) > 1e-6:
            raise ValueError(
                f"the mixture's weights sum to {float(self.weights.sum()):.8g}, not 1; fit or fetch it again"
            )

    @property
    def n_components(self) -> int:
        """Number of components K."""
        return self.means.shape[0]

    @property
    def dimension(self) -> int:
        """Length C of a vector."""
        return self.means.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.means.device

    def to(self, device: torch.device | str) -> "Mixture":
        """Return the mixture on another device."""
        moved = (p.to(device) for p in (self.weights, self.means, self.variances))
        return Mixture(*moved, self.covariance_type, self.metadata)

    def _prepared(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return centre (C,), constant (K,), m / v (C, K), 1 / v (C, K) or (1, K): made in float64, kept in dtype."""
        if dtype not in self._operands:
            # Rounded before use, so that x and the means are relative to exactly the same point.
            centre = (self.weights @ self.means).to(dtype).double()
            m = self.means - centre
            v = self.variances if self.covariance_type == "diag" else self.variances[:, None]
            log_det = v.log().sum(1) * (self.dimension / v.shape[1])
            constant = self.weights.log() - 0.5 * (
                self.dimension * math.log(2 * math.pi) + log_det + (m * m / v).sum(1)
            )
            operands = (centre, constant, (m / v).T.contiguous(), v.reciprocal().T.contiguous())
            self._operands[dtype] = tuple(t.to(dtype) for t in operands)
        return self._operands[dtype]

    def log_joint(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return log w_k N(x; mean_k, variance_k).

        Args:
            x: (B, C).
            dtype: arithmetic, float64 or float32. In float32 the error is about 1e-3 nats at C = 768 with variances of
                the order of the data's; with variances near 1e-6 it is hundreds.

        Returns:
            (B, K) of ``dtype``.
        """
        centre, constant, linear, quadratic = self._prepared(dtype)
        with exact_float32(self.device.type):
            z = x.to(self.device, dtype) - centre
            result = torch.addmm(constant, z, linear)
            z.square_()
            if self.covariance_type == "spherical":
                z = z.sum(1, keepdim=True)
            return result.addmm_(z, quadratic, alpha=-0.5)

    def log_prob(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the log-density of the mixture at x (B, C): (B,) of ``dtype``, nats."""
        return self.log_joint(x, dtype).logsumexp(1)

    def log_posterior(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return log p(k | x) for x (B, C): (B, K) of ``dtype``."""
        return self.log_joint(x, dtype).log_softmax(1)

    def predict_proba(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return p(k | x) for x (B, C): (B, K) of ``dtype``, rows summing to 1."""
        return self.log_joint(x, dtype).softmax(1)

    def predict(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the component with the largest posterior, the first of equals: (B,) int64."""
        return self.log_joint(x, dtype).argmax(1)

    def posterior(self, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return p(k | token) as training uses it: float32 products without TF32, also under autocast.

        Args:
            tokens: (B, C), global tokens; computed in float32 by the encoder.

        Returns:
            (B, K) of ``dtype`` on the mixture's device.
        """
        return self.predict_proba(tokens, dtype)

    def sample(self, count: int, seed: int = 0, first: int = 0) -> tuple[Tensor, Tensor]:
        """Draw vectors number ``first`` to ``first + count``; each is a function of the seed and its number.

        Returns:
            x (count, C) float64 and its components (count,) int64.
        """
        index = torch.arange(first, first + count, device=self.device)
        modes = draw_from_weights(self.weights, rng.uniform(seed, "mixture/mode", index))
        noise = rng.normal(seed, "mixture/noise", index, (self.dimension,)).double()
        return self.means[modes] + self.variances[modes].sqrt().reshape(count, -1) * noise, modes

    @classmethod
    def from_sklearn(cls, model: Any) -> "Mixture":
        """Take the parameters of a fitted ``sklearn.mixture.GaussianMixture`` of type diag or spherical."""
        return cls(model.weights_, model.means_, model.covariances_, model.covariance_type)

    def to_sklearn(self) -> Any:
        """Return a ``sklearn.mixture.GaussianMixture`` with these parameters, ready to predict."""
        from sklearn.mixture import GaussianMixture

        model = GaussianMixture(self.n_components, covariance_type=self.covariance_type)
        model.weights_, model.means_ = self.weights.cpu().numpy(), self.means.cpu().numpy()
        model.covariances_ = self.variances.cpu().numpy()
        model.precisions_ = 1.0 / model.covariances_
        model.precisions_cholesky_ = np.sqrt(model.precisions_)
        model.n_features_in_, model.converged_ = self.dimension, True
        return model

    def save(self, path: str | Path, metadata: Mapping[str, Any]) -> str:
        """Write ``gmm.safetensors`` (layout in docs/stages.md), whole, and return the digest of its arrays."""
        arrays = {name: getattr(self, name).cpu().numpy() for name in ("weights", "means", "variances")}
        return store.write_arrays(path, arrays, {**metadata, "covariance_type": self.covariance_type})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Mixture":
        """Open ``gmm.safetensors``. On the CPU the parameters stay memory-mapped; they must not be written to.

        Raises:
            FileNotFoundError: there is none.
            ValueError: a truncated file, or one that holds something else.
        """
        arrays, metadata = store.map_arrays(path)
        missing = {"weights", "means", "variances"} - set(arrays)
        if missing:
            raise ValueError(f"'{path}' is no mixture (it has no {', '.join(sorted(missing))}); run fit_gmm")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")
            parameters = [torch.from_numpy(arrays[name]) for name in ("weights", "means", "variances")]
        return cls(*parameters, metadata.get("covariance_type"), metadata).to(device)


def draw_modes(posterior: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one component per row by inverse CDF.

    Args:
        posterior: (B, K), non-negative; rows need not be normalised.
        uniforms: (B,) in (0, 1).

    Returns:
        (B,) int64: the first k with cdf_k > u cdf_K, so a component of probability 0 is never drawn.
    """
    cdf = posterior.double().cumsum(-1)
    total = cdf[..., -1:]
    threshold = uniforms.to(cdf.device, torch.float64)[..., None] * total
    # u cdf_K may round up to cdf_K; the last component with a probability is then meant.
    last = (cdf < total).sum(-1)
    return torch.minimum(torch.searchsorted(cdf, threshold, right=True).squeeze(-1), last)


def draw_from_weights(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw components from mixture weights (K,) by inverse CDF at uniforms (B,) in (0, 1): (B,) int64."""
    cdf = weights.double().cumsum(0)
    last = (cdf < cdf[-1]).sum()
    return torch.searchsorted(cdf, uniforms.to(cdf.device, torch.float64) * cdf[-1], right=True).clamp(max=last)
