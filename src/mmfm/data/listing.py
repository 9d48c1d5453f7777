"""The listing: which images there are, in which order, and which are held out of training."""

import contextlib
import hashlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmfm.data.images import UNREADABLE, refuse_float
from mmfm.infra import store
from mmfm.infra.image_files import EXTENSIONS, why_ignored
from mmfm.infra.progress import Progress


@dataclass(frozen=True)
class Listing:
    """The sorted images of an ImageFolder, memory-mapped.

    Attributes:
        root: folder that the paths are relative to.
        classes: names of the class folders, indexed by ``labels``.
        labels: (N,) int32.
        sizes: (N,) int64, file sizes in bytes.
        digest: SHA-256 of the paths, labels and sizes; every per-image array stores it.
        split: ``train`` or ``heldout``.
        path_bytes: uint8, all relative paths joined.
        path_offsets: (N + 1,) int64, where each path starts in ``path_bytes``.
    """

    root: Path
    classes: tuple[str, ...]
    labels: np.ndarray
    sizes: np.ndarray
    digest: str
    split: str
    path_bytes: np.ndarray
    path_offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def relative_path(self, index: int) -> str:
        """Return the path of image ``index`` relative to the root."""
        start, stop = self.path_offsets[index : index + 2]
        return self.path_bytes[start:stop].tobytes().decode("utf-8", "surrogateescape")

    def path(self, index: int) -> Path:
        """Return the full path of image ``index``."""
        return self.root / self.relative_path(index)

    @classmethod
    def open(cls, path: str | Path) -> "Listing":
        """Open a listing written by :func:`write_listing`; errors as in :func:`mmfm.infra.store.map_arrays`."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no listing at '{path}'; make one with list_images")
        arrays, metadata = store.map_arrays(path)
        try:
            return cls(
                root=Path(metadata["root"]),
                classes=tuple(metadata["classes"]),
                labels=arrays["labels"],
                sizes=arrays["sizes"],
                digest=metadata["digest"],
                split=metadata["split"],
                path_bytes=arrays["path_bytes"],
                path_offsets=arrays["path_offsets"],
            )
        except KeyError as error:
            raise ValueError(f"'{path}' is not a listing (it lacks {error}); make one with list_images") from error


def scan(
    root: str | Path, ignored: Counter[str] | None = None, lost: list[str] | None = None, key: str = "data.root"
) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """List the images below ``root``, sorted by class folder, then by path.

    A folder without subfolders is a single class. Files are recognised as images by their extension (``EXTENSIONS``).

    Args:
        ignored: counts the ignored files by reason; see :func:`mmfm.infra.image_files.why_ignored`.
        lost: collects dangling links and files or folders that vanished or can't be accessed, with the reason. If None,
            these are errors.
        key: what names the folder in the configuration.

    Returns:
        Class names, relative paths, labels (N,) int32 and file sizes (N,) int64.

    Raises:
        FileNotFoundError: ``root`` is not a folder.
        ValueError: a class has no images, there are images beside the class folders, or see ``lost``.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{key} '{root}' is not a folder; set it to one with a subfolder per class")
    ignored = Counter() if ignored is None else ignored
    top = list(os.scandir(root))
    classes = sorted(entry.name for entry in top if entry.is_dir() and not entry.name.startswith("."))
    if classes:
        loose = min((e.name for e in top if not e.is_dir() and not _why_ignored(e, ignored)), default="")
        if loose:
            raise ValueError(
                f"'{root}' contains both class folders ({classes[0]}, ...) and images ({loose}, ...); "
                "move the images into a class folder, or the folders elsewhere"
            )
    paths: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    for label, name in enumerate(classes or [""]):
        found = sorted(_images_below(root / name, name, ignored, lost))
        if not found:
            raise ValueError(
                f"no images in '{root / name}' (looked for {', '.join(EXTENSIONS)}); add some or remove it"
            )
        paths += [path for path, _ in found]
        sizes += [size for _, size in found]
        labels += [label] * len(found)
    return classes or [root.name], paths, np.array(labels, np.int32), np.array(sizes, np.int64)


def _images_below(
    folder: Path, prefix: str, ignored: Counter[str], lost: list[str] | None
) -> Iterator[tuple[str, int]]:
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        _lose(folder, error, lost)
        return
    for entry in entries:
        relative = f"{prefix}/{entry.name}" if prefix else entry.name
        if entry.is_dir() and not entry.name.startswith("."):
            yield from _images_below(Path(entry.path), relative, ignored, lost)
        elif not _why_ignored(entry, ignored):
            try:
                yield relative, entry.stat().st_size
            except OSError as error:
                _lose(Path(entry.path), error, lost)


def _why_ignored(entry: os.DirEntry[str], ignored: Counter[str]) -> str:
    reason = why_ignored(entry.name)
    if reason:
        ignored[reason] += 1
    return reason


def _lose(path: Path, error: OSError, lost: list[str] | None) -> None:
    """Note a file or folder that can't be accessed, or raise ValueError."""
    reason = "a dangling link" if path.is_symlink() else (error.strerror or "missing").lower()
    if lost is None:
        raise ValueError(
            f"'{path}' can't be accessed ({reason}); repair or remove it, or set data.unreadable to skip"
        ) from error
    lost.append(f"'{path}': {reason}")


def choose_limited(labels: np.ndarray, images: float, classes: float, seed: int) -> np.ndarray:
    """Choose a share of the images of every class, or of some classes, as the published code does.

    One generator, ``RandomState(seed)``, draws max(1, int(C classes)) of the C classes if ``classes`` is below 1, and
    then, class by class in ascending order, max(1, int(n images)) of each class's n images, without replacement.

    Args:
        labels: (N,) class of every image, in [0, C), in the order of an ImageFolder; every class has an image.
        images, classes: shares in (0, 1].

    Returns:
        (N,) bool, True for chosen images.
    """
    generator, kept = np.random.RandomState(seed), np.unique(labels)
    if classes < 1:
        kept = np.sort(generator.choice(kept, max(1, int(len(kept) * classes)), replace=False))
    chosen = np.zeros(len(labels), bool)
    for label in kept:
        rows = np.flatnonzero(labels == label)
        chosen[generator.choice(rows, max(1, int(len(rows) * images)), replace=False)] = True
    return chosen


def choose_heldout(paths: Sequence[str], count: int, seed: int) -> np.ndarray:
    """Choose the ``count`` held-out images: those with the smallest hashes of seed and path.

    Adding or removing an image changes the split of at most one other image.

    Returns:
        (N,) bool, True for held-out images.

    Raises:
        ValueError: no image would be left for training.
    """
    if count >= len(paths):
        raise ValueError(f"data.holdout is {count}, but there are only {len(paths)} images; lower it")
    keys = [hashlib.sha256(f"{seed}/{path}".encode("utf-8", "surrogateescape")).digest() for path in paths]
    chosen = np.zeros(len(paths), bool)
    chosen[sorted(range(len(paths)), key=keys.__getitem__)[:count]] = True
    return chosen


def write_listing(
    path: str | Path,
    root: str | Path,
    split: str,
    classes: list[str],
    paths: list[str],
    labels: np.ndarray,
    sizes: np.ndarray,
    skipped: int = 0,
) -> str:
    """Write a listing and return its digest; the layout is in docs/stages.md.

    Args:
        labels: (N,) int32.
        sizes: (N,) int64, bytes.
        skipped: number of unreadable files that were left out, recorded as a note.
    """
    encoded = [p.encode("utf-8", "surrogateescape") for p in paths]
    offsets = np.zeros(len(paths) + 1, np.int64)
    np.cumsum([len(p) for p in encoded], out=offsets[1:])
    arrays: dict[str, np.ndarray] = {
        "path_bytes": np.frombuffer(b"".join(encoded), np.uint8),
        "path_offsets": offsets,
        "labels": labels.astype(np.int32),
        "sizes": sizes.astype(np.int64),
    }
    metadata = {"root": str(Path(root).absolute()), "split": split, "classes": classes, "skipped": skipped}
    return store.write_arrays(path, arrays, metadata)


def find_readable(root: str | Path, paths: Sequence[str], workers: int = 0) -> np.ndarray:
    """Decode every image to find out which ones :func:`read_image` can read. The others are named on standard error.

    Args:
        root: folder that ``paths`` are relative to.
        workers: decoding processes; 0 decodes in this one.

    Returns:
        (N,) bool, True for readable images.
    """
    readable = np.ones(len(paths), bool)
    files = [Path(root) / path for path in paths]
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress("list_images", len(files), "images"))
        faults: Iterator[str] = map(_fault, files)
        if workers:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers))
            faults = pool.imap(_fault, files, chunksize=64)
        for index, fault in enumerate(faults):
            if fault:
                readable[index] = False
                progress.say(f"left out: {fault}")
            progress.advance()
    return readable


def _fault(path: Path) -> str:
    """Return why an image can't be read, or an empty string if it can."""
    try:
        with Image.open(path) as image:
            refuse_float(image)
            image.draft("RGB", (1, 1))  # a JPEG is then read in full, but decoded at an eighth of its size
            image.load()
    except UNREADABLE as error:
        return f"'{path}': {error}"
    return ""
