"""What a run records while it trains: time, history, distances, and the logger's lines."""

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
    """Time and speed of training, excluding previews and measurements.

    Args:
        step: steps taken so far.
        seconds: the time they took.
    """

    def __init__(self, step: int, seconds: float) -> None:
        self._start = time.perf_counter() - seconds
        self._last = (time.perf_counter(), step)

    @property
    def seconds(self) -> float:
        """Training time in seconds, including earlier runs."""
        return time.perf_counter() - self._start

    def steps_per_second(self, step: int) -> float:
        """Return the speed since the last call; ``step`` steps are taken now."""
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
    """History, distances and logger of a run, all written by the main process.

    Args:
        state: directory of the run.
        logger: see :mod:`mmfm.training.loggers`.
        step: the step that training continues from: lines of later steps are removed, because these steps are taken
            again. None if no steps are left; nothing is removed then.

    Raises:
        ValueError: the logger is unknown or not installed.
    """

    def __init__(self, state: Path, logger: str, step: int | None, ranks: Ranks) -> None:
        self.state, self.ranks = state, ranks
        self._logger: Logger = NoLogger()

        def open_all() -> None:
            for name in (HISTORY, DISTANCES):
                keep_until(state / name, step)
            lines = [*read_history(state / HISTORY), *map(_distance, read_history(state / DISTANCES))]
            pictures = [_picture(state, found) for found in previews(state) if step is None or found <= step]
            self._logger = open_logger(logger, state, [*lines, *pictures])

        ranks.from_main(open_all)

    def add(self, line: dict[str, Any]) -> None:
        """Add a line to the history; a collective call."""
        self.ranks.from_main(lambda: self._write(HISTORY, line, line))

    def add_distance(self, line: dict[str, Any], title: str) -> None:
        """Add a line to the distances and draw the state's curve again; a collective call."""

        def add() -> None:
            self._write(DISTANCES, line, _distance(line))
            draw_curve_of(self.state, line["step"], self.state / "curve.png", title)

        self.ranks.from_main(add)

    def add_preview(self, step: int) -> None:
        """Show the preview of ``step``; a collective call."""
        self.ranks.from_main(lambda: self._show(_picture(self.state, step)))

    def close(self) -> None:
        """Close the logger."""
        self._careful(self._logger.close)

    def _write(self, name: str, line: dict[str, Any], shown: dict[str, Any]) -> None:
        append_line(self.state / name, line)
        self._show(shown)

    def _show(self, shown: dict[str, Any]) -> None:
        self._careful(lambda: self._logger.write(shown))

    def _careful(self, call: Callable[[], None]) -> None:
        """Call the logger; if it fails, for example because its server is gone, training continues without it."""
        try:
            call()
        except Exception as error:
            log.warning("the logger failed (%s: %s); training goes on without it", type(error).__name__, error)
            self._logger = NoLogger()


def _distance(line: dict[str, Any]) -> dict[str, Any]:
    """Return a distance as a logger's line."""
    return {"step": line["step"], "preview/fid": line["distance"]}


def _picture(state: Path, step: int) -> dict[str, Any]:
    return {"step": step, "preview/images": preview_file(state, step)}
