"""Snakemake's locks: left by a killed run, or held by one that is at work."""

import fcntl
import os
import sys
from pathlib import Path
from typing import IO


def clear_stale_locks(folder: Path) -> IO[str]:
    """Remove Snakemake's lock files if no process that wrote them is alive.

    After ``kill -9`` Snakemake's own lock stays for ever and the same command would be refused. Every running Snakemake
    holds an operating-system lock through this function instead, which dies with its process: whoever gets it
    exclusively is alone, and lock files that lie there are left over. Otherwise one line says who else is at work:
    Snakemake refuses only what both would make, in words that suggest removing the lock.

    Args:
        folder: Snakemake's ``.snakemake`` folder.

    Returns:
        The open lock file; keep it for as long as the process lives.
    """
    folder.mkdir(exist_ok=True)
    handle = open(folder / "mmfm.lock", "a+")  # noqa: SIM115 - held open for the life of the process
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.seek(0)
        others = [pid for pid in handle.read().split() if pid != str(os.getpid()) and Path(f"/proc/{pid}").exists()]
        if others:
            print(
                f"another Snakemake (process {', '.join(others)}) is at work in this folder: what it makes is locked; "
                "wait for it, or end it, and run the same command again",
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
