"""Files that appear only whole, carry their provenance, and are identified by digests.

Every artefact of a stage is written beside its final place and renamed into it, so a killed stage leaves either the old
file, or none. What a stage needs to go on after a kill lives in a *state directory* beside its outputs, named by the
fingerprint of everything that determines the numbers (:func:`state_directory`).
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from mmfm.infra import space

MODEL_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
"""The files of a model in the Hugging Face layout."""

_METADATA = "mmfm"
"""Key of the one string of metadata in our safetensors files."""

_FINISHED = "finished"
_MANIFEST = "manifest.json"

# The umask can only be read by setting it, so it is read once, before there are threads.
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
    """Serialise ``value`` to JSON with sorted keys and no spaces, so that equal values give equal strings."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """Return 16 hexadecimal digits that identify a JSON-serialisable value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: str | Path) -> str:
    """Return one SHA-256 over the files of a model in the Hugging Face layout: the identity of an encoder.

    Only the three files that are loaded count; a note beside them changes nothing.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    files = {name: Path(folder) / name for name in MODEL_FILES}
    for path in files.values():
        if not path.is_file():
            raise FileNotFoundError(f"'{path}' is missing; the folder should be a model in the Hugging Face layout")
    return hashlib.sha256(canonical_json({n: file_digest(p) for n, p in files.items()}).encode()).hexdigest()


def array_digest(*arrays: np.ndarray) -> str:
    """Return the SHA-256 over the shapes, dtypes and bytes of arrays, in order."""
    digest = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def _is_running(pid: str) -> bool:
    return pid.isdigit() and Path(f"/proc/{pid}").exists()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it into place when the block ends without an error.

    The data reach the disk before the rename, so a power cut can't leave a whole name with half of its bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept last because writers such as np.savez choose the format by it.
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    for left in path.parent.glob(f".{glob.escape(path.stem)}.partial-*{glob.escape(path.suffix)}"):
        if not _is_running(left.name.removesuffix(path.suffix).rpartition("-")[2]):
            left.unlink(missing_ok=True)  # of a killed process; at full size these are gigabytes
    try:
        yield partial
    except Exception as error:
        if not isinstance(error, OSError) and space.is_full(error, path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    else:
        partial.chmod(0o666 & ~_UMASK)  # safetensors makes files that only their owner can read
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def publish_directory(partial: str | Path, final: str | Path) -> None:
    """Move a finished directory into its final place, replacing what is there.

    The old one is renamed before it is removed: half of it must never lie under the final name.
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


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; a broken file is a :class:`ValueError` that names it."""
    try:
        return json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); delete it and run the stage that makes it again"
        ) from error


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> str:
    """Write NumPy arrays as one safetensors file, whole, and return the digest of their contents.

    Args:
        metadata: JSON-serialisable values, to which the key ``digest`` is added. All of it is one string of the header,
            because safetensors writes several in arbitrary order and equal contents would make unequal files.
    """
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    digest = array_digest(*(contiguous[name] for name in sorted(contiguous)))
    with whole_file(path) as partial:
        save_file(contiguous, partial, {_METADATA: canonical_json({**metadata, "digest": digest})})
    return digest


def map_arrays(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Memory-map the arrays of a safetensors file read-only, with the metadata that :func:`write_arrays` stored.

    The pages are shared by every process of the machine and read on demand. No array is copied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a safetensors file or is truncated.
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(8)
        size = path.stat().st_size
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise ValueError(f"{path} is truncated or no safetensors file; delete it and make it again")
        try:
            header = json.loads(file.read(length))
            metadata = json.loads(header.pop("__metadata__", {}).get(_METADATA, "{}"))
        except ValueError as error:
            raise ValueError(f"{path} is no safetensors file of this project ({error}); make it again") from error
    arrays = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        if 8 + length + stop > size:
            raise ValueError(f"{path} is truncated ({size:,} bytes, {8 + length + stop:,} expected); make it again")
        dtype, shape = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        if stop == start:
            arrays[name] = np.empty(shape, dtype)
            continue
        raw = np.memmap(path, np.uint8, "r", offset=8 + length + start, shape=(stop - start,))
        arrays[name] = np.ndarray(shape, dtype, buffer=raw)
    return arrays, metadata


def state_directory(
    output: str | Path,
    stage: str,
    version: int,
    identity: Any,
    inputs: Mapping[str, str],
    files: Mapping[str, str | Path | None] | None = None,
) -> Path:
    """Create and return the directory for a stage's unfinished work.

    It lies beside ``output`` and is named by the fingerprint of the stage, its VERSION, the identity settings and the
    digests of the inputs, so a changed configuration never meets another one's state. ``about.json`` inside says what
    it belongs to. Call it on the main process alone: it holds a lock on the directory for as long as the process lives,
    so that an orphan of a killed run and its successor never write there together.

    Args:
        files: where inputs lie, by their names in ``inputs`` as far as known. Not part of the fingerprint; by it
            :mod:`mmfm.unused` finds state whose inputs were made anew.

    Raises:
        ValueError: another process is at work there.
    """
    about = {"stage": stage, "version": version, "identity": identity, "inputs": dict(inputs)}
    parent = Path(output).parent
    directory = parent / f"state-{fingerprint(about)}"
    directory.mkdir(parents=True, exist_ok=True)
    marker = directory / "about.json"
    _lock(directory, stage)
    if not marker.exists():
        # Relative, so that the folder of the results can be moved.
        known = {name: os.path.relpath(path, parent) for name, path in (files or {}).items() if path is not None}
        write_json(marker, {**about, "files": known})
    return directory


_locks: dict[Path, IO[str]] = {}


def _lock(directory: Path, stage: str) -> None:
    if directory in _locks:
        return
    handle = open(directory / "lock", "a+")  # noqa: SIM115 - held until the work is done or the process ends
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        handle.close()
        raise ValueError(
            f"process {owner} is already at work on this {stage} in '{directory}'; wait for it, or end it "
            f"(kill {owner}) and run the same command again"
        ) from None
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    _locks[directory] = handle


@contextmanager
def finishing(state: Path, outputs: Mapping[str, str | Path]) -> Iterator[Path]:
    """Yield a folder for the finished results of a stage, and put them in their places when the block ends.

    The folder becomes ``finished/`` of the state, and from then on :func:`restore` puts the results in their places
    again, whatever happens to those. The rest of the state, what the results were made from, is removed.

    Args:
        outputs: see :func:`restore`.
    """
    partial = state / ".finished.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    write_json(partial / _MANIFEST, {name: file_digest(partial / name) for name in _files(partial)})
    publish_directory(partial, state / _FINISHED)
    _place_all(state, outputs)


def restore(state: Path, outputs: Mapping[str, str | Path]) -> bool:
    """Put the finished results of a stage in their places, if it is finished.

    They are hard links to what the state keeps (copies where the file system has no links), so they cost no disk, and
    Snakemake may delete them before it runs the stage again. Outputs that are in place get a new time of change alone.

    Args:
        outputs: place of every result by its name in the folder that :func:`finishing` gave. The first is replaced in
            one step; the others, which describe it, are never there beside another one. Those that the block did not
            make are removed from their places.

    Returns:
        Whether the stage is finished. A damaged result is removed, and the stage is not.
    """
    finished = state / _FINISHED
    if not finished.is_dir():
        return False
    manifest = read_json(finished / _MANIFEST)
    if {name: file_digest(finished / name) for name in _files(finished) if name != _MANIFEST} != manifest:
        os.replace(finished, state / f".{_FINISHED}.damaged")
        shutil.rmtree(state / f".{_FINISHED}.damaged")
        return False
    _place_all(state, outputs)
    return True


def _place_all(state: Path, outputs: Mapping[str, str | Path]) -> None:
    finished = state / _FINISHED
    places = {name: Path(output) for name, output in outputs.items()}
    wrong = [name for name, output in places.items() if not _same(finished / name, output)]
    for name in reversed(wrong):
        if name != next(iter(places)) and places[name].is_file():
            places[name].unlink()
    there = {name: output for name, output in places.items() if (finished / name).exists()}
    for name in wrong:
        if name in there:
            place_linked(finished / name, there[name])
    for output in there.values():
        os.utime(output)  # Snakemake takes results older than their inputs for outdated
    _remove_units(state)
    _unlock(state)


def place_linked(source: Path, output: Path) -> None:
    """Make ``output``, a file or folder, of hard links to ``source``, whole, in the place of what is there."""
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


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _same(source: Path, output: Path) -> bool:
    """Whether ``output`` consists of links to ``source``."""
    pairs = [(source / name, output / name) for name in _files(source)] if source.is_dir() else [(source, output)]
    return all(ours.is_file() and theirs.is_file() and ours.samefile(theirs) for ours, theirs in pairs)


def _remove_units(state: Path) -> None:
    for path in state.iterdir():
        if path.name in (_FINISHED, "about.json", "lock"):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_state(directory: Path) -> None:
    """Remove a state directory whose work is published, and release its lock."""
    shutil.rmtree(directory)
    _unlock(directory)


def _unlock(directory: Path) -> None:
    if handle := _locks.pop(directory, None):
        handle.close()


def remove_idle_state(directory: Path) -> bool:
    """Remove a state directory unless a process is at work there; return whether it was removed."""
    with open(directory / "lock", "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        # What tells that it is a state directory goes last: after a kill it is found again.
        for path in directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in ("about.json", "lock"):
                path.unlink()
        shutil.rmtree(directory)
    return True
