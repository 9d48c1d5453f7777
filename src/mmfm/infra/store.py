"""Atomic writes, digests, and safetensors files with provenance.

Every output is written to a temporary file beside its final path and then renamed, so a kill leaves either the old file
or none. Unfinished work lies in state directories (:mod:`mmfm.infra.stage_state`).
"""

import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from mmfm.infra import disk, nodes

MODEL_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
"""The files of a model in the Hugging Face layout; timm's has no preprocessor_config.json."""

_METADATA = "mmfm"
"""The only metadata key in our safetensors files."""

_ABANDONED_AFTER = 24 * 3600
"""Seconds without a change after which another host's partial file counts as left over."""

# Reading the umask requires setting it, so do it once, before there are threads.
_UMASK = os.umask(0)
os.umask(_UMASK)

_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def canonical_json(value: Any) -> str:
    """Serialise ``value`` to JSON with sorted keys and no spaces: equal values give equal strings."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """Return 16 hexadecimal digits that identify a JSON-serialisable value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether the contents of a config.json are timm's."""
    return "architecture" in config and "model_type" not in config


def model_files(timm: bool) -> tuple[str, ...]:
    """Return the names of the files of a model in the layout of transformers or of timm."""
    return (MODEL_FILES[0], MODEL_FILES[2]) if timm else MODEL_FILES


def folder_digest(folder: str | Path) -> str:
    """Return the SHA-256 of a model in the Hugging Face layout, over :func:`model_files`; other files do not count.

    Raises:
        FileNotFoundError: one of the files is missing.
    """
    config = Path(folder) / MODEL_FILES[0]
    values: dict[str, Any] = {}
    with suppress(ValueError):  # what loads a damaged file reports it
        values = read_json(config) if config.is_file() else {}
    files = {name: Path(folder) / name for name in model_files(is_timm(values))}
    for path in files.values():
        if not path.is_file():
            raise FileNotFoundError(f"'{path}' is missing; the folder must be a model in the Hugging Face layout")
    return hashlib.sha256(canonical_json({n: file_digest(p) for n, p in files.items()}).encode()).hexdigest()


def array_digest(*arrays: np.ndarray) -> str:
    """Return the SHA-256 over the dtypes, shapes and bytes of arrays, in order."""
    digest = hashlib.sha256()
    for array in arrays:
        update_digest(digest, np.ascontiguousarray(array))
    return digest.hexdigest()


def update_digest(digest: "hashlib._Hash", array: np.ndarray) -> None:
    """Feed a contiguous array to a digest, as :func:`array_digest` does."""
    digest.update(f"{array.dtype.str}{array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8).data if array.size else b"")


def _is_abandoned(partial: Path, owner: str) -> bool:
    """Whether nobody writes a partial file any more.

    Args:
        owner: host and process, as in its name. Of another host's processes nothing is known, so that age must do.
    """
    host, _, pid = owner.rpartition("-")
    if host == _host() and pid.isdigit():
        return not Path(f"/proc/{pid}").exists()
    try:
        return time.time() - partial.stat().st_mtime > _ABANDONED_AFTER
    except FileNotFoundError:
        return False


def _host() -> str:
    """Return this machine's name, fit for the name of a file."""
    return re.sub(r"[^\w.-]", "_", nodes.name())


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename it to ``path`` if the block ends without an error.

    The data are flushed to disk before the rename, so a power failure cannot leave an incomplete file at ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last, because writers such as np.savez choose the format by it.
    start = f".{path.stem}.partial-"
    partial = path.with_name(f"{start}{_host()}-{os.getpid()}{path.suffix}")
    for left in path.parent.glob(f"{glob.escape(start)}*{glob.escape(path.suffix)}"):
        if _is_abandoned(left, left.name.removeprefix(start).removesuffix(path.suffix)):
            left.unlink(missing_ok=True)  # left by a killed process; can be gigabytes
    try:
        yield partial
    except Exception as error:
        if isinstance(error, OSError) and disk.is_denied(error) and error.filename == str(partial):
            raise type(error)(error.errno, error.strerror, str(path.parent.absolute())) from error
        if not isinstance(error, OSError) and disk.is_full(error, path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    else:
        partial.chmod(0o666 & ~_UMASK)  # safetensors creates files that only their owner can read
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def publish_directory(partial: str | Path, final: str | Path) -> None:
    """Move a complete directory to its final path, replacing any that exists.

    The old one is renamed before it is removed, so that the final path never holds half a directory.
    """
    partial, final = Path(partial), Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    doomed = final.with_name(f".{final.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    if final.exists():
        os.replace(final, doomed)
    os.replace(partial, final)
    _sync(final.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def place_linked(source: Path, output: Path) -> None:
    """Replace ``output``, a file or folder, atomically by hard links to ``source``."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.linked")
    if source.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, copy_function=_link)
        publish_directory(partial, output)
    else:
        partial.unlink(missing_ok=True)
        _link(source, partial)
        os.replace(partial, output)
        _sync(output.parent)


def _link(source: str | Path, output: str | Path) -> None:
    try:
        os.link(source, output)
    except OSError:
        shutil.copy2(source, output)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; raises ValueError with the path if the file is not valid."""
    try:
        return json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it and run its stage again") from error


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> str:
    """Write NumPy arrays as one safetensors file, atomically, and return the digest of the arrays.

    Args:
        metadata: JSON-serialisable values; ``digest`` is added. They are stored as a single string, because safetensors
            writes several in arbitrary order, and equal contents must give equal files.
    """
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    digest = array_digest(*(contiguous[name] for name in sorted(contiguous)))
    with whole_file(path) as partial:
        save_file(contiguous, partial, {_METADATA: canonical_json({**metadata, "digest": digest})})
    return digest


def stream_arrays(
    path: str | Path,
    arrays: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, Any],
) -> str:
    """Write arrays as :func:`write_arrays` does, with one of them in memory at a time, and return their digest.

    Args:
        arrays: dtype and shape by name.
        read: returns the array with a name.

    Raises:
        ValueError: an array has another dtype or shape than said.
    """
    names, codes = sorted(arrays), {np.dtype(kind): code for code, kind in _SAFETENSORS_DTYPES.items()}
    entries: dict[str, Any] = {}
    start = 0
    for name in names:
        dtype, shape = arrays[name]
        stop = start + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop

    def header(digest: str) -> bytes:
        about = {"__metadata__": {_METADATA: canonical_json({**metadata, "digest": digest})}, **entries}
        text = json.dumps(about, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)

    digest = hashlib.sha256()
    with whole_file(path) as partial, partial.open("wb") as file:
        blank = header("0" * 2 * digest.digest_size)  # as long as the digest, which is known at the end
        file.write(struct.pack("<Q", len(blank)) + blank)
        for name in names:
            array = np.ascontiguousarray(read(name))
            if (array.dtype, array.shape) != arrays[name]:
                raise ValueError(f"'{name}' is {array.dtype} {array.shape}, not {arrays[name]}")
            update_digest(digest, array)
            file.write(array.reshape(-1).view(np.uint8).data if array.size else b"")
        file.seek(8)
        file.write(header(digest.hexdigest()))
    return digest.hexdigest()


def _entry(dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Check an entry of a safetensors header; return dtype, shape, start and stop."""
    (start, stop), kind = data_offsets, np.dtype(_SAFETENSORS_DTYPES[dtype])
    if min(start, *shape, 0) < 0 or stop - start != kind.itemsize * math.prod(shape):
        raise ValueError(f"an array {shape} of {dtype} does not fit the bytes {start} to {stop}")
    return kind, tuple(shape), start, stop


def map_arrays(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Memory-map the arrays of a safetensors file read-only; return them and the metadata of :func:`write_arrays`.

    Pages are read on demand and shared by all processes; arrays are not copied.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated or not a safetensors file.
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(8)
        size = path.stat().st_size
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise ValueError(f"{path} is truncated or not a safetensors file; delete it and make it again")
        try:
            header = json.loads(file.read(length))
            metadata = json.loads(header.pop("__metadata__", {}).get(_METADATA, "{}"))
            entries = {name: _entry(**entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a safetensors file of this project ({error}); make it again") from error
    arrays = {}
    for name, (dtype, shape, start, stop) in entries.items():
        if 8 + length + stop > size:
            raise ValueError(f"{path} is truncated ({size:,} bytes, {8 + length + stop:,} expected); make it again")
        if stop == start:
            arrays[name] = np.empty(shape, dtype)
            continue
        raw = np.memmap(path, np.uint8, "r", offset=8 + length + start, shape=(stop - start,))
        arrays[name] = np.ndarray(shape, dtype, buffer=raw)
    return arrays, metadata
