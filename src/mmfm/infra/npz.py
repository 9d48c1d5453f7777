"""A large array in an ``.npz`` file, written in parts and read by memory-mapping.

``numpy.savez`` needs the whole array in memory, and ``numpy.load(mmap_mode=...)`` cannot map inside a zip archive, but
50,000 images of 256 x 256 pixels are 9.8 GB. Other programs can read these files with ``numpy.load``.
"""

import hashlib
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from mmfm.infra.store import whole_file

MEMBER = "arr_0"
"""NumPy's name for an array saved without a name, which evaluation scripts expect."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")


def write_parts(
    path: str | Path,
    shape: tuple[int, ...],
    dtype: np.dtype | type,
    parts: Iterable[np.ndarray],
    others: Mapping[str, np.ndarray] | None = None,
) -> str:
    """Write the concatenation of ``parts`` atomically as the array :data:`MEMBER` of an uncompressed ``.npz``.

    Equal arrays give equal files: the archive has no timestamps.

    Args:
        shape: shape of the whole array, (n, ...).
        parts: arrays (n_i, ...) whose n_i add up to n; only one is in memory at a time.
        others: small arrays to write after it, by name.

    Returns:
        The digest of the large array, equal to :func:`mmfm.infra.store.array_digest`.

    Raises:
        ValueError: a part has the wrong shape or dtype, or the number of rows is wrong.
    """
    dtype, rows = np.dtype(dtype), 0
    digest = hashlib.sha256(f"{dtype.str}{tuple(shape)}".encode())
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        info = zipfile.ZipInfo(f"{MEMBER}.npy")
        with archive.open(info, "w", force_zip64=True) as member:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_2_0(member, header)
            for part in parts:
                rows += len(part)
                if part.dtype != dtype or part.shape[1:] != tuple(shape[1:]) or rows > shape[0]:
                    raise ValueError(f"a part {part.shape} {part.dtype} does not fit into {tuple(shape)} {dtype}")
                content = np.ascontiguousarray(part).data.cast("B")
                digest.update(content)
                member.write(content)
        for name, array in (others or {}).items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
        if rows != shape[0]:
            raise ValueError(f"the parts have {rows} rows in total, the array has {shape[0]}")
    return digest.hexdigest()


def map_array(path: str | Path, name: str = MEMBER) -> np.ndarray:
    """Memory-map an array of an uncompressed ``.npz`` read-only.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is truncated or not an ``.npz``, lacks the array, is compressed, or has Python objects.
    """
    path = Path(path)
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                info = archive.getinfo(f"{name}.npy")
        except zipfile.BadZipFile as error:
            raise ValueError(f"'{path}' is truncated or not an .npz file ({error}); make it again") from error
        except KeyError as error:
            raise ValueError(f"'{path}' has no array '{name}'; save the images with np.savez(path, images)") from error
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"'{path}' is compressed and can't be memory-mapped; write it with np.savez")
        shape, fortran, dtype = _read_header(file, path, info)
        start = file.tell()
    if dtype.hasobject:
        raise ValueError(f"'{path}' contains Python objects, which are not loaded; save plain numbers")
    order: Literal["F", "C"] = "F" if fortran else "C"
    if 0 in shape:
        return np.empty(shape, dtype, order)
    return np.memmap(path, dtype, "r", offset=start, shape=shape, order=order)


def _read_header(file: BinaryIO, path: Path, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the .npy header of a member and leave the file at its data."""
    file.seek(info.header_offset)
    # The local header repeats the name and the extra field, whose length differs from the central directory.
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise ValueError(f"'{path}' is damaged: its directory is wrong; make it again")
    file.seek(name_length + extra_length, 1)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def is_whole(path: str | Path, shape: tuple[int, ...], dtype: np.dtype | type) -> bool:
    """Whether a file from :func:`write_parts` exists with this shape and dtype, and its checksum is right."""
    if not Path(path).is_file():
        return False
    try:
        array = map_array(path)
        with zipfile.ZipFile(path) as archive:
            return array.shape == tuple(shape) and array.dtype == np.dtype(dtype) and archive.testzip() is None
    except (ValueError, OSError, zlib.error, struct.error, zipfile.BadZipFile):
        return False
