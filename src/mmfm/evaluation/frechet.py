"""Fréchet distance between Gaussians."""

import numpy as np
import torch
from torch import Tensor


def frechet_distance(
    mean_a: np.ndarray | Tensor, cov_a: np.ndarray | Tensor, mean_b: np.ndarray | Tensor, cov_b: np.ndarray | Tensor
) -> float:
    """Compute the squared Fréchet (2-Wasserstein) distance between N(mean_a, cov_a) and N(mean_b, cov_b).

    |mean_a - mean_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr (cov_a^(1/2) cov_b cov_a^(1/2))^(1/2)

    For any factors cov_a = A A^T and cov_b = B B^T, the last trace is the sum of the singular values of A^T B. This
    is accurate for singular covariances (fewer images than features) too, whereas square roots of eigenvalues turn
    rounding errors into 1e-8 for each missing dimension. The factors are Cholesky's where the covariance has full rank,
    and eigenvectors, ten times as slow, where it has not.

    Args:
        mean_a, mean_b: (D,).
        cov_a, cov_b: (D, D) symmetric, positive semi-definite, possibly singular.

    Returns:
        the distance, at least 0, computed in float64 on the CPU.

    Raises:
        ValueError: the shapes don't match, a value is not finite, or a matrix is not a covariance.

    Source: Dowson and Landau 1982, "The Fréchet distance between multivariate normal distributions"; for generated
    images, Heusel et al. 2017, "GANs trained by a two time-scale update rule", equation 6.
    """
    mean_a, cov_a, mean_b, cov_b = (_float64(x) for x in (mean_a, cov_a, mean_b, cov_b))
    d = len(mean_a)
    if mean_b.shape != (d,) or mean_a.shape != (d,) or cov_a.shape != (d, d) or cov_b.shape != (d, d):
        shapes = ", ".join(str(tuple(x.shape)) for x in (mean_a, cov_a, mean_b, cov_b))
        raise ValueError(f"means and covariances have shapes {shapes}; they must be (D,) and (D, D) with the same D")
    cross = torch.linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, distance.item())


def _float64(values: np.ndarray | Tensor) -> Tensor:
    tensor = torch.tensor(values) if isinstance(values, np.ndarray) else values
    tensor = tensor.detach().to("cpu", torch.float64)
    if not tensor.isfinite().all():
        raise ValueError("a mean or covariance contains NaN or Inf; check the images and the detector's weights")
    return tensor


def _factor(covariance: Tensor) -> Tensor:
    """Return F (D, R) with F F^T = covariance (D, D) of rank R."""
    asymmetry, scale = (covariance - covariance.T).abs().max(), covariance.abs().max()
    covariance = (covariance + covariance.T) / 2
    rounding = len(covariance) * torch.finfo(torch.float64).eps
    if asymmetry <= 1e-6 * scale:
        factor, failed = torch.linalg.cholesky_ex(covariance)
        # A pivot within the rounding error may stand for an eigenvalue of zero.
        if not failed and factor.diagonal().square().min() > rounding * torch.linalg.matrix_norm(covariance):
            return factor
    values, vectors = torch.linalg.eigh(covariance)
    # Bound on the rounding error of eigenvalues; zero eigenvalues end up within it.
    tolerance = rounding * values.abs().max()
    if asymmetry > 1e-6 * scale or values.min() < -max(1e-6 * values.max(), tolerance):
        raise ValueError(
            f"a matrix is not a covariance: asymmetry {asymmetry:.1e}, smallest eigenvalue {values.min():.1e}; "
            "run fid_reference again"
        )
    kept = values > tolerance
    return vectors[:, kept] * values[kept].sqrt()
