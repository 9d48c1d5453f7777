"""What a run writes down as it goes: its clock, the history, the logger and the distances."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmfm.infra.distributed import Ranks
from mmfm.training.history import (
    DISTANCES,
    HISTORY,
    append_line,
    draw_curve_of,
    keep_until,
    preview_file,
    previews,
    read_history,
)
from mmfm.training.loggers import Logger, NoLogger, open_logger

log = logging.getLogger(__name__)


class Clock:
    """Time and speed of training, without previews and measurements.

    Args:
        step: steps taken so far.
        seconds: that they took, in earlier runs.
    """

    def __init__(self, step: int, seconds: float) -> None:
        self._start = time.perf_counter() - seconds
        self._last = (time.perf_counter(), step)

    @property
    def seconds(self) -> float:
        """Seconds of all runs so far."""
        return time.perf_counter() - self._start

    def steps_per_second(self, step: int) -> float:
        """Speed since the last call, ``step`` steps being taken now."""
        (before, first), now = self._last, time.perf_counter()
        self._last = (now, step)
        return (step - first) / max(now - before, 1e-9)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Do not count the time of the block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - begin
            self._start += passed
            self._last = (self._last[0] + passed, self._last[1])


class RunLog:
    """History, distances and logger of a run; all but the clock is the main process's.

    Args:
        state: directory of the run.
        logger: see :mod:`mmfm.training.loggers`.
        step: the step that training goes on from. Later lines are of steps that will be taken again, and are removed;
            none are where it does not go on (None).

    Raises:
        ValueError: the logger is unknown or not installed.
    """

    def __init__(self, state: Path, logger: str, step: int | None, ranks: Ranks) -> None:
        self.state, self.ranks = state, ranks
        self._logger: Logger | None = None

        def open_all() -> None:
            for name in (HISTORY, DISTANCES):
                keep_until(state / name, step)
            lines = [*read_history(state / HISTORY), *map(_distance, read_history(state / DISTANCES))]
            pictures = [_picture(state, found) for found in previews(state) if step is None or found <= step]
            self._logger = open_logger(logger, state, [*lines, *pictures])

        ranks.from_main(open_all)

    def add(self, line: dict[str, Any]) -> None:
        """Add a line of the history; a collective call."""
        self.ranks.from_main(lambda: self._write(HISTORY, line, line))

    def add_distance(self, line: dict[str, Any], title: str) -> None:
        """Add a line of the distances and draw the curve in the state under ``title``; a collective call."""

        def add() -> None:
            self._write(DISTANCES, line, _distance(line))
            draw_curve_of(self.state, line["step"], self.state / "curve.png", title)

        self.ranks.from_main(add)

    def add_preview(self, step: int) -> None:
        """Show the picture of ``step``; a collective call."""
        self.ranks.from_main(lambda: self._show(_picture(self.state, step)))

    def close(self) -> None:
        """Finish the logger."""
        if self._logger is not None:
            self._careful(self._logger.close)

    def _write(self, name: str, line: dict[str, Any], shown: dict[str, Any]) -> None:
        append_line(self.state / name, line)
        self._show(shown)

    def _show(self, shown: dict[str, Any]) -> None:
        self._careful(lambda: self._logger.write(shown))

    def _careful(self, call: Callable[[], None]) -> None:
        """Call the logger, which may lose its server or its process; training must not end by that."""
        try:
            call()
        except Exception as error:
            log.warning("the logger fails (%s: %s); training goes on without it", type(error).__name__, error)
            self._logger = NoLogger()


def _distance(line: dict[str, Any]) -> dict[str, Any]:
    """What a logger shows of a distance."""
    return {"step": line["step"], "preview/fid": line["distance"]}


def _picture(state: Path, step: int) -> dict[str, Any]:
    return {"step": step, "preview/images": preview_file(state, step)}
