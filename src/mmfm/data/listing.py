"""The listing: which images there are, in which order, and which of them are held out."""

import contextlib
import hashlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmfm.data.images import UNREADABLE, refuse_float
from mmfm.infra import store
from mmfm.infra.progress import Progress

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Listing:
    """The sorted images of an ImageFolder, memory-mapped.

    Attributes:
        root: folder that the paths are relative to.
        classes: names of the class folders; ``labels`` index them.
        labels: (N,) int32.
        sizes: (N,) int64, file sizes in bytes.
        digest: SHA-256 over paths, labels and sizes; every per-image array stores it.
        split: ``train`` or ``heldout``.
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
        """Return the path of image ``index`` below the root."""
        start, stop = self.path_offsets[index : index + 2]
        return self.path_bytes[start:stop].tobytes().decode("utf-8", "surrogateescape")

    def path(self, index: int) -> Path:
        """Return the full path of image ``index``."""
        return self.root / self.relative_path(index)

    @classmethod
    def open(cls, path: str | Path) -> "Listing":
        """Open a listing that :func:`write_listing` made; see :func:`mmfm.infra.store.map_arrays` for errors."""
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
            raise ValueError(f"'{path}' is no listing (it has no {error}); make it with list_images") from error


def scan(root: str | Path) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """List the images below ``root``, sorted by class folder, then path.

    A folder without subfolders is one class. Files that are no images by their extension are left out.

    Returns:
        Class names, relative paths, labels (N,) int32 and file sizes (N,) int64.

    Raises:
        FileNotFoundError: ``root`` is no folder.
        ValueError: no images, or a class folder without any.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root '{root}' is no folder; set it to an ImageFolder (one subfolder per class)")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if classes and (loose := next(_images_below(root, "", deep=False), None)):
        raise ValueError(
            f"'{root}' has both class folders ({classes[0]}, ...) and images of its own ({loose[0]}, ...); "
            "move the images into a class folder, or the folders elsewhere"
        )
    paths: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    for label, name in enumerate(classes or [""]):
        found = sorted(_images_below(root / name, name))
        if not found:
            raise ValueError(
                f"no images in '{root / name}' (looked for {', '.join(EXTENSIONS)}); add some or remove it"
            )
        paths += [path for path, _ in found]
        sizes += [size for _, size in found]
        labels += [label] * len(found)
    return classes or [root.name], paths, np.array(labels, np.int32), np.array(sizes, np.int64)


def _images_below(folder: Path, prefix: str, deep: bool = True) -> Iterator[tuple[str, int]]:
    for entry in os.scandir(folder):
        relative = f"{prefix}/{entry.name}" if prefix else entry.name
        if entry.is_dir():
            if deep:
                yield from _images_below(Path(entry.path), relative)
        elif entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith("."):
            yield relative, entry.stat().st_size


def choose_heldout(paths: Sequence[str], count: int, seed: int) -> np.ndarray:
    """Choose the held-out images: those whose hashed paths are the smallest.

    The choice depends on the path alone, so adding or removing an image moves at most one other across the line.

    Returns:
        (N,) bool, True for held-out images.
    """
    if count >= len(paths):
        raise ValueError(f"data.holdout is {count}, but there are only {len(paths)} images; lower it")
    keys = [hashlib.sha256(f"{seed}/{path}".encode("utf-8", "surrogateescape")).digest() for path in paths]
    chosen = np.zeros(len(paths), bool)
    chosen[sorted(range(len(paths)), key=keys.__getitem__)[:count]] = True
    return chosen


def write_listing(
    path: str | Path, root: str | Path, split: str, classes: list[str], paths: list[str], labels: np.ndarray,
    sizes: np.ndarray, skipped: int = 0,
) -> str:  # fmt: skip
    """Write a listing and return its digest; layout in docs/stages.md.

    Args:
        labels: (N,) int32.
        sizes: (N,) int64, bytes.
        skipped: files left out of the folder as unreadable, a note.
    """
    encoded = [p.encode("utf-8", "surrogateescape") for p in paths]
    offsets = np.zeros(len(paths) + 1, np.int64)
    np.cumsum([len(p) for p in encoded], out=offsets[1:])
    arrays = {
        "path_bytes": np.frombuffer(b"".join(encoded), np.uint8),
        "path_offsets": offsets,
        "labels": labels.astype(np.int32),
        "sizes": sizes.astype(np.int64),
    }
    metadata = {"root": str(Path(root).absolute()), "split": split, "classes": classes, "skipped": skipped}
    return store.write_arrays(path, arrays, metadata)


def find_readable(root: str | Path, paths: Sequence[str], workers: int = 0) -> np.ndarray:
    """Decode every image and say which ones :func:`read_image` will read.

    Args:
        root: folder that ``paths`` are relative to.
        workers: processes; 0 decodes here. Their number changes nothing.

    Returns:
        (N,) bool. The others are named on standard error.
    """
    readable = np.ones(len(paths), bool)
    files = [Path(root) / path for path in paths]
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress("list_images", len(files), "images"))
        if workers:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers))
            faults = pool.imap(_fault, files, chunksize=64)
        else:
            faults = map(_fault, files)
        for index, fault in enumerate(faults):
            if fault:
                readable[index] = False
                progress.say(f"left out: {fault}")
            progress.advance()
    return readable


def _fault(path: Path) -> str:
    """Why an image can't be read; empty if it can."""
    try:
        with Image.open(path) as image:
            refuse_float(image)
            image.draft("RGB", (1, 1))  # a JPEG then reads all its data but computes an eighth of each side
            image.load()
    except UNREADABLE as error:
        return f"'{path}': {error}"
    return ""
