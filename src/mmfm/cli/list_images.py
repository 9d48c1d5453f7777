"""``mmfm list_images``: the sorted listing that numbers the images for every later stage."""

from pathlib import Path

import numpy as np

from mmfm import data
from mmfm.cli.common import StageParser

DESCRIPTION = """\
List an ImageFolder (one subfolder per class; a flat folder is one class), hold some images out, and write the two
listings that number the images for every later stage. Only names and sizes are read; images are opened later.

  mmfm list_images --config config/config.yaml --train listing.train.safetensors \\
      --heldout listing.heldout.safetensors data.root=photos

A changed folder is noticed when this command runs again (snakemake TARGET --cores all -R list_images): another digest
makes every later stage start afresh."""


def main(arguments: list[str]) -> int:
    """Scan, split, write."""
    parser = StageParser("list_images", DESCRIPTION)
    parser.add_argument("--root", nargs="?", help="the ImageFolder (default: data.root)")
    parser.add_argument("--train", type=Path, required=True, help="listing of the training images (output)")
    parser.add_argument("--heldout", type=Path, required=True, help="listing of the held-out images (output)")
    options, sections = parser.parse(arguments)
    settings = sections["data"]
    root = options.root or settings.root
    classes, paths, labels, sizes = data.scan(root)
    heldout = data.choose_heldout(paths, settings.holdout, settings.seed)
    for path, split, chosen in ((options.train, "train", ~heldout), (options.heldout, "heldout", heldout)):
        rows = np.flatnonzero(chosen)
        chosen_paths = [paths[row] for row in rows]
        digest = data.write_listing(path, root, split, classes, chosen_paths, labels[rows], sizes[rows])
        print(f"list_images: {len(rows):,} {split} images in {len(classes):,} classes, digest {digest[:12]}")
    return 0
