"""Disk space: asked for before a stage starts, and told apart from other errors when it runs out all the same."""

import errno
import os
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOTHING_LEFT = 1 << 16


def used(directory: str | Path, *, freeable: bool = False) -> int:
    """Return the bytes of all files below a directory; 0 if there is none.

    Args:
        freeable: count only what removing the directory would free: not the files that have another name elsewhere.
    """
    found = (os.lstat(os.path.join(folder, name)) for folder, _, names in os.walk(directory) for name in names)
    return sum(status.st_size for status in found if status.st_nlink == 1 or not freeable)


def free(path: str | Path) -> int:
    """Return the free bytes of the disk that ``path`` lies on, or will."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def require(state: str | Path, stage: str, total: int, written: int | None = None) -> None:
    """Refuse to start a stage that would fill the disk.

    Args:
        state: its state directory.
        total: bytes that the stage has written when it is finished, state and outputs together.
        written: those of them that are not needed again; by default all that lies in the state.

    Raises:
        ValueError: less is free than is still to be written.
    """
    needed, there = total - (used(state) if written is None else written), free(state)
    if needed > there:
        raise ValueError(
            f"{stage} still has about {needed / 1e9:,.2f} GB to write, but only {there / 1e9:,.2f} GB are free at "
            f"'{Path(state).parent}'; free some space (`mmfm clean --unused` finds state that nothing needs), or put "
            "results/ on a larger disk and link to it"
        )


def is_full(error: Exception, path: str | Path) -> bool:
    """Whether writing ``path`` failed for want of space. Libraries say so in errors of their own kinds."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return os.strerror(errno.ENOSPC) in str(error) or free(path) < _NOTHING_LEFT


def explain(error: OSError) -> str:
    """Say in one line what the operating system refused, and what to do."""
    where = f" ('{error.filename}')" if error.filename else ""
    if error.errno in _FULL:
        return (
            f"the disk is full{where}: free some space and run the same command again; what is finished is kept, "
            "and it goes on from there"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.strerror}{where}: results can't be written there; make it writable, or work in another folder"
    return str(error)
