"""Profiling of some steps of a run, with the profiler of PyTorch."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, supported_activities

from mmfm.infra.distributed import Ranks

_ROWS = 40


class Profile:
    """Profiles the steps from ``first`` to ``last`` of this run, counted from 1.

    Writes ``trace-RANK.json.gz``, which https://ui.perfetto.dev opens, and ``table-RANK.txt``, the operations that take
    the longest, of every process.

    Args:
        steps: first and last step; empty for none.
        folder: where to write.
    """

    def __init__(self, steps: tuple[int, ...], folder: Path, ranks: Ranks) -> None:
        self.steps, self.folder, self.ranks = steps, folder, ranks
        self._profile: profile | None = None

    @contextlib.contextmanager
    def step(self, number: int, say: Callable[[str], None]) -> Iterator[None]:
        """Profile the block, a step, if its number is among the wanted ones."""
        if not self.steps or not self.steps[0] <= number <= self.steps[1]:
            yield
            return
        if self._profile is None:
            self._profile = profile(activities=supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA})
            self._profile.start()
        yield
        if number == self.steps[1]:
            self._write(self._profile)
            say(f"profile of steps {self.steps[0]:,} to {number:,}: '{self.folder}'")

    def _write(self, measured: profile) -> None:
        measured.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        measured.export_chrome_trace(str(self.folder / f"trace-{self.ranks.rank}.json.gz"))
        column = f"self_{self.ranks.device.type}_time_total"
        table = measured.key_averages().table(sort_by=column, row_limit=_ROWS)
        (self.folder / f"table-{self.ranks.rank}.txt").write_text(table)
