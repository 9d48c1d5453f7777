"""Watches, slows down or kills a process at the instants at which it changes the file system.

Python announces every rename, removal and new folder to audit hooks before it happens, whoever asks for it. So kills
before the n-th of these events, for every n, leave behind every state that a real kill can leave, but for files that
are half written under a temporary name. The heartbeat does not count: it comes by the clock.
"""

import os
import signal
import sys
import time

EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link")


def install(folder: str, log: str, kill_at: int = 0, rest_at: str = "") -> None:
    """Add the hook to this process, for good.

    Args:
        folder: only events with a path below it count.
        log: file that gets a line ``event path [path]`` per event, relative to ``folder``.
        kill_at: SIGKILL to the own process group before this event, counted from 1; 0 for never.
        rest_at: part of a path; once something has such a name, events with this part wait until ``LOG.go`` exists,
            a minute at most each.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    folder = os.path.abspath(folder) + "/"
    count, named = 0, False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count, named
        if event not in EVENTS:
            return
        paths = _paths(event, arguments)
        if not any(path.startswith(folder) for path in paths) or paths[-1].endswith("/progress.json"):
            return
        count += 1
        if count == kill_at:
            os.killpg(0, signal.SIGKILL)
        os.write(descriptor, " ".join([event, *(path.removeprefix(folder) for path in paths)]).encode() + b"\n")
        if rest_at and any(rest_at in path for path in paths):
            end = time.monotonic() + 60
            while named and time.monotonic() < end and not os.path.exists(f"{log}.go"):
                time.sleep(0.005)
            named = named or (event == "os.rename" and rest_at in paths[-1])

    sys.addaudithook(hook)


def _paths(event: str, arguments: tuple) -> list[str]:
    names = [os.fsdecode(p) for p in arguments[:2] if isinstance(p, (str, bytes, os.PathLike))]
    if event in ("os.remove", "os.rmdir") and arguments[-1] >= 0:  # shutil.rmtree names entries of an open folder
        names = [os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), name) for name in names]
    return [os.path.abspath(name) for name in names]


def install_from_environment() -> None:
    """Do what MMFM_TEST_EVENTS says: arguments of :func:`install` separated by tabs."""
    if text := os.environ.get("MMFM_TEST_EVENTS"):
        folder, log, kill_at, rest_at = text.split("\t")
        install(folder, log, int(kill_at), rest_at)
