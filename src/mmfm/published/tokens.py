"""Published tokens, ``cls_tokens.npz``, read in blocks.

The script ``fit_gmm_imagenet.py`` of the published code writes them, compressed, in the order in which its processes
read the images, some of them twice. So a row does not tell its image, and the tokens serve to fit a mixture only.
"""

import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from mmfm.data import tokens as token_store
from mmfm.infra import disk, store
from mmfm.infra.progress import Progress

_MEMBER = "cls_tokens.npy"
_DTYPE = np.dtype("<f4")
_LONGEST_HEADER = 10_000

_HEADER = re.compile(
    rb"\{'descr': ('[^']{1,99}'|\[.*\]), 'fortran_order': (True|False), 'shape': \(([0-9, ]{0,99})\), ?\} *\n",
    re.DOTALL,
)
"""What NumPy writes before an array. It is a Python expression, which is not evaluated here."""

_DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, OSError, ValueError,
    OverflowError, IndexError,
)  # fmt: skip
"""What zipfile raises for archives that are damaged, encrypted, or compressed in an unknown way."""


UNORDERED = "none: rows in the order in which processes read the images, some of them twice"
"""Takes the place of the listing's digest, so that whatever takes a row for an image refuses these tokens."""

_SHARD_ROWS = 8192


def import_tokens(source: Path, out: Path) -> tuple[int, int]:
    """Write published tokens as a token store, for ``fit_gmm`` alone, and return their shape (N, C).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see :func:`token_blocks`; or the disk is too full.
    """
    n, width = token_shape(source)
    partial = out.with_name(f".{out.name}.partial")
    disk.require(out.parent / "import", "import", 4 * n * width, written=0)
    tokens = token_store.create(partial, n, width, _SHARD_ROWS, np.zeros(n, np.int32))
    try:
        with Progress("import", n, "tokens") as progress:
            for block in token_blocks(source, _SHARD_ROWS):
                tokens[progress.done : progress.done + len(block)] = block
                progress.advance(len(block))
    except ValueError:
        shutil.rmtree(partial)
        raise
    token_store.finish(partial, {"digest": store.file_digest(source), "listing_digest": UNORDERED})
    store.publish_directory(partial, out)
    return n, width


def token_shape(path: str | Path) -> tuple[int, int]:
    """Return the shape (N, C) of published tokens without reading them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see :func:`token_blocks`.
    """
    with _opened(Path(path)) as (_, shape):
        return shape


def token_blocks(path: str | Path, rows: int) -> Iterator[np.ndarray]:
    """Yield published tokens in blocks; only one is in memory.

    Those of ImageNet are 3.9 GB in total.

    Args:
        path: archive with the array ``cls_tokens``, (N, C) float32.
        rows: rows of a block; the last one may have fewer.

    Yields:
        (B, C) float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or damaged, or holds something else.
    """
    path = Path(path)
    with _opened(path) as (member, (n, width)):
        for start in range(0, n, rows):
            count = min(rows, n - start)
            yield np.frombuffer(_read(path, member, count * width * _DTYPE.itemsize), _DTYPE).reshape(count, width)
        with _damage_named(path):
            member.read(1)  # at its end the checksum is compared


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, int]]]:
    """Open the array and yield it at its data, with its shape."""
    if not path.is_file():
        raise FileNotFoundError(f"no file '{path}'; fetch it")
    with open(path, "rb") as file:
        with _damage_named(path):
            archive = zipfile.ZipFile(file)
        found = {info.filename: info for info in archive.infolist()}
        if _MEMBER not in found:
            raise ValueError(f"'{path}' has no array cls_tokens; give the cls_tokens.npz that belongs to the mixture")
        with _damage_named(path):
            member = archive.open(found[_MEMBER])
        shape = _shape(path, member)
        expected = shape[0] * shape[1] * _DTYPE.itemsize
        held = found[_MEMBER].file_size - member.tell()
        if held != expected:
            raise ValueError(
                f"'{path}' is damaged: its tokens take {expected:,} bytes, it has {held:,}; fetch it again"
            )
        yield member, shape


def _shape(path: Path, member: IO[bytes]) -> tuple[int, int]:
    """Read the header of the array."""
    magic = _read(path, member, 8)
    layout = {1: "<H", 2: "<I", 3: "<I"}.get(magic[6])
    if magic[:6] != b"\x93NUMPY" or layout is None:
        raise ValueError(f"cls_tokens in '{path}' is not an array of NumPy; fetch it again")
    length = struct.unpack(layout, _read(path, member, struct.calcsize(layout)))[0]
    header = _HEADER.fullmatch(_read(path, member, min(length, _LONGEST_HEADER)))
    if header is None:
        raise ValueError(f"cls_tokens in '{path}' has a damaged header; fetch it again")
    dtype, in_columns, sizes = header[1].decode("latin-1"), header[2] == b"True", re.findall(rb"\d+", header[3])
    if dtype != f"'{_DTYPE.str}'" or in_columns or len(sizes) != 2 or not all(map(int, sizes)):
        what = "Python objects" if "O" in dtype else f"{len(sizes)} axes of dtype {dtype[:40]!r}"
        raise ValueError(
            f"cls_tokens in '{path}' are {what}{', by columns' * in_columns}, not (images, width) float32 by rows; "
            "give the file that fit_gmm_imagenet.py wrote"
        )
    return int(sizes[0]), int(sizes[1])


def _read(path: Path, member: IO[bytes], count: int) -> bytes:
    with _damage_named(path):
        content = member.read(count)
    if len(content) < count:
        raise ValueError(f"'{path}' is truncated; fetch it again")
    return content


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"'{path}' is truncated or damaged ({reason}); fetch it again") from error
