"""Locks of runs: Snakemake's own, left by a killed run, and those on the logs of jobs that outlive it."""

import fcntl
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from mmfm.infra import file_lock
from mmfm.workflow import failure


def clear_stale_locks(folder: Path) -> IO[str]:
    """Remove Snakemake's lock files if no other Snakemake is running in this folder.

    After ``kill -9`` Snakemake's own locks stay forever, and it refuses to run again. This function therefore takes an
    operating-system lock, which ends with the process: if it is free, no other Snakemake is running and all lock files
    are stale. Otherwise it prints a line that names the other process, because Snakemake's own message, which appears
    if both would make the same file or if a third was killed, suggests removing the lock.

    Args:
        folder: the ``.snakemake`` folder.

    Returns:
        The open lock file; keep it until the process ends.
    """
    folder.mkdir(exist_ok=True)
    handle = open(folder / "mmfm.lock", "a+")  # noqa: SIM115 - held open for the life of the process
    alone = file_lock.try_lock(handle)
    if alone is None:
        return handle
    if not alone:
        handle.seek(0)
        others = [pid for pid in handle.read().split() if pid != str(os.getpid()) and Path(f"/proc/{pid}").exists()]
        if others:
            print(
                f"another Snakemake (process {', '.join(others)}) is running in this folder. If this one is refused as "
                "locked, wait for the other, or stop it, and run the same command again; otherwise both run",
                file=sys.stderr,
            )
    else:
        handle.truncate(0)
        for lock in (folder / "locks").glob("*.lock"):
            lock.unlink(missing_ok=True)
    fcntl.flock(handle, fcntl.LOCK_SH)
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle


def refuse_logs_in_use(logs: Iterable[str]) -> None:
    """Check that no job of another run is still writing one of these logs, because Snakemake would delete it.

    A job can outlive its Snakemake. The shell function ``tee`` in rules/common.smk locks the log while the job runs.

    Raises:
        ValueError: one is in use; the message names the process.
    """
    for log in logs:
        try:
            with open(log, errors="replace") as file:
                in_use = file_lock.try_lock(file, file_lock.SHARED) is False
                place = failure.place(file.read()) if in_use else None
        except FileNotFoundError:
            continue
        if not in_use:
            continue
        if place:
            job, node = place
            whose, remedy = f"SLURM job {job} on {node}", f"cancel it (scancel {job})"
        else:
            processes = ", ".join(map(str, _writers(Path(log))))
            whose, remedy = f"process {processes}" if processes else "", "kill it"
        raise ValueError(
            f"another run is at work on a job of this one{f' ({whose})' if whose else ''} and writes '{log}'; wait for "
            f"it, or {remedy}, and run the same command again"
        )


def _writers(log: Path) -> list[int]:
    """Return the processes whose output a ``tee`` of this machine copies to a log."""
    tees = [link.parent for link in Path("/proc").glob("[0-9]*/fd/9") if _target(link) == str(log.resolve())]
    pipes = {_target(folder / "0") for folder in tees} - {""}
    return [int(link.parts[2]) for link in Path("/proc").glob("[0-9]*/fd/1") if _target(link) in pipes]


def _target(link: Path) -> str:
    """Return what a link points to; an empty string if it is gone or belongs to another user."""
    try:
        return os.readlink(link)
    except OSError:
        return ""
