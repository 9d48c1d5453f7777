"""Which files of a folder are images, by their names alone. Nothing here opens one, or imports PyTorch."""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""Of the files that are images; upper case counts as lower case."""

OTHER_PICTURES = (".gif", ".heic", ".heif", ".avif", ".jxl", ".svg", ".psd", ".raw", ".cr2", ".nef", ".dng", ".arw")
"""Pictures in formats that are not read: worth a word, where a text file is not."""

_FIRST_BYTES = 200


def why_ignored(name: str) -> str:
    """Return why a file is not an image, as a class of files to count; empty if it is one."""
    if name.startswith("."):
        return "hidden"
    if name.lower().endswith(EXTENSIONS):
        return ""
    return Path(name).suffix.lower() or "without extension"


def spell(ignored: Mapping[str, int]) -> str:
    """Return counts of ignored files as text, the commonest first, with a word on pictures that can't be read."""
    order = sorted(ignored, key=lambda reason: (-ignored[reason], reason))
    text = ", ".join(f"{ignored[reason]:,} {reason}" for reason in order)
    pictures = [reason for reason in order if reason in OTHER_PICTURES]
    return f"{text} (to use the {' and '.join(pictures)} pictures, convert them to PNG)" if pictures else text


def count(root: str | Path, most: int = 100_000, seconds: float = 1.0) -> tuple[int, float] | None:
    """Count the images below a folder quickly.

    Args:
        most: files to look at.
        seconds: to spend.

    Returns:
        Number of images and the mean size in bytes of the first 200; None without any, or if there are too many files
        to count.
    """
    found, looked, end = 0, 0, time.monotonic() + seconds
    sizes: list[int] = []
    try:
        for entry in _files(root):
            looked += 1
            if looked > most or time.monotonic() > end:
                return None
            if why_ignored(entry.name):
                continue
            found += 1
            if len(sizes) < _FIRST_BYTES:
                sizes.append(entry.stat(follow_symlinks=False).st_size)
    except OSError:
        return None  # the stage that lists the folder says what is wrong
    return (found, sum(sizes) / len(sizes)) if found else None


def _files(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from _files(entry.path)
            else:
                yield entry
