"""``mmfm list_images``: the sorted listing that numbers the images for every later stage."""

from pathlib import Path

import numpy as np

from mmfm import data
from mmfm.cli.common import StageParser

DESCRIPTION = """\
List an ImageFolder (one subfolder per class; a flat folder is one class), hold some images out, and write the two
listings that number the images for every later stage. Only names and sizes are read; images are opened later, and a
damaged one stops the stage that meets it. With data.unreadable=skip every image is decoded here, and damaged ones get
no row: they are named, counted in the listings' metadata, and no later stage knows of them. That reads the whole folder
(ImageNet: 140 GB) and takes 1.1 ms of a core for a JPEG of 110 KB: 25 minutes for 1.28 million, shared by data.workers.

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
    skipped = 0
    if settings.unreadable == "skip":
        readable = data.find_readable(root, paths, settings.workers)
        skipped = len(paths) - int(readable.sum())
        if missing := sorted(set(labels.tolist()) - set(labels[readable].tolist())):
            raise ValueError(
                f"no readable image in class folder '{classes[missing[0]]}' of '{root}'; mend or remove it"
            )
        rows = np.flatnonzero(readable)
        paths, labels, sizes = [paths[row] for row in rows], labels[rows], sizes[rows]
        print(f"list_images: {skipped:,} unreadable images left out")
    heldout = data.choose_heldout(paths, settings.holdout, settings.seed)
    for path, split, chosen in ((options.train, "train", ~heldout), (options.heldout, "heldout", heldout)):
        rows = np.flatnonzero(chosen)
        chosen_paths = [paths[row] for row in rows]
        digest = data.write_listing(path, root, split, classes, chosen_paths, labels[rows], sizes[rows], skipped)
        print(f"list_images: {len(rows):,} {split} images in {len(classes):,} classes, digest {digest[:12]}")
    return 0
