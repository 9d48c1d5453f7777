"""Gaussian mixtures: parameters, posteriors, draws, files. Densities are computed in :mod:`mmfm.mixture.densities`."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfm.config.choices import COVARIANCES
from mmfm.infra import rng, store
from mmfm.mixture.densities import Densities
from mmfm.mixture.workspace import Workspace

MAX_COVARIANCE_BYTES = 2 << 30
"""The largest array of covariances that is worked with; a fit holds a handful of them."""

_SCORE_ROWS = 4096


def covariance_shape(covariance_type: str, k: int, c: int) -> tuple[int, ...]:
    """Return the shape of the covariances of K components in C dimensions: that of scikit-learn's ``covariances_``.

    Raises:
        ValueError: an unknown type, or an array above :data:`MAX_COVARIANCE_BYTES`.
    """
    COVARIANCES.require(covariance_type)
    shape = {"diag": (k, c), "spherical": (k,), "tied": (c, c), "full": (k, c, c)}[covariance_type]
    size, limit = 8 * math.prod(shape), MAX_COVARIANCE_BYTES
    if size > limit:
        raise ValueError(
            f"{covariance_type} covariances of {k} components in {c} dimensions take {size / 1e9:.1f} GB, more than "
            f"the limit of {limit / 1e9:.1f} GB; set gmm.covariance_type to diag or tied, or use fewer components"
        )
    return shape


class Mixture:
    """A mixture of K Gaussians in C dimensions.

    Args:
        weights: (K,), sum 1.
        means: (K, C).
        variances: (K, C) for ``diag``, (K,) for ``spherical``; covariances (C, C) for ``tied``, (K, C, C) for ``full``.
        covariance_type: one of :data:`mmfm.config.choices.COVARIANCES`; by default ``diag`` or ``spherical`` or
            ``full``, whichever has variances of this number of axes.
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
        by_axes = {1: "spherical", 2: "diag", 3: "full"}
        self.covariance_type = covariance_type or by_axes.get(self.variances.ndim, "diag")
        self.metadata = dict(metadata or {})
        self._densities: dict[torch.dtype, Densities] = {}
        self._whitening: Tensor | None = None
        self._cancelling: Tensor | None = None
        self._check()

    def _check(self) -> None:
        k, c = (*self.means.shape, 0, 0)[:2]
        shape = covariance_shape(self.covariance_type, k, c)
        if self.means.ndim != 2 or self.weights.shape != (k,) or self.variances.shape != shape:
            raise ValueError(
                f"a {self.covariance_type} mixture can't have weights {tuple(self.weights.shape)}, means "
                f"{tuple(self.means.shape)} and variances {tuple(self.variances.shape)}; fit or fetch it again"
            )
        bad = ~self.means.isfinite().all(1) | self._impossible_variances()
        if bad.any():
            raise ValueError(
                f"component {int(bad.nonzero()[0])} of the mixture has a variance that is not positive or a mean that "
                "is not finite; raise gmm.reg_covar, or fetch the mixture again"
            )
        if not (self.weights >= 0).all() or abs(float(self.weights.sum()) - 1) > 1e-6:
            raise ValueError(
                f"the mixture's weights sum to {float(self.weights.sum()):.8g}, not 1; fit or fetch it again"
            )

    def _impossible_variances(self) -> Tensor:
        if self.covariance_type in ("diag", "spherical"):
            return ~(self.variances > 0).reshape(len(self.means), -1).all(1)
        self._cholesky, failed = torch.linalg.cholesky_ex(self.variances)
        return failed.bool().expand(len(self.means))

    @property
    def n_components(self) -> int:
        """Number of components K."""
        return self.means.shape[0]

    @property
    def dimension(self) -> int:
        """Length C of a vector."""
        return self.means.shape[1]

    @property
    def n_parameters(self) -> int:
        """Number of free parameters: means, variances (a covariance is symmetric), and weights that sum to 1."""
        c = self.dimension
        covariances = {"tied": 1, "full": self.n_components}.get(self.covariance_type)
        free = self.variances.numel() if covariances is None else covariances * c * (c + 1) // 2
        return self.means.numel() + free + self.n_components - 1

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.means.device

    def to(self, device: torch.device | str) -> "Mixture":
        """Return the mixture on another device."""
        moved = (p.to(device) for p in (self.weights, self.means, self.variances))
        return Mixture(*moved, self.covariance_type, self.metadata)

    def diagonal(self) -> Tensor:
        """Return the variances of every component along the axes, (K, C) float64; a view where there is one."""
        if self.covariance_type == "spherical":
            return self.variances[:, None].expand_as(self.means)
        if self.covariance_type == "diag":
            return self.variances
        return self.variances.diagonal(dim1=-2, dim2=-1).expand_as(self.means)

    def centre(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the overall mean (C,) float64, rounded to ``dtype``.

        Rounded before it is used, so that data in that precision and means are relative to exactly the same point.
        """
        return (self.weights @ self.means).to(dtype).double()

    def cancelling_terms(self) -> Tensor:
        """Return the squared distance of every mean from the centre in units of its component's spread, (K,) float64.

        It is the size of the terms that cancel in a log-density of the rows that are there; with the arithmetic's
        epsilon it says how wrong that is.
        """
        if self._cancelling is None:
            offset = self.means - self.centre(torch.float32)
            if self.covariance_type in ("diag", "spherical"):
                self._cancelling = (offset.square() / self.diagonal()).sum(1)
            else:
                self._cancelling = (offset[:, None] @ self.whitening()).square().sum((1, 2))
        return self._cancelling

    def log_determinants(self) -> Tensor:
        """Return the logarithm of every covariance's determinant, (K,) float64, or () for ``tied``."""
        if self.covariance_type in ("diag", "spherical"):
            return self.diagonal().log().sum(1)
        return 2 * self._cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def whitening(self) -> Tensor:
        """Return W, (C, C) or (K, C, C) float64, with W W^T the inverse covariance (``tied``, ``full``)."""
        if self._whitening is None:
            identity = torch.eye(self.dimension, dtype=torch.float64, device=self.device)
            self._whitening = torch.linalg.solve_triangular(self._cholesky, identity, upper=False).mT.contiguous()
        return self._whitening

    @torch.no_grad()
    def log_joint(self, x: Tensor, dtype: torch.dtype = torch.float64, space: Workspace | None = None) -> Tensor:
        """Return log w_k N(x; mean_k, variance_k).

        Args:
            x: (B, C).
            dtype: arithmetic, float64 or float32, of ``diag`` and ``spherical``. In float32 the error is about 1e-3
                nats at C = 768 with variances of the order of the data's. With variances near 1e-6 it would be
                hundreds: such components are computed in float64, and rounded. ``tied`` and ``full`` are in any case
                computed in float64.
            space: where the result is made; the next call overwrites it. None: in new memory.

        Returns:
            (B, K) of the arithmetic, without a gradient.
        """
        return self.densities(dtype).log_joint(x, space or Workspace(self.device))

    def densities(self, dtype: torch.dtype) -> Densities:
        """Return what computes the densities in ``dtype``, made once."""
        if dtype not in self._densities:
            self._densities[dtype] = Densities(self, dtype)
        return self._densities[dtype]

    def log_prob(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the log-density of the mixture at x (B, C): (B,), nats; ``dtype`` as in :meth:`log_joint`."""
        return self.log_joint(x, dtype).logsumexp(1)

    def score(self, x: Tensor, dtype: torch.dtype = torch.float64) -> float:
        """Return the mean log-density at x (N, C), nats per row."""
        total = sum(self.log_prob(rows, dtype).double().sum() for rows in x.split(_SCORE_ROWS))
        return float(total) / len(x)

    def bic(self, x: Tensor) -> float:
        """Return the Bayesian information criterion for x (N, C); the lower the better."""
        return -2 * self.score(x) * len(x) + self.n_parameters * math.log(len(x))

    def aic(self, x: Tensor) -> float:
        """Return Akaike's information criterion for x (N, C); the lower the better."""
        return -2 * self.score(x) * len(x) + 2 * self.n_parameters

    def predict_proba(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return p(k | x) for x (B, C): (B, K), rows summing to 1; ``dtype`` as in :meth:`log_joint`."""
        return self.log_joint(x, dtype).softmax(1)

    def predict(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the component with the largest posterior, the first of equals: (B,) int64."""
        return self.log_joint(x, dtype).argmax(1)

    def posterior(self, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return p(k | token) as training uses it: float32 products without TF32, also under autocast.

        Args:
            tokens: (B, C), global tokens; computed in float32 by the encoder.

        Returns:
            (B, K) on the mixture's device; ``dtype`` as in :meth:`log_joint`.
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
        if self.covariance_type in ("diag", "spherical"):
            return self.means[modes] + self.variances[modes].sqrt().reshape(count, -1) * noise, modes
        factors = self._cholesky.expand(self.n_components, -1, -1)
        x = self.means[modes]
        for k in modes.unique():  # gathered factors would be (count, C, C)
            x[modes == k] += noise[modes == k] @ factors[k].T
        return x, modes

    @classmethod
    def from_sklearn(cls, model: Any) -> "Mixture":
        """Take the parameters of a fitted ``sklearn.mixture.GaussianMixture`` of any type."""
        return cls(model.weights_, model.means_, model.covariances_, model.covariance_type)

    def to_sklearn(self) -> Any:
        """Return a ``sklearn.mixture.GaussianMixture`` with these parameters, ready to predict."""
        from sklearn.mixture import GaussianMixture

        model = GaussianMixture(self.n_components, covariance_type=self.covariance_type)
        model.weights_, model.means_ = self.weights.cpu().numpy(), self.means.cpu().numpy()
        model.covariances_ = self.variances.cpu().numpy()
        if self.covariance_type in ("diag", "spherical"):
            model.precisions_ = 1.0 / model.covariances_
            model.precisions_cholesky_ = np.sqrt(model.precisions_)
        else:
            whitening = self.whitening()
            model.precisions_ = (whitening @ whitening.mT).cpu().numpy()
            model.precisions_cholesky_ = whitening.cpu().numpy()
        model.n_features_in_, model.converged_ = self.dimension, True
        return model

    def save(self, path: str | Path, metadata: Mapping[str, Any], more: Mapping[str, np.ndarray] | None = None) -> str:
        """Write ``gmm.safetensors`` (layout in docs/stages.md), whole, and return the digest of its arrays.

        Args:
            more: arrays that are written beside the parameters.
        """
        arrays = {name: getattr(self, name).cpu().numpy() for name in ("weights", "means", "variances")}
        return store.write_arrays(
            path, {**arrays, **(more or {})}, {**metadata, "covariance_type": self.covariance_type}
        )

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
