"""How close decoded images are to their originals, image by image."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2, _RANGE = 0.01, 0.03, 255.0


def psnr(originals: Tensor, decoded: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of every image, in decibels; infinite for equal images.

    Args:
        originals, decoded: (B, 3, H, W) uint8; the error is averaged over pixels and channels, and the peak is 255.

    Returns:
        (B,) float64.

    Raises:
        ValueError: another shape or dtype.
    """
    _check(originals, decoded)
    error = (originals.double() - decoded.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(_RANGE**2 / error)


def ssim(originals: Tensor, decoded: Tensor) -> Tensor:
    """Compute the structural similarity of every image: the mean over channels and all whole windows.

    Windows are Gaussian, 11 x 11 with a standard deviation of 1.5 pixels; variances are population ones.

    Args:
        originals, decoded: (B, 3, H, W) uint8, H and W at least 11.

    Returns:
        (B,) float64, at most 1.

    Raises:
        ValueError: another shape or dtype.

    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", equation 13
    with K1 = 0.01 and K2 = 0.03. Colour: the mean of the three channels, as scikit-image has it with ``channel_axis``.
    """
    _check(originals, decoded)
    if min(originals.shape[2:]) < _WINDOW:
        raise ValueError(f"images of {originals.shape[3]} x {originals.shape[2]} pixels are smaller than SSIM's window")
    x, y = originals.double(), decoded.double()
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * _RANGE) ** 2, (_K2 * _RANGE) ** 2
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (structure * (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)).mean((1, 2, 3))


PAIRED = {"psnr": psnr, "ssim": ssim}
"""Metrics of decoded images, each against its own original: (originals, decoded) -> (B,)."""


def highest_psnr(size: tuple[int, int]) -> float:
    """Return the highest finite PSNR of an image of ``size`` (width, height) pixels: a single value is off by one."""
    return 10 * math.log10(_RANGE**2 * 3 * math.prod(size))


def means(values: Mapping[str, np.ndarray], size: tuple[int, int]) -> tuple[dict[str, float], list[str]]:
    """Return the means over images, and what a reader must know of them: a sentence each.

    The PSNR of an image that equals its original is infinite, and would be the mean of all. It counts as
    :func:`highest_psnr`, so that the mean is finite and no image lowers it by being exact.

    Args:
        values: of the metrics :data:`PAIRED`, (n,) each, in the order of the images, so that the sum does not depend on
            how they were divided.
        size: width and height of the images, pixels.
    """
    found, lines, most = {}, [], highest_psnr(size)
    for name, each in values.items():
        found[name] = float(np.minimum(each, most).mean() if name == "psnr" else each.mean())
        exact = int(np.isinf(each).sum())
        if exact:
            lines.append(
                f"psnr: {exact:,} of {len(each):,} decoded images equal their originals; each counts as {most:.2f} dB, "
                "as if one value were off by one, instead of infinity."
            )
    return found, lines


def _blur(images: Tensor) -> Tensor:
    """Return the Gaussian means of all whole windows, (B, 3, H - 10, W - 10), for images (B, 3, H, W)."""
    rows, columns = (_windows(size, images) for size in images.shape[2:])
    return rows.T @ (images @ columns)


def _windows(size: int, like: Tensor) -> Tensor:
    """Return the weights of all windows along a side, (size, size - 10), with one in each column.

    As products of matrices, the means of 256 x 256 pixels take a quarter of the time of convolutions in float64.
    """
    distance = torch.arange(_WINDOW, dtype=like.dtype) - _WINDOW // 2
    kernel = torch.exp(-(distance**2) / (2 * _SIGMA**2))
    weights = torch.zeros((size, size - _WINDOW + 1), dtype=like.dtype)
    for offset, weight in enumerate(kernel / kernel.sum()):
        weights.diagonal(-offset)[:] = weight
    return weights.to(like.device)


def _check(originals: Tensor, decoded: Tensor) -> None:
    for images in (originals, decoded):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {tuple(images.shape)} {images.dtype}; they must be (B, 3, H, W) uint8")
    if originals.shape != decoded.shape:
        raise ValueError(
            f"originals are {tuple(originals.shape)} and decoded images {tuple(decoded.shape)}; decode at the same size"
        )
