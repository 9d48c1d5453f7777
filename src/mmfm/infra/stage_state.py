"""A stage's state directory: what it needs to go on after a kill, or the finished results, to put them in place again.

It lies beside the stage's outputs and is named by the fingerprint of everything that determines the numbers
(:func:`state_directory`).
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mmfm.infra import store

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
    """Create and return the directory for a stage's unfinished work.

    It lies beside ``output`` and is named by the fingerprint of the stage, its VERSION, the identity settings and the
    digests of the inputs, so a changed configuration never meets another one's state. ``about.json`` inside says what
    it belongs to. Call it on the main process alone: it holds a lock on the directory until :func:`unlock` or the end
    of the process, so that an orphan of a killed run and its successor never write there together.

    Args:
        files: where inputs lie, by their names in ``inputs`` as far as known. Not part of the fingerprint; by it
            :mod:`mmfm.workflow.garbage` finds state whose inputs were made anew.

    Raises:
        ValueError: another process is at work there.
    """
    about = {"stage": stage, "version": version, "identity": identity, "inputs": dict(inputs)}
    parent = Path(output).parent
    directory = parent / f"state-{store.fingerprint(about)}"
    directory.mkdir(parents=True, exist_ok=True)
    marker = directory / "about.json"
    lock(directory, stage)
    if not marker.exists():
        # Relative, so that the folder of the results can be moved.
        known = {name: os.path.relpath(path, parent) for name, path in (files or {}).items() if path is not None}
        store.write_json(marker, {**about, "files": known})
    return directory


_locks: dict[Path, IO[str]] = {}


def lock(directory: Path, stage: str) -> None:
    """Take the lock on a stage's state directory, unless this process holds it already.

    Raises:
        ValueError: another process is at work there.
    """
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


def unlock(directory: Path) -> None:
    """Release the lock on a state directory, if this process holds it."""
    if handle := _locks.pop(directory, None):
        handle.close()


@contextmanager
def finishing(
    state: Path, outputs: Mapping[str, str | Path], *, budget: Mapping[str, Any] | None = None, amend: bool = False
) -> Iterator[Path]:
    """Yield a folder for the finished results of a stage, and put them in their places when the block ends.

    The folder becomes ``finished/`` of the state, in the place of an earlier one, and from then on :func:`restore` puts
    the results in their places again, whatever happens to those. The rest of the state, what the results were made
    from, is removed, unless a larger budget would go on from it.

    Args:
        outputs: see :func:`restore`.
        budget: how far the stage went, JSON values; None for a stage without a budget.
        amend: begin with the results that are finished already, and their budget.
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
    """Put the finished results of a stage in their places, if it is finished.

    They are hard links to what the state keeps (copies where the file system has no links), so they cost no disk, and
    Snakemake may delete them before it runs the stage again. Outputs that are in place get a new time of change alone.

    Args:
        outputs: place of every result by its name in the folder that :func:`finishing` gave. The first is replaced in
            one step; the others, which describe it, are never there beside another one. Those that the block did not
            make are removed from their places.
        budget: how far the stage was to go; it is not finished if it went elsewhere.
        wanted: names of results without which it is not finished.

    Returns:
        Whether the stage is finished. A damaged result is removed, and the stage is not.
    """
    finished, replaced = state / _FINISHED, state / f".{_FINISHED}.old"
    if replaced.is_dir() and not finished.exists():  # killed while `finishing` once more, between two renames
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
        os.utime(output)  # Snakemake takes results older than their inputs for outdated
    _remove_units(state, keep=(finished / _BUDGET).exists())


def _read_manifest(finished: Path) -> dict[str, str] | None:
    """Return the digests of finished results; None if they can't be read, as those of damaged ones."""
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
    """Remove what kills left of earlier results and, unless it is to be kept for a larger budget, the units."""
    for path in state.iterdir():
        if path.name in (_FINISHED, "about.json", "lock") or (keep and not path.name.startswith(f".{_FINISHED}.")):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


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
