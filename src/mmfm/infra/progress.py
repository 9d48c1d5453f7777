"""Progress of a stage: a bar on a terminal, otherwise a line every few seconds."""

import sys
import time
from types import TracebackType

from tqdm import tqdm


def duration(seconds: float) -> str:
    """Format seconds as ``1:02:03`` or ``02:03``."""
    return tqdm.format_interval(max(0.0, seconds))


_running: list["Progress"] = []


def innermost() -> "Progress | None":
    """Return what this process counts now; None if nothing. Any thread may ask."""
    try:
        return _running[-1]
    except IndexError:
        return None


class Progress:
    """Counts units of work and shows their number, the rate and the time left.

    Args:
        stage: name at the start of each line.
        total: number of units.
        unit: name of the unit, in the plural.
        done: units finished by an earlier run, which do not count towards the rate.
        enabled: False on all processes but one.
        every: seconds between lines if standard error is not a terminal.
    """

    def __init__(
        self, stage: str, total: int, unit: str, *, done: int = 0, enabled: bool = True, every: float = 5.0
    ) -> None:
        self.stage, self.total, self.unit, self.done, self.every = stage, total, unit, done, every
        self._first = done
        self._enabled = enabled
        self._start = self._last = time.monotonic()
        self._bar = None
        self._note = ""
        self._shown: int | None = None
        if enabled and done:
            self.say(f"resuming at {done:,} of {total:,} {unit}")
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=stage, unit=f" {unit}", dynamic_ncols=True)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self._enabled:
            tqdm.write(f"{self.stage}: {message}", file=sys.stderr)
            sys.stderr.flush()

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count ``units`` as done, and show ``note`` (a loss, say) after the rate."""
        self.done += units
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(units)
        elif self._enabled and time.monotonic() - self._last >= self.every:
            self._line()

    @property
    def note(self) -> str:
        """The newest note."""
        return self._note

    def rate(self) -> float:
        """Return the units per second since this run began to count."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def _line(self) -> None:
        self._last, self._shown = time.monotonic(), self.done
        rate = self.rate()
        left = duration((self.total - self.done) / rate) if rate > 0 else "?"
        share = 100 * self.done / max(self.total, 1)
        note = f"  {self._note}" if self._note else ""
        self.say(f"{self.done:,}/{self.total:,} {self.unit} ({share:.0f} %)  {rate:,.1f}/s  left {left}{note}")

    def __enter__(self) -> "Progress":
        if self._enabled:
            _running.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            _running.remove(self)
        if self._bar is not None:
            self._bar.close()
        if kind is None and self._enabled:
            if self._bar is None and self._shown != self.done:
                self._line()
            self.say(f"{self.done:,} {self.unit} done in {duration(time.monotonic() - self._start)}")
