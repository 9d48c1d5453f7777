"""A stage's state directory: unfinished work to resume after a kill, and the finished results to restore.

It lies beside the stage's outputs. Its name contains the fingerprint of everything that determines the results
(:func:`state_directory`).
"""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mmfm.infra import file_lock, heartbeat, store

log = logging.getLogger(__name__)

_FINISHED = "finished"
_MANIFEST = "manifest.json"
_BUDGET = "budget.json"


def state_directory(
    output: str | Path,
    stage: str,
    version: int,
    identity: Any,
    inputs: Mapping[str, str],
    files: Mapping[str, str | Path | None] | None = None,
) -> Path:
    """Create, lock and return a stage's state directory.

    It lies beside ``output`` and is named by the fingerprint of the stage, its version, the identity keys and the
    digests of the inputs, so different configurations never share state. ``about.json`` inside has these values. Call
    this on the main process only. The lock lasts until :func:`unlock` or the end of the process, so an orphan of a
    killed run and its successor never write there at the same time.

    Args:
        files: paths of inputs, where known, by their names in ``inputs``. They are not part of the fingerprint;
            :mod:`mmfm.workflow.garbage` uses them to find state whose inputs have been remade.

    Raises:
        ValueError: another process uses the directory.
    """
    about = {"stage": stage, "version": version, "identity": identity, "inputs": dict(inputs)}
    parent = Path(output).parent
    directory = parent / f"state-{store.fingerprint(about)}"
    marker = directory / "about.json"
    lock(directory, stage)
    if not marker.exists():
        # Relative, so that the results folder can be moved.
        known = {name: os.path.relpath(path, parent) for name, path in (files or {}).items() if path is not None}
        store.write_json(marker, {**about, "files": known})
    return directory


_locks: dict[Path, IO[str]] = {}


def lock(directory: Path, stage: str) -> None:
    """Create a stage's state directory if need be and lock it, unless this process already holds the lock.

    Raises:
        ValueError: another process holds it.
    """
    if directory in _locks:
        return
    handle, locked = _open_and_lock(directory)
    if locked is None:
        log.warning("'%s' is on a file system without locks: do not start this %s twice", directory, stage)
    if locked is False:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        handle.close()
        raise ValueError(
            f"process {owner} is already running this {stage} in '{directory}'; wait for it, or stop it "
            f"(kill {owner}) and run the same command again"
        )
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    _locks[directory] = handle


def _open_and_lock(directory: Path) -> tuple[IO[str], bool | None]:
    """Return the open file of a directory's lock, and whether it is locked, as :func:`file_lock.try_lock` says it."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            handle = open(directory / "lock", "a+")  # noqa: SIM115 - held until `unlock` or the end of the process
        except FileNotFoundError:  # removed since
            continue
        locked = file_lock.try_lock(handle)
        if locked is False or _is_lock_of(handle, directory):
            return handle, locked
        handle.close()


def _is_lock_of(handle: IO[str], directory: Path) -> bool:
    """Whether an open file is still the lock of a directory, which :func:`remove_idle_state` may have removed."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), os.stat(directory / "lock"))
    except FileNotFoundError:
        return False


def unlock(directory: Path) -> None:
    """Release the lock on a state directory, if this process holds it."""
    if handle := _locks.pop(directory, None):
        handle.close()


@contextmanager
def finishing(
    state: Path, outputs: Mapping[str, str | Path], *, budget: Mapping[str, Any] | None = None, amend: bool = False
) -> Iterator[Path]:
    """Yield a folder for the finished results of a stage, and publish them as its outputs when the block ends.

    The folder replaces ``finished/`` in the state, from which :func:`restore` can recreate the outputs. The rest of the
    state is removed, unless a run with a larger budget could continue from it.

    Args:
        outputs: see :func:`restore`.
        budget: budget with which the results were made, JSON values; None for a stage without one.
        amend: start with the results that are already finished, and their budget.
    """
    partial = state / ".finished.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    if amend:
        for path in (state / _FINISHED).iterdir():
            if path.name != _MANIFEST:
                store.place_linked(path, partial / path.name)
    yield partial
    if budget is not None:
        store.write_json(partial / _BUDGET, budget)
    known = (_read_manifest(state / _FINISHED) or {}) if amend else {}
    store.write_json(
        partial / _MANIFEST,
        {
            name: known[name]
            if name in known and _same_file(state / _FINISHED / name, partial / name)
            else store.file_digest(partial / name)
            for name in _files(partial)
        },
    )
    store.publish_directory(partial, state / _FINISHED)
    _place_all(state, outputs)


def restore(
    state: Path,
    outputs: Mapping[str, str | Path],
    *,
    budget: Mapping[str, Any] | None = None,
    wanted: Sequence[str] = (),
) -> bool:
    """Recreate the outputs of a stage from its finished results, if it is finished.

    Outputs are hard links to the results in the state (copies if the file system has no hard links), so they take no
    extra space, and Snakemake can delete them before it reruns the stage. Outputs already in place are only touched.

    Args:
        outputs: path of every output, by its name in the folder of :func:`finishing`. The first is replaced atomically;
            the others describe it and never exist beside a different one. Outputs that the block did not make are
            removed.
        budget: the configured budget; the stage counts as unfinished if its results have another one.
        wanted: names of results that must exist for the stage to count as finished.

    Returns:
        Whether the stage is finished. If a result is damaged, all are removed and the stage counts as unfinished.
    """
    finished, replaced = state / _FINISHED, state / f".{_FINISHED}.old"
    if replaced.is_dir() and not finished.exists():  # killed between the two renames of `finishing`
        os.replace(replaced, finished)
    if not finished.is_dir():
        return False
    manifest = _read_manifest(finished)
    if manifest is not None and not _goes_as_far(finished, budget, wanted):
        return False
    if {name: store.file_digest(finished / name) for name in _files(finished) if name != _MANIFEST} != manifest:
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
            store.place_linked(finished / name, there[name])
    for output in there.values():
        os.utime(output)  # Snakemake remakes outputs that are older than their inputs
    _remove_units(state, keep=(finished / _BUDGET).exists())


def _read_manifest(finished: Path) -> dict[str, str] | None:
    """Return the recorded digests of the finished results; None if they are missing or damaged."""
    try:
        return store.read_json(finished / _MANIFEST)
    except (OSError, ValueError):
        return None


def _goes_as_far(finished: Path, budget: Mapping[str, Any] | None, wanted: Sequence[str]) -> bool:
    try:
        reached = None if budget is None else store.read_json(finished / _BUDGET)
    except (OSError, ValueError):
        return False
    return reached == budget and all((finished / name).exists() for name in wanted)


def _same_file(first: Path, second: Path) -> bool:
    return first.is_file() and first.samefile(second)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _same(source: Path, output: Path) -> bool:
    """Whether ``output`` consists of links to ``source``."""
    pairs = [(source / name, output / name) for name in _files(source)] if source.is_dir() else [(source, output)]
    return all(ours.is_file() and theirs.is_file() and ours.samefile(theirs) for ours, theirs in pairs)


def _remove_units(state: Path, keep: bool) -> None:
    """Remove leftovers of interrupted publishing and, unless ``keep``, the unfinished work."""
    for path in state.iterdir():
        # The heartbeat's thread may still replace its file; it removes that when the stage ends.
        known = (_FINISHED, "about.json", "lock", *heartbeat.FILES)
        if path.name in known or (keep and not path.name.startswith(f".{_FINISHED}.")):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_idle_state(directory: Path) -> bool:
    """Remove a state directory unless a process uses it; return whether it was removed."""
    doomed = directory.with_name(f".{directory.name}.old")
    with open(directory / "lock", "a+") as handle:
        if not file_lock.try_lock(handle) or not _is_lock_of(handle, directory):
            return False
        # about.json marks a state directory. It goes last, so that a kill leaves a directory that is still recognised.
        for path in directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in ("about.json", "lock"):
                path.unlink()
        # Renamed first, since a stage that starts once the lock is gone makes the directory anew.
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(directory, doomed)
    shutil.rmtree(doomed)
    return True
