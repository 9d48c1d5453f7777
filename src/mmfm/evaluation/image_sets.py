"""Sets of images of any system: an ``.npz`` for the ADM evaluator, a folder of such shards, or a folder of pictures."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfm.data import ranges, read_image
from mmfm.infra import npz, store
from mmfm.infra.image_files import EXTENSIONS

_READERS = 8


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, read when they are needed.

    Attributes:
        path: the file or folder.
        size: width and height, pixels.
    """

    path: Path
    size: tuple[int, int]
    _files: tuple[Path, ...]
    _arrays: tuple[np.ndarray, ...] = ()

    @classmethod
    def open(cls, path: str | Path) -> "ImageSet":
        """Open an ``.npz`` with ``arr_0`` (n, H, W, 3) uint8, a folder of such files, or one of PNG, JPEG and the like.

        Files of a folder and its subfolders are taken in the order of their paths; others than images are ignored, and
        hidden ones, such as macOS's ``._a.png``.

        Raises:
            FileNotFoundError: no such file or folder.
            ValueError: no images, or an ``.npz`` is truncated, has Python objects, or other arrays.
        """
        path = Path(path)
        if path.is_file():
            array = _mapped(path)
            return cls(path, (array.shape[2], array.shape[1]), (path,), (array,))
        if not path.is_dir():
            raise FileNotFoundError(f"no images at '{path}'; give an .npz with arr_0, or a folder of images")
        found = sorted(entry for entry in path.rglob("*") if entry.is_file() and not _is_hidden(entry, path))
        shards = [entry for entry in found if entry.suffix == ".npz"]
        pictures = [entry for entry in found if entry.suffix.lower() in EXTENSIONS]
        if bool(shards) == bool(pictures):
            what = "both .npz files and pictures" if shards else f"no images (looked for .npz, {', '.join(EXTENSIONS)})"
            raise ValueError(f"'{path}' has {what}; give a folder of either")
        if pictures:
            return cls(path, read_image(pictures[0]).size, tuple(pictures))
        arrays = tuple(_mapped(entry) for entry in shards)
        for entry, array in zip(shards, arrays, strict=True):
            if array.shape[1:] != arrays[0].shape[1:]:
                raise ValueError(
                    f"'{entry}' has images {array.shape[1:]}, '{shards[0]}' {arrays[0].shape[1:]}; sizes mix"
                )
        return cls(path, (arrays[0].shape[2], arrays[0].shape[1]), tuple(shards), arrays)

    def __len__(self) -> int:
        return sum(map(len, self._arrays)) if self._arrays else len(self._files)

    def digest(self) -> str:
        """Return the SHA-256 of an ``.npz``, or a fingerprint of the names and contents of a folder's files."""
        if self.path.is_file():
            return store.file_digest(self.path)
        with ThreadPoolExecutor(_READERS) as pool:
            digests = list(pool.map(store.file_digest, self._files))
        names = [str(file.relative_to(self.path)) for file in self._files]
        return store.fingerprint(list(zip(names, digests, strict=True)))

    @property
    def names(self) -> list[str]:
        """Paths of the pictures within the folder, without their extensions; none for arrays."""
        return [] if self._arrays else [str(file.relative_to(self.path).with_suffix("")) for file in self._files]

    def batches(self, rows: range, batch_size: int) -> Iterator[Tensor]:
        """Yield the images ``rows`` in order, (B, 3, H, W) uint8 each.

        Raises:
            ValueError: a file can't be read, or is of another size than the first.
        """
        with ThreadPoolExecutor(_READERS) as pool:
            for part in ranges(rows.start, rows.stop, batch_size):
                if not self._arrays:
                    images = np.stack(list(pool.map(self._read, self._files[part.start : part.stop])))
                else:
                    images = self._from_arrays(part)
                yield torch.from_numpy(images).permute(0, 3, 1, 2)

    def _read(self, path: Path) -> np.ndarray:
        image = read_image(path)
        if image.size != self.size:
            raise ValueError(
                f"'{path}' has {image.width} x {image.height} pixels, the first image {self.size[0]} x {self.size[1]}; "
                "resize them all, because the size changes the features"
            )
        return np.asarray(image, np.uint8)

    def _from_arrays(self, rows: range) -> np.ndarray:
        parts, first = [], 0
        for array in self._arrays:
            start, stop = max(rows.start - first, 0), min(rows.stop - first, len(array))
            if start < stop:
                parts.append(np.array(array[start:stop]))
            first += len(array)
        return np.concatenate(parts)


def _mapped(path: Path) -> np.ndarray:
    array = npz.map_array(path)
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        raise ValueError(f"'{path}' holds {array.dtype} {array.shape}, but images are uint8 (n, H, W, 3)")
    if not len(array):
        raise ValueError(f"'{path}' holds no images")
    return array


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)
