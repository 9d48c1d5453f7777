"""What is in a folder of images: counted, opened and timed without stopping at anything that is wrong."""

import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmfm.data.images import UNREADABLE, as_rgb, center_crop, refuse_float
from mmfm.data.loader import evenly
from mmfm.infra.image_files import EXTENSIONS, why_ignored

MOST_OPENED = 5_000
"""Images whose headers are read; of more, so many from all over the folder."""

_LONG = 3.0
_TIMED, _TIMED_SIZE = 24, 128


@dataclass(frozen=True)
class Survey:
    """What a folder of images holds.

    Attributes:
        root: the folder.
        paths: images below it, sorted.
        classes: images of each class folder; the folder itself where it has no subfolders.
        loose: images beside class folders, which a listing refuses.
        extensions: images by extension.
        ignored: other files, by :func:`mmfm.infra.image_files.why_ignored`.
        lost: images and folders that are there by name only, with the reason.
        copies: images of the same name and size in bytes as another one, so probably the same.
        mean_bytes: mean size of an image's file.
        opened: images whose headers were read.
        decoded: images that were decoded as a whole.
        broken: images among them that can't be read, with the reason.
        sides: (n, 2) int64, width and height in pixels of those that can.
        modes: their colours, in Pillow's words (``RGB``, ``L``, ``CMYK``, ...).
        seconds: to read and crop an image, the median of some.
    """

    root: Path
    paths: tuple[str, ...]
    classes: dict[str, int]
    loose: tuple[str, ...]
    extensions: dict[str, int]
    ignored: Counter[str]
    lost: tuple[str, ...]
    copies: int
    mean_bytes: float
    opened: int
    decoded: int
    broken: tuple[str, ...]
    sides: np.ndarray
    modes: Counter[str]
    seconds: float

    @property
    def count(self) -> int:
        """Images that a listing would have, as far as they were opened."""
        return len(self.paths) - len(self.broken)

    @property
    def shorter(self) -> np.ndarray:
        """Shorter sides, (n,) int64, pixels."""
        return self.sides.min(1)

    @property
    def long(self) -> int:
        """Opened images more than three times as long as wide, of which a square crop keeps less than a third."""
        return int((self.sides.max(1) > _LONG * self.shorter).sum())

    def refusal(self) -> str:
        """Return all the reasons why a listing would refuse the folder, with remedies; empty if it would not."""
        return _refusal(self.root, self.paths, self.classes, self.loose)


def _refusal(root: Path, paths: Sequence[str], classes: Mapping[str, int], loose: Sequence[str]) -> str:
    reasons = []
    if loose:
        reasons.append(
            f"'{root}' has both class folders and images of its own ({_some(loose)}); move the images into a class "
            "folder, or the folders elsewhere"
        )
    empty = [str(root / name) for name, images in classes.items() if not images] if paths else [str(root)]
    if empty:
        them = "it" if len(empty) == 1 else "them"
        reasons.append(f"no images in {_some(empty)} (looked for {', '.join(EXTENSIONS)}); add some or remove {them}")
    return "; and ".join(reasons)


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more


def survey(root: str | Path, seconds: float = 5.0) -> Survey:
    """Look at everything below a folder, as :func:`mmfm.data.scan` would list it.

    No image of a folder that a listing would refuse is opened: that would only delay the refusal.

    Args:
        seconds: to spend on decoding images; those that are left are only opened.

    Raises:
        FileNotFoundError: ``root`` is not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"'{root}' is not a folder; give a folder of images, best with one subfolder per class")
    walk = _Walk()
    files = sorted(walk.images(root, ""))
    top = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    owners = Counter(path.split("/")[0] for path, _ in files if "/" in path)
    loose = tuple(path for path, _ in files if "/" not in path) if top else ()
    paths = tuple(path for path, _ in files)
    twins = Counter((Path(path).name, size) for path, size in files)
    classes = {name: owners[name] for name in top} or {root.resolve().name: len(paths)}
    looks = _Looks() if _refusal(root, paths, classes, loose) else _look(root, paths, seconds)
    return Survey(
        root=root,
        paths=paths,
        classes=classes,
        loose=loose,
        extensions=dict(Counter(Path(path).suffix.lower() for path in paths).most_common()),
        ignored=walk.ignored,
        lost=tuple(walk.lost),
        copies=sum(times - 1 for times in twins.values()),
        mean_bytes=statistics.fmean(size for _, size in files) if files else 0.0,
        opened=looks.opened,
        decoded=looks.decoded,
        broken=tuple(looks.broken),
        sides=np.array(looks.sides, np.int64).reshape(-1, 2),
        modes=looks.modes,
        seconds=_seconds_per_image(root, looks.readable),
    )


class _Walk:
    """Walks a folder once and counts what is not an image."""

    def __init__(self) -> None:
        self.ignored: Counter[str] = Counter()
        self.lost: list[str] = []

    def images(self, folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
        """Yield relative path and size in bytes of every image below ``folder``."""
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            self.lost.append(f"'{folder}': {error.strerror}")
            return
        for entry in entries:
            relative = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_dir() and not entry.name.startswith("."):
                yield from self.images(Path(entry.path), relative)
            elif reason := why_ignored(entry.name):
                self.ignored[reason] += 1
            elif not entry.is_file():
                self.lost.append(f"'{entry.path}': {'a dangling link' if entry.is_symlink() else 'no regular file'}")
            else:
                yield relative, entry.stat().st_size


class _Looks:
    """What opening some images showed."""

    def __init__(self) -> None:
        self.opened = self.decoded = 0
        self.broken: list[str] = []
        self.readable: list[str] = []
        self.sides: list[tuple[int, int]] = []
        self.modes: Counter[str] = Counter()


def _spread(items: Sequence[str], most: int) -> list[str]:
    """Return at most so many items from all over a sequence, in their order."""
    return [items[i] for i in evenly(len(items), most)]


def _look(root: Path, paths: Sequence[str], seconds: float) -> _Looks:
    """Open images, and decode as many of them as time allows, from all over the folder."""
    looks, chosen, end = _Looks(), _spread(paths, MOST_OPENED), time.monotonic() + seconds
    # Every 97th first, then those beside them, so that those decoded before time is up are spread as well.
    order = sorted(range(len(chosen)), key=lambda i: (i % 97, i))
    for path in (chosen[i] for i in order):
        looks.opened += 1
        try:
            with Image.open(root / path) as image:
                refuse_float(image)
                size, mode = image.size, image.mode
                if time.monotonic() < end:
                    image.draft("RGB", (1, 1))  # a JPEG then reads all its data but computes an eighth of each side
                    image.load()
                    looks.decoded += 1
        except UNREADABLE as error:
            looks.broken.append(f"'{root / path}': {error}")
            continue
        looks.readable.append(path)
        looks.sides.append(size)
        looks.modes[mode] += 1
    return looks


def _seconds_per_image(root: Path, paths: Sequence[str]) -> float:
    """Time reading and cropping some images; the median is not misled by what else runs."""
    times = []
    for path in _spread(paths, _TIMED):
        start = time.perf_counter()
        try:
            with Image.open(root / path) as image:
                center_crop(as_rgb(image), _TIMED_SIZE)
        except UNREADABLE:
            continue  # its header was sound and it was not decoded before
        times.append(time.perf_counter() - start)
    return statistics.median(times) if times else 0.0


def pictures(looked: Survey, most: int = 64, side: int = 96) -> np.ndarray:
    """Return images from all over the folder, (n, 3, side, side) uint8, those left out that can't be read."""
    shown = []
    for path in _spread(looked.paths, most):
        try:
            with Image.open(looked.root / path) as image:
                shown.append(np.asarray(center_crop(as_rgb(image), side), np.uint8).transpose(2, 0, 1))
        except UNREADABLE:
            continue
    return np.stack(shown) if shown else np.empty((0, 3, side, side), np.uint8)
