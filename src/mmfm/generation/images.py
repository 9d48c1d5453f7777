"""Images of the Python API: sequences of PIL images, and tensors of pixels."""

from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import TypeAlias, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmfm import data
from mmfm.infra.pictures import image_grid

_SHOWN = 64
"""Number of images of a set that a notebook shows."""


class Images(Sequence[Image.Image]):
    """A sequence of PIL images, shown as a grid in a notebook.

    Indexing with a number returns a PIL image, with a slice ``Images``.

    Attributes:
        tensor: (n, 3, S, S) uint8 on the CPU.
        modes: (n,) int64 on the CPU, the mode of each image; None if the images have no modes (a Gaussian source,
            interpolated or decoded images).
    """

    def __init__(self, tensor: Tensor, modes: Tensor | None = None) -> None:
        self.tensor = tensor.cpu()
        self.modes = None if modes is None else modes.cpu()

    def __len__(self) -> int:
        return len(self.tensor)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> "Images": ...

    def __getitem__(self, index: int | slice) -> "Image.Image | Images":
        if isinstance(index, slice):
            return Images(self.tensor[index], None if self.modes is None else self.modes[index])
        return Image.fromarray(self.tensor[index].permute(1, 2, 0).numpy())

    def grid(self, columns: int | None = None, upscale: int | None = None) -> Image.Image:
        """Arrange the images in one picture; see :func:`mmfm.infra.pictures.image_grid`."""
        return image_grid(self.tensor, columns, upscale)

    def __repr__(self) -> str:
        n, _, height, width = self.tensor.shape
        return f"<{n} images of {height} x {width} pixels>"

    def _repr_png_(self) -> bytes | None:
        if len(self) == 0:
            return None
        buffer = BytesIO()
        self[:_SHOWN].grid().save(buffer, "PNG")
        return buffer.getvalue()


ImageInput: TypeAlias = Images | Image.Image | Sequence[Image.Image] | Tensor
"""One image or several: PIL images of any size and mode, or tensors (3, S, S) or (n, 3, S, S), uint8 or float in
[0, 1]."""


def pixels(images: ImageInput, size: int | None = None) -> Tensor:
    """Convert images to one tensor (n, 3, S, S), uint8 or float32 in [0, 1]; tensors stay on their device.

    Args:
        size: S. PIL images are resized and cropped to it like the training images; tensors must have it. None: all
            images must have the same size, which is kept.

    Raises:
        ValueError: no images, values of another type, images of different sizes, or a tensor of the wrong shape, dtype
            or range.
    """
    if isinstance(images, Images):
        images = images.tensor
    if not isinstance(images, Tensor):
        images = _stacked([images] if isinstance(images, Image.Image) else images, size)
    images = images[None] if images.ndim == 3 else images
    wanted = "S" if size is None else size
    square = (
        images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3] == (size or images.shape[2])
    )
    if not square or not len(images) or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(
            f"images are {tuple(images.shape)} {images.dtype}; give at least one, (n, 3, {wanted}, {wanted}) uint8 or "
            "float in [0, 1], or PIL images"
        )
    if images.is_floating_point():
        images = images.float()
        if not (images.amin() >= 0 and images.amax() <= 1):
            raise ValueError(
                f"pixels range from {float(images.amin()):g} to {float(images.amax()):g}; floats must be in [0, 1]"
            )
    return images


def _stacked(images: Sequence[Image.Image], size: int | None) -> Tensor:
    """Stack PIL images to (n, 3, S, S) uint8."""
    images = [images] if isinstance(images, str) or not isinstance(images, Iterable) else list(images)
    for image in images:
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"images are of type {type(image).__name__}; give PIL images (`PIL.Image.open(path)` opens a file), "
                "or a tensor"
            )
    converted = [data.as_rgb(image) for image in images]
    if size is not None:
        converted = [data.center_crop(image, size) for image in converted]
    sizes = {image.size for image in converted}
    if len(sizes) != 1:
        raise ValueError(f"images have sizes {sorted(sizes)}; give at least one, all of the same size")
    return torch.from_numpy(np.stack([np.asarray(image) for image in converted])).permute(0, 3, 1, 2).contiguous()
