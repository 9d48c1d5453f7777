"""``list_images``: the sorted listing that numbers the images for every later stage.

Reads the image folder: names and sizes; with ``data.unreadable: skip`` every image is decoded. Writes
``listing.train.safetensors`` and ``listing.heldout.safetensors``. There is nothing to resume: a kill leaves no output.
"""

from pathlib import Path

import numpy as np

from mmfm import data
from mmfm.config import StageConfig


def list_images(config: StageConfig, root: Path, train: Path, heldout: Path) -> None:
    """Scan an ImageFolder, hold some images out, and write both listings.

    Raises:
        FileNotFoundError: ``root`` is no folder.
        ValueError: no images, a class folder without any, or more held out than there are.
    """
    settings, skipped = config.data, 0
    classes, paths, labels, sizes = data.scan(root)
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
    held = data.choose_heldout(paths, settings.holdout, settings.seed)
    for path, split, chosen in ((train, "train", ~held), (heldout, "heldout", held)):
        rows = np.flatnonzero(chosen)
        chosen_paths = [paths[row] for row in rows]
        digest = data.write_listing(path, root, split, classes, chosen_paths, labels[rows], sizes[rows], skipped)
        print(f"list_images: {len(rows):,} {split} images in {len(classes):,} classes, digest {digest[:12]}")
