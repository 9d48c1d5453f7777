"""Grids of images as one picture."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmfm.infra.store import whole_file

_GAP = 2
_READABLE = 64


def image_grid(images: Tensor | np.ndarray, columns: int | None = None, upscale: int | None = None) -> Image.Image:
    """Lay images out row by row on white, with a gap of 2 pixels.

    Args:
        images: (n, 3, S, S) uint8.
        columns: images in a row; None: as square as possible.
        upscale: whole factor by which pixels are repeated (no smoothing); None: until an image has at least 64 pixels.

    Raises:
        ValueError: images of another shape or dtype, or none.
    """
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.ndim != 4 or array.shape[1] != 3 or array.dtype != np.uint8 or len(array) == 0:
        raise ValueError(f"images are {array.shape} {array.dtype}; a grid takes at least one, (n, 3, S, S) uint8")
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


def paired_grid(above: Tensor, below: Tensor, columns: int = 8) -> Image.Image:
    """Lay out two sets of images (n, 3, S, S) uint8, image i of ``below`` right under image i of ``above``."""
    columns = min(columns, len(above))
    sheet = []
    for start in range(0, len(above), columns):
        for images in (above, below):
            row = images[start : start + columns].cpu()
            white = row.new_full((columns - len(row), *row.shape[1:]), 255)
            sheet += [row, white]
    return image_grid(torch.cat(sheet), columns)


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write a picture as PNG, whole."""
    with whole_file(path) as partial:
        picture.save(partial, format="PNG", optimize=True)
