"""Images: the listing, the crop, and batches by global index."""

import contextlib
import hashlib
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from mmfm.infra import store
from mmfm.infra.progress import Progress

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")

# A truncated file is an error that names it, never a picture with a grey half.
ImageFile.LOAD_TRUNCATED_IMAGES = False


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

    The choice hangs on the path alone, so adding or removing an image moves at most one other across the line.

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
            _refuse_float(image)
            image.draft("RGB", (1, 1))  # a JPEG then reads all its data but computes an eighth of each side
            image.load()
    except _UNREADABLE as error:
        return f"'{path}': {error}"
    return ""


_UNREADABLE = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)


def _refuse_float(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; convert it to 8 or 16 bits")


def read_image(path: str | Path) -> Image.Image:
    """Read an image as RGB: EXIF rotation applied, grey, palette, 16-bit, CMYK and transparent images converted.

    Transparency is laid over white; 16-bit values are divided by 257 and rounded.

    Raises:
        ValueError: the file is missing, truncated, no image, or of floating-point pixels; the message names it.
    """
    try:
        with Image.open(path) as image:
            _refuse_float(image)
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey, also where the mode has room for more; convert() would clip
                array = np.asarray(image, np.float32).clip(0, 65535)
                image = Image.fromarray((array / 257).round().astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except _UNREADABLE as error:
        raise ValueError(
            f"cannot read image '{path}': {error}; replace or remove it, then list the images again"
        ) from error


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` pixels and crop the centre square.

    The rule of ADM (Dhariwal and Nichol, "Diffusion models beat GANs on image synthesis", 2021): halve with a box
    filter while the shorter side is at least twice the size, then one bicubic resize.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class _Images(torch.utils.data.Dataset):
    """Cropped images by index of the listing, which every worker opens itself: it is mapped, not copied."""

    def __init__(self, listing: Path, size: int) -> None:
        self.listing_path, self.size = listing, size
        self.listing: Listing | None = None

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        if self.listing is None:
            self.listing = Listing.open(self.listing_path)
        _check_size(self.listing, index)
        image = center_crop(read_image(self.listing.path(index)), self.size)
        return index, torch.from_numpy(np.asarray(image, np.uint8).copy()).permute(2, 0, 1)


def _check_size(listing: Listing, index: int) -> None:
    """Refuse a file that was replaced since the images were listed: no digest would tell."""
    path = listing.path(index)
    if path.is_file() and path.stat().st_size != listing.sizes[index]:
        raise ValueError(
            f"image '{path}' has {path.stat().st_size:,} bytes, but had {listing.sizes[index]:,} when it was listed; "
            "list the images again (snakemake TARGET --cores all -R list_images)"
        )


def _collate(items: list[tuple[int, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([index for index, _ in items]), torch.stack([image for _, image in items])


def _prepare_worker(worker: int) -> None:
    """Give a reading process one thread, and leave the answer to signals for the whole group to the main process."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def image_batches(
    listing: str | Path, size: int, batches: Sequence[Sequence[int]], workers: int = 0, pin: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Read images in given batches of global indices, in order.

    Args:
        listing: a listing file.
        size: side of the crop, pixels.
        batches: indices of each batch; a lazy sequence will do.
        workers: reading processes; they are spawned, because forking after a store was opened can deadlock.

    Yields:
        Indices (B,) int64 and images (B, 3, size, size) uint8.
    """
    loader = torch.utils.data.DataLoader(
        _Images(Path(listing), size),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_prepare_worker,
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)


def to_float(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move uint8 images to ``device`` as float32 in [0, 1]."""
    return images.to(device, non_blocking=True).float().div_(255)


def ranges(start: int, stop: int, step: int) -> list[range]:
    """Cut [start, stop) into consecutive ranges of at most ``step``."""
    return [range(first, min(first + step, stop)) for first in range(start, stop, step)]
