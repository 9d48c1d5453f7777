"""One image: read as RGB, cropped to a square."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

# A truncated file is an error that names it, never a picture with a grey half.
ImageFile.LOAD_TRUNCATED_IMAGES = False


UNREADABLE = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)


def refuse_float(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; convert it to 8 or 16 bits")


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB: EXIF rotation applied, grey, palette, 16-bit, CMYK and transparent images converted.

    Transparency is laid over white; 16-bit values are divided by 257 and rounded.

    Raises:
        ValueError: floating-point pixels.
    """
    refuse_float(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, also where the mode has room for more; convert() would clip
        array = np.asarray(image, np.float32).clip(0, 65535)
        image = Image.fromarray((array / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(path: str | Path) -> Image.Image:
    """Read an image as RGB; see :func:`as_rgb`.

    Raises:
        ValueError: the file is missing, truncated, no image, or of floating-point pixels; the message names it.
    """
    try:
        with Image.open(path) as image:
            return as_rgb(image)
    except UNREADABLE as error:
        raise ValueError(
            f"cannot read image '{path}': {error}; replace or remove it, then list the images again"
        ) from error


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` pixels and crop the centre square.

    The rule of ADM (Dhariwal and Nichol, "Diffusion models beat GANs on image synthesis", 2021): halve with a box
    filter while the shorter side is at least twice the size, then one bicubic resize.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
