"""Frechet distance between Gaussians."""

import numpy as np
import torch
from torch import Tensor

from mmfm.data.moments import CovarianceMoments
from mmfm.evaluation.reference import Reference


def frechet_distance(
    mean_a: np.ndarray | Tensor, cov_a: np.ndarray | Tensor, mean_b: np.ndarray | Tensor, cov_b: np.ndarray | Tensor
) -> float:
    """Squared Frechet (2-Wasserstein) distance between N(mean_a, cov_a) and N(mean_b, cov_b).

    |mean_a - mean_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr (cov_a^(1/2) cov_b cov_a^(1/2))^(1/2)

    The eigenvalues of the symmetric form under the last root are the squared singular values of A^T B, for any factors
    cov_a = A A^T and cov_b = B B^T. Taking the singular values keeps all digits where the covariances are singular
    (fewer images than features): a root of the eigenvalues' rounding errors would leave 1e-8 for every missing
    dimension.

    Args:
        mean_a, mean_b: (D,).
        cov_a, cov_b: (D, D) symmetric, positive semi-definite; singular ones are fine.

    Returns:
        The distance, at least 0, computed in float64 on the CPU.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or a matrix that is no covariance.

    Source: Dowson and Landau, "The Frechet distance between multivariate normal distributions", 1982; as a measure of
    generated images: Heusel et al., "GANs trained by a two time-scale update rule", 2017, equation 6.
    """
    mean_a, cov_a, mean_b, cov_b = (_float64(x) for x in (mean_a, cov_a, mean_b, cov_b))
    d = len(mean_a)
    if mean_b.shape != (d,) or mean_a.shape != (d,) or cov_a.shape != (d, d) or cov_b.shape != (d, d):
        shapes = ", ".join(str(tuple(x.shape)) for x in (mean_a, cov_a, mean_b, cov_b))
        raise ValueError(f"means and covariances are {shapes}; both must be (D,) and (D, D) of the same features")
    cross = torch.linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, distance.item())


def from_moments(moments: CovarianceMoments, reference: Reference) -> float:
    """Squared Frechet distance of generated images from the reference: the metric ``frechet``."""
    return frechet_distance(moments.mean, moments.covariance(), reference.mu, reference.sigma)


def _float64(values: np.ndarray | Tensor) -> Tensor:
    tensor = torch.tensor(values) if isinstance(values, np.ndarray) else values
    tensor = tensor.detach().to("cpu", torch.float64)
    if not tensor.isfinite().all():
        raise ValueError("a mean or covariance has NaN or infinite values; check the images and the detector's weights")
    return tensor


def _factor(covariance: Tensor) -> Tensor:
    """Return F (D, R) with F F^T = covariance (D, D) of rank R."""
    asymmetry, scale = (covariance - covariance.T).abs().max(), covariance.abs().max()
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    # Rounding moves eigenvalues by up to this; those of a singular covariance lie within it around 0.
    tolerance = len(values) * torch.finfo(torch.float64).eps * values.abs().max()
    if asymmetry > 1e-6 * scale or values.min() < -max(1e-6 * values.max(), tolerance):
        raise ValueError(
            f"a matrix is no covariance: asymmetry {asymmetry:.1e}, smallest eigenvalue {values.min():.1e}; "
            "make the reference again"
        )
    kept = values > tolerance
    return vectors[:, kept] * values[kept].sqrt()
