"""``list_images``: the sorted listings, which number the images for all later stages.

Reads: the names and sizes of the files in the image folder; with ``data.unreadable: skip`` it also decodes every image.
    ``data.limit`` chooses from what the folder holds, before damaged images are left out and others held out.
Writes: ``listing.train.safetensors`` and ``listing.heldout.safetensors``.
Unit of work: none; there is nothing to resume.
After a kill: no output, or whole listings.
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np

from mmfm import data
from mmfm.config import StageConfig
from mmfm.infra import image_files


def list_images(config: StageConfig, root: Path, train: Path, heldout: Path) -> None:
    """Scan an image folder, hold some images out, and write both listings.

    Raises:
        FileNotFoundError: ``root`` is not a folder.
        ValueError: there are no images, a class folder has none, ``data.holdout`` exceeds their number or takes all
            that ``data.limit`` left of a class, or a file can't be accessed and ``data.unreadable`` is not ``skip``.
    """
    section, skipped, skip = config.data, 0, config.data.unreadable == "skip"
    ignored: Counter[str] = Counter()
    lost: list[str] = []
    classes, paths, labels, sizes = data.scan(root, ignored, lost if skip else None)
    if ignored:
        print(f"list_images: ignored files: {image_files.spell(ignored)}")
    limit, limited = section.limit, section.limit.images < 1 or section.limit.classes < 1
    if limited:
        count, rows = len(paths), np.flatnonzero(data.choose_limited(labels, limit.images, limit.classes, limit.seed))
        paths, labels, sizes = [paths[row] for row in rows], labels[rows], sizes[rows]
        print(f"list_images: data.limit keeps {len(paths):,} of {count:,} images in {len(np.unique(labels)):,} classes")
    if skip:
        for what in lost:
            print(f"list_images: left out: {what}", file=sys.stderr)
        readable = data.find_readable(root, paths, section.workers)
        skipped = len(lost) + len(paths) - int(readable.sum())
        if missing := sorted(set(labels.tolist()) - set(labels[readable].tolist())):
            raise ValueError(
                f"no readable image in class folder '{classes[missing[0]]}' of '{root}'; repair or remove it"
            )
        rows = np.flatnonzero(readable)
        paths, labels, sizes = [paths[row] for row in rows], labels[rows], sizes[rows]
        print(f"list_images: {skipped:,} unreadable images left out")
    held = data.choose_heldout(paths, section.holdout, section.seed)
    if limited and (emptied := sorted(set(labels.tolist()) - set(labels[~held].tolist()))):
        raise ValueError(
            f"data.holdout {section.holdout} takes all images that data.limit leaves of class '{classes[emptied[0]]}'; "
            "lower data.holdout or raise data.limit.images"
        )
    for path, split, chosen in ((train, "train", ~held), (heldout, "heldout", held)):
        rows = np.flatnonzero(chosen)
        chosen_paths = [paths[row] for row in rows]
        digest = data.write_listing(path, root, split, classes, chosen_paths, labels[rows], sizes[rows], skipped)
        print(f"list_images: {len(rows):,} {split} images in {len(classes):,} classes, digest {digest[:12]}")
