"""``list_images``: the sorted listings, which number the images for all later stages.

Reads: the names and sizes of the files in the image folder, and in ``data.heldout_root``; with ``data.unreadable:
    skip`` it also decodes every image. ``data.limit`` chooses from what the folder holds, before damaged images are
    left out and others held out.
Writes: ``listing.train.safetensors`` and ``listing.heldout.safetensors``.
Unit of work: none; there is nothing to resume.
After a kill: no output, or whole listings.
"""

import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmfm import data
from mmfm.config import StageConfig
from mmfm.config.sections import Data
from mmfm.infra import image_files


@dataclass(frozen=True)
class _Images:
    """Images of a folder.

    Attributes:
        root: the folder.
        classes: names of all class folders, also of those without images here.
        paths: (N,), relative to ``root``.
        labels: (N,) int32, index in ``classes``.
        sizes: (N,) int64, bytes.
        skipped: number of unreadable files that were left out.
    """

    root: Path
    classes: list[str]
    paths: list[str]
    labels: np.ndarray
    sizes: np.ndarray
    skipped: int = 0

    def only(self, chosen: np.ndarray) -> "_Images":
        """Return the images that a mask (N,) bool chooses."""
        rows = np.flatnonzero(chosen)
        return replace(self, paths=[self.paths[row] for row in rows], labels=self.labels[rows], sizes=self.sizes[rows])

    @property
    def flat(self) -> bool:
        """Whether the folder has no class folders."""
        return self.classes == [self.root.name] and not (self.root / self.root.name).is_dir()


def list_images(config: StageConfig, root: Path, train: Path, heldout: Path) -> None:
    """Scan an image folder, hold some images out or scan the folder of held-out ones, and write both listings.

    Raises:
        FileNotFoundError: ``root`` or ``data.heldout_root`` is not a folder.
        ValueError: there are no images, a class folder has none, ``data.holdout`` exceeds their number or takes all
            that ``data.limit`` left of a class, or a file can't be accessed and ``data.unreadable`` is not ``skip``;
            ``data.heldout_root`` and ``root`` overlap, or have other classes.
    """
    section = config.data
    limited = section.limit.images < 1 or section.limit.classes < 1
    images = _found(root, section, "data.root", limited)
    held = data.choose_heldout(images.paths, section.holdout, section.seed)
    kept = images.only(~held)
    if limited and (emptied := sorted(set(images.labels.tolist()) - set(kept.labels.tolist()))):
        raise ValueError(
            f"data.holdout {section.holdout} takes all images that data.limit leaves of class "
            f"'{images.classes[emptied[0]]}'; lower data.holdout or raise data.limit.images"
        )
    others = _given_heldout(images, section) if section.heldout_root else images.only(held)
    for path, split, part in ((train, "train", kept), (heldout, "heldout", others)):
        digest = data.write_listing(
            path, part.root, split, part.classes, part.paths, part.labels, part.sizes, part.skipped
        )
        print(f"list_images: {len(part.paths):,} {split} images in {len(part.classes):,} classes, digest {digest[:12]}")


def _found(root: Path, section: Data, key: str, limited: bool = False) -> _Images:
    """Return the images of a folder, without those that ``data.limit`` (if ``limited``) and ``unreadable`` leave out.

    Args:
        key: what names the folder in the configuration.
    """
    ignored: Counter[str] = Counter()
    lost: list[str] = []
    skip = section.unreadable == "skip"
    images = _Images(root, *data.scan(root, ignored, lost if skip else None, key))
    if ignored:
        print(f"list_images: ignored files: {image_files.spell(ignored)}")
    if limited:
        limit, count = section.limit, len(images.paths)
        images = images.only(data.choose_limited(images.labels, limit.images, limit.classes, limit.seed))
        print(
            f"list_images: data.limit keeps {len(images.paths):,} of {count:,} images in "
            f"{len(np.unique(images.labels)):,} classes"
        )
    if not skip:
        return images
    for what in lost:
        print(f"list_images: left out: {what}", file=sys.stderr)
    readable = data.find_readable(root, images.paths, section.workers)
    skipped = len(lost) + len(images.paths) - int(readable.sum())
    if missing := sorted(set(images.labels.tolist()) - set(images.labels[readable].tolist())):
        raise ValueError(
            f"no readable image in class folder '{images.classes[missing[0]]}' of '{root}'; repair or remove it"
        )
    print(f"list_images: {skipped:,} unreadable image{'s' * (skipped != 1)} left out")
    return replace(images.only(readable), skipped=skipped)


def _given_heldout(images: _Images, section: Data) -> _Images:
    """Return the images of ``data.heldout_root``, labelled as the training images.

    Classes may be missing. Classes that ``data.limit`` leaves no training images are left out.

    Raises:
        FileNotFoundError: it is not a folder.
        ValueError: it overlaps with the training folder, or has classes that this lacks.
    """
    root = Path(section.heldout_root)
    ours, theirs = images.root.resolve(), root.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        relation = "is" if ours == theirs else "lies in" if ours in theirs.parents else "contains"
        raise ValueError(
            f"data.heldout_root '{root}' {relation} data.root '{images.root}', so that held-out images would be "
            "training images; set it to a folder elsewhere, or use data.holdout"
        )
    found = _found(root, section, "data.heldout_root")
    if images.flat != found.flat:
        lacks, has = (found, images) if found.flat else (images, found)
        raise ValueError(
            f"'{lacks.root}' has no class folders, but '{has.root}' has ({has.classes[0]}, ...); give "
            "data.heldout_root the layout of data.root"
        )
    if unknown := [] if found.flat else sorted(set(found.classes) - set(images.classes)):
        raise ValueError(
            f"data.heldout_root '{root}' has the class folder '{unknown[0]}' ({len(unknown)} such), which data.root "
            f"'{images.root}' lacks; rename or remove it"
        )
    number = {name: label for label, name in enumerate(images.classes)}
    labels = np.array([0 if found.flat else number[name] for name in found.classes], np.int32)[found.labels]
    whole = replace(found, classes=images.classes, labels=labels)
    return whole.only(np.isin(labels, images.labels))
