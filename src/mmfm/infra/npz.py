"""One large array in an ``.npz`` file, written from parts and read by memory-mapping.

``numpy.savez`` wants the whole array in memory and ``numpy.load(mmap_mode=...)`` does not map inside a zip archive. A
set of 50,000 images of 256 x 256 pixels is 9.8 GB, so neither will do. Other programs read these files with
``numpy.load`` as usual.
"""

import hashlib
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mmfm.infra.store import whole_file

MEMBER = "arr_0"
"""Name of an array that was saved without one, and what evaluators of image sets look for."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")


def write_parts(path: str | Path, shape: tuple[int, ...], dtype: np.dtype | type, parts: Iterable[np.ndarray]) -> str:
    """Write the concatenation of ``parts`` as the only array of an uncompressed ``.npz``, whole.

    Equal arrays give equal files: the archive carries no time.

    Args:
        shape: of the whole array, (n, ...).
        parts: arrays (n_i, ...) with the n_i adding up to n; one is in memory at a time.

    Returns:
        The digest of the array, the same as :func:`mmfm.infra.store.array_digest` gives.

    Raises:
        ValueError: a part of another shape or dtype, or too few or too many rows.
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
                    raise ValueError(f"a part {part.shape} {part.dtype} does not belong into {tuple(shape)} {dtype}")
                content = memoryview(np.ascontiguousarray(part)).cast("B")
                digest.update(content)
                member.write(content)
        if rows != shape[0]:
            raise ValueError(f"the parts have {rows} rows together, the array has {shape[0]}")
    return digest.hexdigest()


def map_array(path: str | Path, name: str = MEMBER) -> np.ndarray:
    """Memory-map an array of an uncompressed ``.npz`` read-only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is truncated or no ``.npz``, has no such array, is compressed, or holds Python objects.
    """
    path = Path(path)
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                info = archive.getinfo(f"{name}.npy")
        except zipfile.BadZipFile as error:
            raise ValueError(f"'{path}' is truncated or no .npz file ({error}); make it again") from error
        except KeyError as error:
            raise ValueError(f"'{path}' holds no array '{name}'; save the images as np.savez(path, images)") from error
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"'{path}' is compressed and can't be mapped; write it with np.savez instead")
        shape, fortran, dtype = _read_header(file, path, info)
        start = file.tell()
    if dtype.hasobject:
        raise ValueError(f"'{path}' holds Python objects, which are not read from files; save plain numbers")
    order = "F" if fortran else "C"
    if 0 in shape:
        return np.empty(shape, dtype, order)
    return np.memmap(path, dtype, "r", offset=start, shape=shape, order=order)


def _read_header(file: BinaryIO, path: Path, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the .npy header of an archive's member and leave the file at its data."""
    file.seek(info.header_offset)
    # The local header repeats name and extra field, the latter at another length than in the central directory.
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise ValueError(f"'{path}' is damaged: no member where its directory says; make it again")
    file.seek(name_length + extra_length, 1)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def is_whole(path: str | Path, shape: tuple[int, ...], dtype: np.dtype | type) -> bool:
    """Whether a file of :func:`write_parts` exists, has this shape and dtype, and its bytes match their checksum."""
    if not Path(path).is_file():
        return False
    try:
        array = map_array(path)
        with zipfile.ZipFile(path) as archive:
            return array.shape == tuple(shape) and array.dtype == np.dtype(dtype) and archive.testzip() is None
    except (ValueError, OSError, zlib.error, struct.error, zipfile.BadZipFile):
        return False
