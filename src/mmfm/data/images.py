"""Reading an image as RGB and cropping it to a square."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

# Pillow would otherwise fill the missing part of a truncated file with grey.
ImageFile.LOAD_TRUNCATED_IMAGES = False

UNREADABLE = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Errors that Pillow raises for files it can't decode."""


def refuse_float(image: Image.Image) -> None:
    """Raise ValueError if the pixels are floating-point numbers."""
    if image.mode == "F":
        raise ValueError("the range of floating-point pixels is unknown; convert the image to 8 or 16 bits")


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert a grey, palette, 16-bit, CMYK or transparent image to RGB, and apply its EXIF rotation.

    Transparent images are composited onto white; 16-bit values are divided by 257 and rounded.

    Raises:
        ValueError: the pixels are floating-point numbers.
    """
    refuse_float(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow may open as 32-bit; convert() would clip it
        array = np.asarray(image, np.float32).clip(0, 65535)
        image = Image.fromarray((array / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(path: str | Path) -> Image.Image:
    """Read an image as RGB; see :func:`as_rgb`.

    Raises:
        ValueError: the file is missing, truncated, not an image, or has floating-point pixels.
    """
    try:
        with Image.open(path) as image:
            return as_rgb(image)
    except UNREADABLE as error:
        raise ValueError(
            f"cannot read image '{path}': {error}; replace or remove it, then list the images again"
        ) from error


def crop_generated(images: np.ndarray, size: int) -> np.ndarray:
    """Crop images (n, S, S, 3) uint8 as files are cropped to ``size`` pixels: (n, size, size, 3)."""
    if images.shape[1] == size:
        return images
    return np.stack([np.asarray(center_crop(Image.fromarray(image), size)) for image in images])


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` pixels and crop the central square.

    As in ADM (Dhariwal and Nichol 2021, "Diffusion models beat GANs on image synthesis"), the image is halved with a
    box filter while its shorter side is at least twice ``size``, and then resized once with a bicubic filter.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
