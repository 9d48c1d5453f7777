"""The only reader of RANK and WORLD_SIZE: process group, device, collectives.

Stages see a :class:`Ranks` and a ``torch.device``. With one process nothing is initialised and every collective is the
identity.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_PR_SET_PDEATHSIG = 1

_PATIENCE = 5.0
"""Seconds from the first SIGINT on in which another one is the same request."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the stage: number, count and device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.world > 1:
            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over the processes, in place, and return it."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return the picklable ``value`` of every process, in rank order, on every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], Any]) -> Any:
        """Call ``make`` on the main process and return its result, which must be picklable, on every process.

        An exception is raised on every process too: the others must not wait for a main process that is gone.
        """
        if self.world == 1:
            return make()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]


def choose_device(local_rank: int = 0) -> torch.device:
    """Return this process's GPU, or the CPU where none is visible (``CUDA_VISIBLE_DEVICES=`` hides them)."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def _end_with_torchrun() -> None:
    """Have the kernel end this process if torchrun is killed, which starts its processes in sessions of their own."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the process group that torchrun announces in the environment, and leave it at the end.

    Backend: nccl for CUDA tensors and gloo for the others. Threads: torch takes what the launcher put into
    OMP_NUM_THREADS.
    """
    _end_with_torchrun()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    # Densities and features need all 24 bits of float32; networks that may use fewer opt in by autocast.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield Ranks(rank, world, device)
    except BaseException as error:
        # Said at once, and the group is left as it is: leaving it in order would wait for ranks that wait for this one.
        if world > 1:
            print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise
    if world > 1:
        dist.destroy_process_group()


class StopRequest:
    """Remembers that SIGTERM, SIGINT or SIGUSR1 arrived, so that a loop can end at a step boundary.

    Ranks must leave at the same step: ask :meth:`agreed` at points that all of them pass. As a context manager it puts
    the former handlers back at the end.

    One request arrives several times: SLURM signals every process, and torchrun passes on what it got itself. So only a
    SIGINT that comes :data:`_PATIENCE` seconds or more after the first is a person who does not want to wait.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._interrupted: float | None = None
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self._former = {number: signal.signal(number, self._remember) for number in numbers}

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        self.signal = number
        if number != signal.SIGINT:
            return
        if self._interrupted is None:
            self._interrupted = time.monotonic()
        elif time.monotonic() - self._interrupted >= _PATIENCE:
            raise KeyboardInterrupt("stopped at once; the same command goes on from the last checkpoint")

    def agreed(self, ranks: Ranks) -> bool:
        """Whether any process was asked to stop. A collective call, between CPUs: it does not wait for a GPU."""
        if ranks.world == 1:
            return self.signal is not None
        return bool(ranks.sum(torch.tensor([float(self.signal is not None)])).item() > 0)
