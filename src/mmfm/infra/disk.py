"""Disk space: checked before a stage starts, and recognised as the cause when a write fails."""

import contextlib
import errno
import os
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOTHING_LEFT = 1 << 16


def used(directory: str | Path, *, freeable: bool = False) -> int:
    """Return the total size of the files below a directory in bytes; 0 if it does not exist.

    Args:
        freeable: count only what removing the directory would free, not files with hard links elsewhere.
    """
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a stage may be at work there
                status = os.lstat(os.path.join(folder, name))
                total += status.st_size if status.st_nlink == 1 or not freeable else 0
    return total


def free(path: str | Path) -> int:
    """Return the free bytes of the disk that holds ``path``, which need not exist yet."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


_REMEDY = (
    "free some space (`mmfm clean --unused` removes unused state), or move results/ to a larger disk and link to it"
)


def require(state: str | Path, stage: str, total: int, written: int | None = None, remedy: str = _REMEDY) -> None:
    """Check that a stage would not fill the disk.

    Args:
        state: its state directory.
        total: bytes on disk when the stage is finished, state and outputs together.
        written: bytes of these that are already written; None: the size of the state.
        remedy: what to do, for the message.

    Raises:
        ValueError: less space is free than is still to be written.
    """
    needed, there = total - (used(state) if written is None else written), free(state)
    if needed > there:
        raise ValueError(
            f"{stage} still has about {needed / 1e9:,.2f} GB to write, but only {there / 1e9:,.2f} GB are free at "
            f"'{Path(state).parent}'; {remedy}"
        )


def of_checkpoints(weights: int, trained: int, *, average: bool, keep: int, milestones: int) -> tuple[int, int]:
    """Return the most bytes that a training run's checkpoints take, and those of one checkpoint.

    These are the newest ones, the milestones, one that is being written, and the published weights.

    Args:
        weights: bytes of the model.
        trained: bytes of its trained parameters; AdamW keeps two moments of each.
        average: whether there is a moving average of the weights.
        keep: number of newest checkpoints.
        milestones: number of checkpoints that are kept for good.
    """
    one = (2 if average else 1) * weights + 2 * trained
    return (keep + milestones + 1) * one + weights, one


def is_full(error: Exception, path: str | Path) -> bool:
    """Whether writing ``path`` failed because the disk is full, which libraries report in various ways."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return os.strerror(errno.ENOSPC) in str(error) or free(path) < _NOTHING_LEFT


def is_denied(error: OSError) -> bool:
    """Whether the system forbids to write."""
    return error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


def explain(error: OSError) -> str:
    """Describe an error of the operating system and its remedy in one line."""
    where = f" ('{error.filename}')" if error.filename else ""
    if error.errno in _FULL:
        return (
            f"the disk is full{where}: free some space and run the same command again; it resumes from what is finished"
        )
    if is_denied(error):
        return f"{error.strerror}{where}: results can't be written there; make it writable, or use another folder"
    if error.errno == errno.ENOENT and error.filename:
        return f"there is no '{error.filename}'; correct the path, or run the stage that makes it"
    return str(error)
