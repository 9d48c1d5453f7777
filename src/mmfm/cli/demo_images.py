"""``mmfm demo_images``: unpack the embedded images."""

import argparse
from pathlib import Path

from mmfm.data.fashion_mnist import unpack


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
    unpack(options.source, options.out)
    return 0
