"""Stage commands in real processes of their own, without the seconds that importing PyTorch takes each time.

A server that has imported everything is started once; every command is a fork of it, in its own process group.
"""

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from support import filesystem_events

_PRELOADED = [
    "mmfm.infra.torchvision_ops", "torch", "torch.distributed", "transformers.models.auto.modeling_auto",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers", "zarr", "omegaconf", "scipy.linalg",
    "matplotlib.pyplot", "mmfm.autoencoder.encoders", "mmfm.stages.extract", "mmfm.stages.fit_gmm",
    "mmfm.stages.spatial_gmm",
    "mmfm.stages.train", "mmfm.stages.train_decoder", "mmfm.stages.sample", "mmfm.stages.fid_reference",
    "mmfm.stages.fid", "mmfm.cli.__main__",
]  # fmt: skip

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)


@dataclass(frozen=True)
class Watch:
    """What happens when a command changes files in ``folder``; see :func:`filesystem_events.install`."""

    folder: Path
    kill_at: int = 0
    rest_at: str = ""

    @property
    def log(self) -> Path:
        """Where the events are written."""
        return self.folder.with_name(f"{self.folder.name}.events")

    def go(self) -> None:
        """End the rest of a command."""
        self.log.with_name(f"{self.log.name}.go").touch()

    def clear(self) -> None:
        """Forget an earlier command."""
        self.log.write_text("")
        self.log.with_name(f"{self.log.name}.go").unlink(missing_ok=True)

    def events(self) -> list[list[str]]:
        """Words of every event of the last command that was started with this watch."""
        return [line.split() for line in self.log.read_text().splitlines()]

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which processes that import ``sitecustomize`` from :func:`site_folder` install the hook."""
        values = (str(self.folder), str(self.log), str(self.kill_at), self.rest_at)
        return {"MMFM_TEST_EVENTS": "\t".join(values)}


def reserve_port() -> socket.socket:
    """Return an open socket that holds a free port: no other socket is given it, but processes can still meet there."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def meeting_point(reserved: socket.socket) -> dict[str, str]:
    """Return torchrun's variables for processes that meet at a reserved port."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(reserved.getsockname()[1])}


def site_folder(root: Path) -> Path:
    """Make a folder that, first on PYTHONPATH, installs the hook in every Python process."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "filesystem_events.py").write_text(Path(filesystem_events.__file__).read_text())
    (root / "sitecustomize.py").write_text("import filesystem_events\nfilesystem_events.install_from_environment()\n")
    return root


@dataclass
class Command:
    """A running command of one process or several.

    Attributes:
        arguments: of ``mmfm``.
        errors: file with its standard error.
        reserved: holds the port at which its processes meet.
    """

    arguments: list[str]
    errors: Path
    processes: list = field(default_factory=list)
    reserved: socket.socket | None = None

    @property
    def group(self) -> int:
        """The process group, which is the first process's id."""
        return self.processes[0].pid

    def wait(self, timeout: float = 600) -> int:
        """Return the exit status of the first process that failed, or 0."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        if any(process.exitcode is None for process in self.processes):
            for process in self.processes:
                process.kill()
            raise AssertionError(f"still running: {self.arguments}\n{self.errors.read_text()}")
        if self.reserved is not None:
            self.reserved.close()
        return next((p.exitcode for p in self.processes if p.exitcode), 0)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the whole group."""
        os.killpg(self.group, number)


def start(
    arguments: list[str],
    errors: Path,
    *,
    world: int = 1,
    watch: Watch | None = None,
    constants: dict[str, object] | None = None,
    memory: Path | None = None,
) -> Command:
    """Start ``mmfm ARGUMENTS`` as ``world`` processes that meet as torchrun's do.

    Args:
        errors: file for standard error.
        constants: module constants to set first, ``package.module.NAME`` to value.
        memory: file for the growth of memory, see :func:`growth`.
    """
    command, variables = Command(arguments, errors), {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if world > 1:
        command.reserved = reserve_port()
        variables |= {**meeting_point(command.reserved), "WORLD_SIZE": str(world)}
    if watch is not None:
        watch.clear()
    for rank in range(world):
        own = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else variables
        group = command.group if rank else 0
        process = _context.Process(
            target=_run, args=(arguments, str(errors), own, group, watch, constants or {}, memory), daemon=False
        )
        process.start()
        command.processes.append(process)
    return command


def run(arguments: list[str], errors: Path, **options: object) -> str:
    """Run a command to its end, which must be good, and return what it wrote to standard error."""
    command = start(arguments, errors, **options)
    status = command.wait()
    text = errors.read_text()
    assert status == 0, f"{arguments[0]} ended with {status}:\n{text}"
    return text


def growth(arguments: list[str], errors: Path, constants: dict[str, object] | None = None) -> int:
    """Run a command to its good end and return by how many bytes its memory grew at most, mapped files apart."""
    memory = errors.with_suffix(".memory")
    command = start(arguments, errors, constants=constants, memory=memory)
    peak = _peak(command.processes[0])
    assert command.wait() == 0, errors.read_text()
    return peak - int(memory.read_text())


def call_growth(function: Callable[..., None], memory: Path, *arguments: object) -> int:
    """Call a function in a process of its own and return the same of it; ``memory`` is a file for a number."""
    process = _context.Process(target=_measured, args=(memory, function, *arguments))
    process.start()
    peak = _peak(process)
    process.join()
    assert process.exitcode == 0
    return peak - int(memory.read_text())


def _peak(process: multiprocessing.process.BaseProcess) -> int:
    """Return the most anonymous memory that a process had in its life, bytes, looking two thousand times a second.

    The kernel keeps a peak of its own, but of all resident memory, in which pages of mapped files come and go.
    """
    peak = 0
    while process.is_alive():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            peak = max(peak, _anonymous_memory(process.pid))
        time.sleep(0.0005)
    return peak


def _anonymous_memory(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def _give_back_at_once() -> None:
    """Have malloc return freed memory to the kernel; what it keeps by habit differs by megabytes from run to run."""
    c = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3
    assert c.mallopt(trim_threshold, 0) and c.mallopt(mmap_threshold, 65536)


def _measured(memory: Path | None, function: Callable[..., object], *arguments: object) -> object:
    """Call a function whose process's memory is watched from outside; where it starts from is written to a file."""
    if memory is not None:
        import torch

        torch.set_num_threads(1)  # each thread keeps freed memory of its own
        _give_back_at_once()
        memory.write_text(str(_anonymous_memory(os.getpid())))
    return function(*arguments)


def _join_group(group: int) -> None:
    """Become the leader of a process group (0), or join one whose leader may not have come so far."""
    for _ in range(1000):
        try:
            return os.setpgid(0, group)
        except OSError:
            time.sleep(0.01)
    raise TimeoutError(f"no process group {group}")


def _run(arguments, errors, variables, group, watch, constants, memory) -> None:
    _join_group(group)
    for number in (signal.SIGINT, signal.SIGTERM):  # the server ignores the first
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - the end of the process closes it
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(variables)
    status = 1
    try:
        import torch

        torch.set_num_threads(1)
        for name, value in constants.items():
            module, _, constant = name.rpartition(".")
            assert hasattr(importlib.import_module(module), constant), name
            setattr(sys.modules[module], constant, value)
        if watch is not None:
            filesystem_events.install(str(watch.folder), str(watch.log), watch.kill_at, watch.rest_at)
        from mmfm.cli.__main__ import main

        status = _measured(memory, main, arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
