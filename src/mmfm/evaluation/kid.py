"""Kernel Inception Distance."""

import numpy as np
import torch
from torch import Tensor

from mmfm.config.choices import KID_SUBSET
from mmfm.evaluation.neighbours import Bank, check

SUBSETS, SUBSET_SIZE, SEED = 100, KID_SUBSET, 2020
"""torch-fidelity's defaults."""


def kernel_distance(
    generated: Bank,
    real: Bank,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Compute the squared maximum mean discrepancy of features (n, D) and (m, D), unbiased, over random subsets.

    The kernel is (x.y / D + 1)^3. Subsets are torch-fidelity's for the same seed. Its value differs by float32
    sums, which lose the fourth digit of a small distance.

    Args:
        subsets: number of pairs of subsets.
        subset_size: images in a subset, drawn without replacement.
        seed: of the draw.
        device: where to compute, in float64.

    Returns:
        mean over the subsets, possibly just below 0, and its population standard deviation.

    Raises:
        ValueError: features of another shape, NaN, all equal, or fewer images than a subset has.

    Source: Bińkowski et al. 2018, "Demystifying MMD GANs", section 4.
    """
    check(generated, "features of the generated images", 2)
    check(real, "features of the real images", 2)
    if min(len(generated), len(real)) < subset_size:
        raise ValueError(
            f"KID draws subsets of {subset_size} images, but there are {len(generated)} generated and {len(real)} real "
            "ones; give more images, or smaller subsets (which can't be compared with published values)"
        )
    if generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"generated images have {generated.shape[1]} features and real ones {real.shape[1]}; use one detector"
        )
    generator = np.random.RandomState(seed)  # the legacy generator, because torch-fidelity draws with it
    found = []
    for _ in range(subsets):
        drawn = [
            torch.as_tensor(np.asarray(bank[np.sort(generator.choice(len(bank), subset_size, replace=False))]))
            for bank in (generated, real)
        ]
        x, y = (rows.to(device, torch.float64) for rows in drawn)
        within = (_off_diagonal_sum(x) + _off_diagonal_sum(y)) / (subset_size * (subset_size - 1))
        found.append((within - 2 * _kernel(x, y).mean()).item())
    return float(np.mean(found)), float(np.std(found))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal_sum(x: Tensor) -> Tensor:
    products = _kernel(x, x)
    return products.sum() - products.trace()
