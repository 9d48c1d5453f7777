"""Process group, device and collectives; the only module that reads the environment variables of torchrun.

Stages get a :class:`Ranks`. With one process, nothing is initialised and every collective is the identity.
"""

import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmfm.infra import nodes
from mmfm.infra.launch import HELD, PARENT

DRIVERS = {11: "450", 12: "525", 13: "580"}
"""Oldest Linux driver for each major version of CUDA (NVIDIA's CUDA Toolkit Release Notes, minor-version
compatibility)."""

_PR_SET_PDEATHSIG = 1

_HOST_TIMEOUT, _NCCL_TIMEOUT = timedelta(hours=12), timedelta(minutes=15)
"""How long to wait for another process. On the host it may be at work alone, for example on a checkpoint or on all
k-means seeds; a collective of GPUs that takes minutes hangs."""

_PATIENCE = 5.0
"""Seconds after the first SIGINT during which further ones count as the same request."""


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, the number of processes, and this process's device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes shared files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
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

    def gather_to_main(self, value: Any) -> list[Any] | None:
        """Return the picklable ``value`` of every process, in rank order, on the main process; None on the others."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.is_main else None
        dist.gather_object(value, values)
        return values

    def from_main(self, make: Callable[[], Any]) -> Any:
        """Call ``make`` on the main process, and return its picklable result on every process.

        An exception is also raised on every process, so that none waits for a main process that has stopped.
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


def processes_here() -> int:
    """Return the number of this stage's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def choose_device(local_rank: int = 0) -> torch.device:
    """Return this process's GPU, or the CPU if no GPU is visible (``CUDA_VISIBLE_DEVICES=`` hides them).

    Raises:
        ValueError: the launcher reserved GPUs, but PyTorch can't use them; or there are fewer than processes.
    """
    if torch.cuda.is_available():
        # CUDA hides a broken GPU, and those listed after it. NCCL refuses two processes on one.
        if local_rank >= (there := torch.cuda.device_count()):
            raise ValueError(
                f"{nodes.name()} has {processes_here()} processes, but PyTorch sees only {there} of the GPUs "
                f"{os.environ.get(HELD) or os.environ.get('CUDA_VISIBLE_DEVICES', '')}; look for a broken one "
                "or one in MIG mode (nvidia-smi), and leave it out of CUDA_VISIBLE_DEVICES"
            )
        return torch.device("cuda", local_rank)
    if held := os.environ.get(HELD):
        raise ValueError(
            f"this job has GPU {held} on {nodes.name()}, but PyTorch {torch.__version__} can't use it: "
            f"{why_no_cuda()}. Or set `gpus: 0` to run on the CPU"
        )
    return torch.device("cpu")


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver; None without one."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?(\d+\.\d+[\d.]*)", path.read_text()) if path.is_file() else None
    return found[1] if found else None


def named_device(name: torch.device | str) -> torch.device:
    """Return the device of a name that a user gives.

    Raises:
        ValueError: PyTorch has no device of this name, or can't use it.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"'{name}' is not a device that this runs on; give 'cpu', 'cuda' or one of several, 'cuda:1'")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"PyTorch {torch.__version__} can't use the device '{name}': {why_no_cuda()}. Or give the device 'cpu'"
            )
        if (device.index or 0) >= (there := torch.cuda.device_count()):
            raise ValueError(
                f"there is no device '{name}': PyTorch sees {there} GPU{'s' * (there != 1)}, from 'cuda:0' on"
            )
    return device


def why_no_cuda() -> str:
    """Return why PyTorch can't use a GPU that is there, and the remedy."""
    if torch.version.cuda is None:
        return (
            "it is a build for the CPU; install that for CUDA (pip uninstall torch torchvision, then pip install -e .)"
        )
    version = driver_version()
    driver = f"the NVIDIA driver is {version}" if version else "there is no NVIDIA driver in /proc/driver/nvidia"
    try:
        torch.cuda.init()
        reason = "no device is visible"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". Please")[0].rstrip(".")
    needed = DRIVERS.get(int(torch.version.cuda.partition(".")[0]))
    return (
        f"{reason} ({driver}; CUDA {torch.version.cuda}, with which PyTorch was built, needs "
        f"{f'{needed} or newer' if needed else 'a newer one'}). Update the driver, or install a PyTorch for an older "
        "CUDA; start a container with its GPUs (docker run --gpus all)"
    )


def _end_with_torchrun() -> None:
    """Make the kernel kill this process if torchrun, which starts workers in separate sessions, is killed."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # Killed before that, it is gone already, and nobody would answer when the processes want to meet.
        if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
            sys.exit("the launcher was killed; run the same command again")


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the process group that torchrun describes in the environment, and leave it at the end.

    The backend is nccl for CUDA tensors and gloo for CPU tensors. The launcher sets the number of threads by
    OMP_NUM_THREADS.
    """
    _end_with_torchrun()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        join_group(device)
    # What must be exact does not rely on this (`exact_float32`). The rest is in float32 only where a key says so, and
    # then the same on every machine; bf16 is there for speed.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield Ranks(rank, world, device)
    except BaseException as error:
        # Report at once, and do not destroy the group, which would wait for ranks that are waiting for this one.
        if world > 1:
            print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise
    if world > 1:
        dist.destroy_process_group()


def join_group(device: torch.device) -> None:
    """Initialise the default process group for CPU tensors and those of ``device``, with a timeout each."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_HOST_TIMEOUT)
    if device.type == "cuda":
        group = dist.distributed_c10d._get_default_group()
        group._get_backend(device)._set_default_timeout(_NCCL_TIMEOUT)  # there is no public call for one backend


class StopRequest:
    """Remembers SIGTERM, SIGINT or SIGUSR1, so that a loop can stop at a step boundary.

    All ranks must stop at the same step, so they call :meth:`agreed` at the same points. As a context manager, it
    restores the previous handlers at the end.

    One request can arrive several times: SLURM signals every process, and torchrun forwards the signals it receives.
    Only a SIGINT at least :data:`_PATIENCE` seconds after the first one means that the user does not want to wait.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._interrupted: float | None = None
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self._previous = {number: signal.signal(number, self._remember) for number in numbers}

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        self.signal = number
        if number != signal.SIGINT:
            return
        if self._interrupted is None:
            self._interrupted = time.monotonic()
        elif time.monotonic() - self._interrupted >= _PATIENCE:
            raise KeyboardInterrupt("stopped at once; the same command resumes")

    def agreed(self, ranks: Ranks) -> bool:
        """Whether any process was asked to stop. A collective call on CPU tensors, so it does not wait for a GPU."""
        if ranks.world == 1:
            return self.signal is not None
        return bool(ranks.sum(torch.tensor([float(self.signal is not None)])).item() > 0)
