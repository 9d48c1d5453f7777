"""The heartbeat of a running stage: a small file in its state directory, for ``mmfm status``.

The state may lie on a disk that many machines share, where neither locks nor process numbers tell whether a process on
another machine still lives. A thread of the stage's main process therefore writes there how far the stage is, every
:data:`EVERY` seconds. It asks :mod:`mmfm.infra.progress`, so the stage itself does nothing for it. A stage that is long
at one step (a checkpoint of gigabytes, the first compilation) goes on beating; since when it has not advanced, it says.
"""

import contextlib
import json
import os
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mmfm.infra import disk, nodes, progress

FILE, _PARTIAL = "progress.json", ".progress.json.partial"
FILES = (FILE, _PARTIAL)
"""Names in a state directory that belong to the heartbeat."""

EVERY = 10.0
"""Seconds between beats."""

SILENCE = 300.0
"""Seconds without a beat after which a process on another machine counts as dead.

Many beats, because NFS clients show each other's files up to a minute late, clocks differ, and a library that writes a
large file without releasing the interpreter's lock keeps the thread from beating."""

FAILED, STOPPED = "failed", "stopped"


@dataclass(frozen=True)
class Beat:
    """What a heartbeat says. Times are in seconds since 1970.

    Attributes:
        stage, output: name of the stage, and of its first output, beside the state directory.
        outcome: empty while the stage runs; :data:`FAILED`, or :data:`STOPPED` if it was asked to stop.
        reason: why it failed, in one line.
        task: what is counted, as in the progress line; empty before the first count.
        done, total, unit, rate, note: how far that is, with units per second, as in the progress line.
        host, pid, slurm_job: where it runs; the job is empty without SLURM.
        machine, began: the machine's boot with the namespace of its process numbers, and the process's start in the
            kernel's ticks after the boot; empty and 0 where the system does not say.
        started, written, advanced: when it began, when it wrote this, and when it last counted something.
    """

    stage: str
    output: str
    outcome: str
    reason: str
    task: str
    done: int
    total: int
    unit: str
    rate: float
    note: str
    host: str
    pid: int
    slurm_job: str
    machine: str
    began: int
    started: float
    written: float
    advanced: float

    def left(self) -> float | None:
        """Return the seconds until all is done, at the mean rate of this run; None if it is not known."""
        return max(0, self.total - self.done) / self.rate if self.rate > 0 else None

    def is_alive(self, now: float) -> bool:
        """Whether the stage runs: on this machine if its process does, elsewhere if it beat not long ago."""
        if self.outcome:
            return False
        if self.machine and self.machine == _machine():
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return False
            except PermissionError:
                pass  # another user's
            if found := _process(self.pid):
                return found == ("running", self.began)
        return now - self.written < SILENCE


def read(path: Path) -> Beat:
    """Read a heartbeat.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is not a heartbeat, or damaged.
    """
    try:
        value = json.loads(path.read_text())
        beat = Beat(**value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"'{path}' is not a heartbeat of a stage ({error})") from error
    for field in fields(Beat):
        found = getattr(beat, field.name)
        if not isinstance(found, (int, float) if field.type is float else field.type):  # type: ignore[arg-type]
            raise ValueError(f"'{path}' is not a heartbeat of a stage ('{field.name}' is {found!r})")
    return beat


class Heartbeat:
    """Beats for a stage from :meth:`start` to :meth:`end`.

    A beat that can't be written, because the disk is full, say, is left out: the stage is worth more.

    Args:
        state: the state directory.
        stage: name of the stage.
        output: name of its first output.
    """

    def __init__(self, state: Path, stage: str, output: str) -> None:
        self._state, self._stage, self._output = state, stage, output
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._counted: progress.Progress | None = None
        self._done = 0
        self._started = self._advanced = time.time()

    def start(self) -> None:
        """Write the first beat, and begin to repeat it."""
        self._started = self._advanced = time.time()
        self._write()
        self._thread.start()

    def end(self, error: BaseException | None) -> None:
        """Stop beating: remove the file after success, otherwise leave what happened in it."""
        self._over.set()
        self._thread.join()
        if error is None:
            for name in FILES:
                with contextlib.suppress(OSError):
                    (self._state / name).unlink(missing_ok=True)
        elif isinstance(error, Exception):
            self._write(FAILED, _reason(error))
        else:  # KeyboardInterrupt, SystemExit
            self._write(STOPPED)

    def _beat(self) -> None:
        while not self._over.wait(EVERY):
            self._write()

    def _write(self, outcome: str = "", reason: str = "") -> None:
        now, counted = time.time(), progress.innermost()
        if outcome:  # by then nothing is counted any more
            counted = counted or self._counted
        elif (counted, counted.done if counted else 0) != (self._counted, self._done):
            self._counted, self._done, self._advanced = counted, counted.done if counted else 0, now
        beat = Beat(
            self._stage,
            self._output,
            outcome,
            reason,
            counted.stage if counted else "",
            counted.done if counted else 0,
            counted.total if counted else 0,
            counted.unit if counted else "",
            round(counted.rate(), 4) if counted else 0.0,
            counted.note if counted else "",
            nodes.name(),
            os.getpid(),
            os.environ.get("SLURM_JOB_ID", ""),
            _machine(),
            (_process(os.getpid()) or ("", 0))[1],
            *(round(moment, 1) for moment in (self._started, now, self._advanced)),
        )
        # No fsync, unlike results: after a power failure the heartbeat is dead in any case.
        partial = self._state / _PARTIAL
        try:
            partial.write_text(json.dumps(asdict(beat), indent=1) + "\n")
            os.replace(partial, self._state / FILE)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """Describe an error as the command line does."""
    if isinstance(error, OSError) and error.errno is not None:
        text = disk.explain(error)
    else:
        text = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def _machine() -> str:
    """Return what this machine's processes share and no other's: the boot, and the namespace of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process(pid: int) -> tuple[str, int] | None:
    """Return whether a process is running or dead, and its start in ticks after the boot; None if it can't be read."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "dead" if values[0] in "ZX" else "running", int(values[19])
    except (OSError, ValueError, IndexError):
        return None
