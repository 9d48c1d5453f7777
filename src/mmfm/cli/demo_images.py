"""``mmfm demo_images``: unpack the embedded images."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from mmfm.demo import CLASSES, read_idx
from mmfm.infra import store
from mmfm.infra.progress import Progress

_BORDER = 2


def main(arguments: list[str]) -> int:
    """Write an ImageFolder of grey 32x32 PNGs, one folder per class."""
    parser = argparse.ArgumentParser(
        prog="mmfm demo_images",
        description="Unpack Fashion-MNIST's 10,000 test images into an ImageFolder of PNGs: ten class folders, 28x28 "
        "images with a black border of two pixels.",
    )
    parser.add_argument("--source", type=Path, required=True, help="folder with the two t10k idx files")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    options = parser.parse_args(arguments)
    images = read_idx(options.source / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(options.source / "t10k-labels-idx1-ubyte.gz")
    images = np.pad(images, ((0, 0), (_BORDER, _BORDER), (_BORDER, _BORDER)))
    partial = options.out.with_name(f".{options.out.name}.partial")
    for name in CLASSES:
        (partial / name).mkdir(parents=True, exist_ok=True)
    with Progress("demo_images", len(images), "images") as progress:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            # Small files: the fastest compression is within a few percent of the best.
            Image.fromarray(image).save(partial / CLASSES[label] / f"{index:05d}.png", compress_level=1)
            progress.advance()
    store.publish_directory(partial, options.out)
    return 0
