"""Grids of images. Images in NumPy arrays are arranged without importing PyTorch."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mmfm.infra.store import whole_file

if TYPE_CHECKING:
    from torch import Tensor

_GAP = 2
_READABLE = 64


def image_grid(images: "Tensor | np.ndarray", columns: int | None = None, upscale: int | None = None) -> Image.Image:
    """Arrange images row by row on white, with a gap of 2 pixels.

    Args:
        images: (n, 3, S, S) uint8.
        columns: images per row; None: as square as possible.
        upscale: integer factor (nearest neighbour); None: the smallest that gives at least 64 pixels per side.

    Raises:
        ValueError: wrong shape or dtype, or no images.
    """
    array = images if isinstance(images, np.ndarray) else images.detach().cpu().numpy()
    if array.ndim != 4 or array.shape[1] != 3 or array.dtype != np.uint8 or len(array) == 0:
        raise ValueError(f"images are {array.shape} {array.dtype}; a grid needs (n, 3, S, S) uint8 with n >= 1")
    n, _, height, width = array.shape
    columns = min(n, columns or int(np.ceil(np.sqrt(n))))
    upscale = upscale or max(1, -(-_READABLE // height))
    array = array.transpose(0, 2, 3, 1).repeat(upscale, axis=1).repeat(upscale, axis=2)
    height, width = height * upscale, width * upscale
    rows = -(-n // columns)
    sheet = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for i in range(n):
        top, left = (i // columns) * (height + _GAP), (i % columns) * (width + _GAP)
        sheet[top : top + height, left : left + width] = array[i]
    return Image.fromarray(sheet)


def paired_grid(above: "Tensor", below: "Tensor", columns: int = 8) -> Image.Image:
    """Arrange two sets of images (n, 3, S, S) uint8, with image i of ``below`` under image i of ``above``."""
    import torch

    columns = min(columns, len(above))
    sheet = []
    for start in range(0, len(above), columns):
        for images in (above, below):
            row = images[start : start + columns].cpu()
            white = row.new_full((columns - len(row), *row.shape[1:]), 255)
            sheet += [row, white]
    return image_grid(torch.cat(sheet), columns)


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write a picture as PNG, atomically."""
    with whole_file(path) as partial:
        picture.save(partial, format="PNG", optimize=True)
