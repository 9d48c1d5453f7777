"""``mmfm demo_images``: unpack the demo's images."""

import argparse
from pathlib import Path

from mmfm.data.fashion_mnist import unpack


def main(arguments: list[str]) -> int:
    """Write a folder of grey 32x32 PNG images, one subfolder per class."""
    parser = argparse.ArgumentParser(
        prog="mmfm demo_images",
        description="Unpack Fashion-MNIST's 10,000 test images as PNG files: one folder per class; images of 28x28 "
        "pixels with a black border of two pixels.",
    )
    parser.add_argument(
        "--source",
        type=Path,
        required=True,
        help="folder with the two t10k idx files, such as resources/demo/fashion-mnist",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    options = parser.parse_args(arguments)
    unpack(options.source, options.out)
    return 0
