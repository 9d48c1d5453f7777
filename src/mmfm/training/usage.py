"""What a training step makes of its device: the encoder's time, and the card's peak, to compare operations with."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from mmfm.config.choices import CARDS, known_card

T = TypeVar("T")


def bf16_peak(device: torch.device) -> float:
    """Return the operations per second in bf16 that a device's data sheet states; 0 for the CPU and unknown cards."""
    card = known_card(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return CARDS[card].peak if card else 0.0


class Stopwatch:
    """Adds up the time that a device spends on a function's calls, without ever waiting for it.

    On a GPU each call leaves two marks among the work that is queued, and the time between them is read once it is
    over.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, call: Callable[..., T]) -> Callable[..., T]:
        """Return the function with its calls timed."""

        @functools.wraps(call)
        def timed(*arguments: object, **keywords: object) -> T:
            with self._running():
                return call(*arguments, **keywords)

        return timed

    def take(self) -> float:
        """Return the seconds of the calls that have ended since the last time."""
        waiting = []
        for start, end in self._open:
            if end.query():
                self._seconds += start.elapsed_time(end) / 1e3
            else:
                waiting.append((start, end))
        seconds, self._seconds, self._open = self._seconds, 0.0, waiting
        return seconds

    @contextmanager
    def _running(self) -> Iterator[None]:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._open.append((start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin
