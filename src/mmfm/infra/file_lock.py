"""Advisory locks on files, which end with the process that holds them."""

import errno
import fcntl
from typing import IO

EXCLUSIVE, SHARED = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB


def try_lock(file: IO, how: int = EXCLUSIVE) -> bool | None:
    """Lock an open file without waiting.

    Args:
        how: :data:`EXCLUSIVE` or :data:`SHARED`.

    Returns:
        True; False if another process holds the lock; None on a file system without locks, such as Lustre mounted
        without ``flock``.
    """
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return None
        raise
    return True
