"""Fashion-MNIST, the data of the embedded demo, read from its original idx files."""

import gzip
import math
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from mmfm.infra import store
from mmfm.infra.progress import Progress

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
"""Class names of the labels 0 to 9."""

_IDX_UINT8 = 0x08
_BORDER = 2


def read_idx(path: str | Path) -> np.ndarray:
    """Read an idx file of unsigned bytes, plain or gzip-compressed.

    The format is described at http://yann.lecun.com/exdb/mnist/.

    Returns:
        uint8 array of the shape in the file's header: (N, H, W) for images, (N,) for labels.

    Raises:
        ValueError: the file is damaged, or is not an idx file of unsigned bytes.
    """
    content = Path(path).read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    if len(content) < 4 or content[:2] != b"\x00\x00" or content[2] != _IDX_UINT8:
        raise ValueError(f"{path}: not an idx file of unsigned bytes (it starts with {content[:4].hex() or 'nothing'})")
    dimensions = content[3]
    header = 4 + 4 * dimensions
    if dimensions == 0 or len(content) < header:
        raise ValueError(f"{path}: the idx header is truncated or has no dimensions; fetch it again")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise ValueError(f"{path}: {len(content) - header} bytes of data do not fill shape {shape}; fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def pad_to_rgb(images: np.ndarray) -> np.ndarray:
    """Add a black border of two pixels to grey images and repeat them over three channels.

    Args:
        images: uint8 (N, 28, 28).

    Returns:
        uint8 (N, 3, 32, 32).

    Raises:
        ValueError: the images have another shape or dtype.
    """
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28):
        raise ValueError(f"expected uint8 images (N, 28, 28), got {images.dtype} {images.shape}")
    padded = np.pad(images, ((0, 0), (_BORDER, _BORDER), (_BORDER, _BORDER)))
    return np.repeat(padded[:, None], 3, axis=1)


def unpack(source: Path, out: Path) -> None:
    """Write the 10,000 test images as an ImageFolder of grey 32x32 PNGs with a black border.

    Args:
        source: folder with the two t10k idx files.
        out: folder to create, with one subfolder per class.
    """
    images = read_idx(source / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(source / "t10k-labels-idx1-ubyte.gz")
    images = np.pad(images, ((0, 0), (_BORDER, _BORDER), (_BORDER, _BORDER)))
    partial = out.with_name(f".{out.name}.partial")
    for name in CLASSES:
        (partial / name).mkdir(parents=True, exist_ok=True)
    with Progress("demo_images", len(images), "images") as progress:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            # For images this small, the fastest compression is within a few percent of the best.
            Image.fromarray(image).save(partial / CLASSES[label] / f"{index:05d}.png", compress_level=1)
            progress.advance()
    store.publish_directory(partial, out)
