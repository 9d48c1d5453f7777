"""Gaussian mixtures: parameters, posteriors, sampling and files. Densities are in :mod:`mmfm.mixture.densities`."""

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
from mmfm.infra.precision import known_to_repeat
from mmfm.mixture.densities import Densities
from mmfm.mixture.workspace import Workspace

MAX_COVARIANCE_BYTES = 2 << 30
"""Largest array of covariances allowed, in bytes; a fit holds several of them at once."""

_SCORE_ROWS = 4096


def covariance_shape(covariance_type: str, k: int, c: int) -> tuple[int, ...]:
    """Return the shape of the covariances of K components in C dimensions, as in scikit-learn's ``covariances_``.

    Raises:
        ValueError: the type is unknown, or the array would exceed :data:`MAX_COVARIANCE_BYTES`.
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
        variances: variances (K, C) for ``diag`` or (K,) for ``spherical``; covariances (C, C) for ``tied`` or
            (K, C, C) for ``full``.
        covariance_type: one of :data:`mmfm.config.choices.COVARIANCES`. By default ``spherical``, ``diag`` or ``full``
            if ``variances`` has one, two or three axes.
        metadata: metadata of the file that the mixture was loaded from (``digest``, ``listing_digest``, ...).

    The parameters are stored as float64 tensors on the device of the means.

    Raises:
        ValueError: the shapes do not match, a variance is not positive, or the weights do not sum to 1.
    """

    _cholesky: Tensor  # lower factors of the covariances, for ``tied`` and ``full`` only

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
        self._distances: Tensor | None = None
        self._check()

    def _check(self) -> None:
        k, c = (*self.means.shape, 0, 0)[:2]
        shape = covariance_shape(self.covariance_type, k, c)
        if self.means.ndim != 2 or self.weights.shape != (k,) or self.variances.shape != shape:
            raise ValueError(
                f"a {self.covariance_type} mixture can't have weights {tuple(self.weights.shape)}, means "
                f"{tuple(self.means.shape)} and variances {tuple(self.variances.shape)}; fit or fetch it again"
            )
        bad = ~self.means.isfinite().all(1) | self._invalid_variances()
        if bad.any():
            raise ValueError(
                f"component {int(bad.nonzero()[0])} of the mixture has a variance that is not positive or a mean that "
                "is not finite; raise gmm.reg_covar, or fetch the mixture again"
            )
        if not (self.weights >= 0).all() or abs(float(self.weights.sum()) - 1) > 1e-6:
            raise ValueError(
                f"the weights of the mixture sum to {float(self.weights.sum()):.8g} instead of 1, or one is negative; "
                "fit or fetch it again"
            )

    def _invalid_variances(self) -> Tensor:
        """Return which components have variances that are not positive (covariances not positive definite), (K,)."""
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
        """Number of dimensions C."""
        return self.means.shape[1]

    @property
    def n_parameters(self) -> int:
        """Number of free parameters of the means, the (symmetric) covariances and the weights (which sum to 1)."""
        c = self.dimension
        covariances = {"tied": 1, "full": self.n_components}.get(self.covariance_type)
        free = self.variances.numel() if covariances is None else covariances * c * (c + 1) // 2
        return self.means.numel() + free + self.n_components - 1

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.means.device

    def to(self, device: torch.device | str) -> "Mixture":
        """Return a copy of the mixture on another device."""
        weights, means, variances = (p.to(device) for p in (self.weights, self.means, self.variances))
        return Mixture(weights, means, variances, self.covariance_type, self.metadata)

    def diagonal(self) -> Tensor:
        """Return each component's variance along every axis, (K, C) float64, as a view of the parameters."""
        if self.covariance_type == "spherical":
            return self.variances[:, None].expand_as(self.means)
        if self.covariance_type == "diag":
            return self.variances
        return self.variances.diagonal(dim1=-2, dim2=-1).expand_as(self.means)

    def centre(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the overall mean of the mixture (C,) float64, rounded to ``dtype``.

        It is rounded so that data in that precision and means in float64 are centred on exactly the same point.
        """
        return (self.weights @ self.means).to(dtype).double()

    def squared_mahalanobis(self) -> Tensor:
        """Return the squared Mahalanobis distance of each mean from the centre under its component, (K,) float64.

        Terms of this size cancel in the log-density of a component at its own rows. Times the machine epsilon, it
        bounds the rounding error of that log-density.
        """
        if self._distances is None:
            offset = self.means - self.centre(torch.float32)
            if self.covariance_type in ("diag", "spherical"):
                self._distances = (offset.square() / self.diagonal()).sum(1)
            else:
                self._distances = (offset[:, None] @ self.whitening()).square().sum((1, 2))
        return self._distances

    def log_determinants(self) -> Tensor:
        """Return the log-determinants of the covariances, (K,) float64, or () for ``tied``."""
        if self.covariance_type in ("diag", "spherical"):
            return self.diagonal().log().sum(1)
        return 2 * self._cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def whitening(self) -> Tensor:
        """Return W with W W^T = covariance^-1, (C, C) float64 for ``tied`` or (K, C, C) for ``full``."""
        if self._whitening is None:
            identity = torch.eye(self.dimension, dtype=torch.float64, device=self.device)
            self._whitening = torch.linalg.solve_triangular(self._cholesky, identity, upper=False).mT.contiguous()
        return self._whitening

    @torch.no_grad()
    def log_joint(self, x: Tensor, dtype: torch.dtype = torch.float64, workspace: Workspace | None = None) -> Tensor:
        """Return log w_k N(x; mean_k, variance_k), without a gradient.

        Args:
            x: (B, C).
            dtype: float64 or float32; ``tied`` and ``full`` mixtures always use float64. The error in float32 is about
                1e-3 nats at C = 768. Components so narrow that it would be much larger (hundreds of nats with
                variances of 1e-6) are computed in float64 and rounded.
            workspace: buffers for the result, which the next call then overwrites. By default the result is new.

        Returns:
            (B, K) in the dtype that was used.
        """
        return self.densities(dtype).log_joint(x, workspace or Workspace(self.device))

    def densities(self, dtype: torch.dtype) -> Densities:
        """Return the precomputed terms of the densities in ``dtype``."""
        if dtype not in self._densities:
            self._densities[dtype] = Densities(self, dtype)
        return self._densities[dtype]

    def log_prob(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the log-density of the mixture at x (B, C), in nats: (B,). For ``dtype`` see :meth:`log_joint`."""
        return self.log_joint(x, dtype).logsumexp(1)

    def score(self, x: Tensor, dtype: torch.dtype = torch.float64) -> float:
        """Return the mean log-density at x (N, C), in nats per row."""
        total = sum(self.log_prob(rows, dtype).double().sum() for rows in x.split(_SCORE_ROWS))
        return float(total) / len(x)

    def bic(self, x: Tensor) -> float:
        """Return the Bayesian information criterion on x (N, C); lower is better."""
        return -2 * self.score(x) * len(x) + self.n_parameters * math.log(len(x))

    def aic(self, x: Tensor) -> float:
        """Return the Akaike information criterion on x (N, C); lower is better."""
        return -2 * self.score(x) * len(x) + 2 * self.n_parameters

    def predict_proba(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the posterior p(k | x) at x (B, C): (B, K). For ``dtype`` see :meth:`log_joint`."""
        return self.log_joint(x, dtype).softmax(1)

    def predict(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the component with the largest posterior at x (B, C), or the first in a tie: (B,) int64."""
        return self.log_joint(x, dtype).argmax(1)

    def posterior(self, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return p(k | token) as training uses it: in float32, without TF32 and autocast.

        Args:
            tokens: (B, C) float32, global tokens.
            dtype: see :meth:`log_joint`.

        Returns:
            (B, K) on the mixture's device.
        """
        return self.predict_proba(tokens, dtype)

    def sample(self, count: int, seed: int = 0, first: int = 0) -> tuple[Tensor, Tensor]:
        """Draw samples number ``first`` to ``first + count - 1``, each a function of the seed and its number only.

        Returns:
            The samples (count, C) float64 and their components (count,) int64.
        """
        index = torch.arange(first, first + count, device=self.device)
        modes = draw_from_weights(self.weights, rng.uniform(seed, "mixture/mode", index))
        noise = rng.normal(seed, "mixture/noise", index, (self.dimension,)).double()
        if self.covariance_type in ("diag", "spherical"):
            return self.means[modes] + self.variances[modes].sqrt().reshape(count, -1) * noise, modes
        factors = self._cholesky.expand(self.n_components, -1, -1)
        x = self.means[modes]
        for k in modes.unique():  # gathering the factors would take (count, C, C)
            x[modes == k] += noise[modes == k] @ factors[k].T
        return x, modes

    @classmethod
    def from_sklearn(cls, model: Any) -> "Mixture":
        """Copy the parameters of a fitted ``sklearn.mixture.GaussianMixture``."""
        return cls(model.weights_, model.means_, model.covariances_, model.covariance_type)

    def to_sklearn(self) -> Any:
        """Return a fitted ``sklearn.mixture.GaussianMixture`` with these parameters."""
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
        """Write the mixture to a safetensors file and return the digest of its arrays; the layout is in docs/stages.md.

        Args:
            path: file to write; it appears only once it is complete.
            more: further arrays to store.
        """
        arrays = {name: getattr(self, name).cpu().numpy() for name in ("weights", "means", "variances")}
        return store.write_arrays(
            path, {**arrays, **(more or {})}, {**metadata, "covariance_type": self.covariance_type}
        )

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Mixture":
        """Load a mixture written by :meth:`save`.

        On the CPU the parameters stay memory-mapped and must not be modified.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, or not a mixture.
        """
        arrays, metadata = store.map_arrays(path)
        missing = {"weights", "means", "variances"} - set(arrays)
        if missing:
            raise ValueError(f"'{path}' is not a mixture (it lacks {', '.join(sorted(missing))}); run fit_gmm")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")
            weights, means, variances = (torch.from_numpy(arrays[name]) for name in ("weights", "means", "variances"))
        return cls(weights, means, variances, metadata.get("covariance_type"), metadata).to(device)


def draw_modes(posterior: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one component per row by inverting the CDF.

    Args:
        posterior: (B, K), non-negative; the rows need not be normalised.
        uniforms: (B,) in (0, 1).

    Returns:
        (B,) int64, the first k with cdf_k > u cdf_K. A component of probability 0 is never drawn.
    """
    with known_to_repeat():  # unlike the sum of one long vector, each row is summed in a fixed order
        cdf = posterior.double().cumsum(-1)
    total = cdf[..., -1:]
    threshold = uniforms.to(cdf.device, torch.float64)[..., None] * total
    # If u cdf_K rounds up to cdf_K, this is the last component with a positive probability.
    last = (cdf < total).sum(-1)
    return torch.minimum(torch.searchsorted(cdf, threshold, right=True).squeeze(-1), last)


def draw_from_weights(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw components from the mixture weights (K,) at uniforms (B,) in (0, 1), as :func:`draw_modes`: (B,) int64."""
    cdf = weights.double().cumsum(0)
    last = (cdf < cdf[-1]).sum()
    return torch.searchsorted(cdf, uniforms.to(cdf.device, torch.float64) * cdf[-1], right=True).clamp(max=last)
