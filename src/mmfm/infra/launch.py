"""Start a stage in one or several processes: ``python -m mmfm.infra.launch [options] -- STAGE ARGUMENTS``.

One process runs the stage directly, because torchrun takes seconds to start; several are started by torchrun. The
threads given to the stage are divided among its processes, because oversubscribed cores are many times slower. On each
machine, a GPU is used by one launcher at a time.

Across several nodes of a SLURM job, the launcher on the first starts itself once on each; see :mod:`mmfm.infra.nodes`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from mmfm.infra import cores, file_lock
from mmfm.infra import nodes as several_nodes

_DESCRIPTION = """\
Start a stage in one process per GPU, or in several processes on the CPU, and divide the CPU threads among them."""

_DEVICES = Path("/dev")
_LOCK_FOLDER = Path(tempfile.gettempdir()) / f"mmfm-gpus-{os.getuid()}"
HELD = "MMFM_HELD_GPUS"
"""Environment variable that tells workers which GPUs their launcher holds."""
PARENT = "MMFM_PARENT"
"""Environment variable with the process number of the launcher, which becomes torchrun."""


def visible_gpus() -> list[str]:
    """Return the identifiers of the GPUs that this process may use, without importing torch.

    If ``CUDA_VISIBLE_DEVICES`` is set, it decides (empty: no GPUs); otherwise nvidia-smi lists them, or, in containers
    without it, the device files.
    """
    declared = os.environ.get("CUDA_VISIBLE_DEVICES")
    if declared is not None:
        return [gpu for gpu in declared.split(",") if gpu.strip() and gpu.strip() != "-1"]
    return list(_uuids()) or sorted(
        (path.name.removeprefix("nvidia") for path in _DEVICES.glob("nvidia[0-9]*")), key=int
    )


def _uuids() -> dict[str, str]:
    """Return the UUID of every GPU by its index, as nvidia-smi lists them; empty without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = [line.partition(", ") for line in listing.stdout.splitlines()] if listing.returncode == 0 else []
    return {index: uuid for index, _, uuid in pairs if uuid}


def hold_gpus(count: int) -> tuple[list[str], list[IO[str]]]:
    """Reserve ``count`` GPUs that no other launcher of this user holds on this machine.

    Returns:
        Their identifiers, and the open lock files. Closing these, or the end of the process, releases the GPUs.

    Raises:
        ValueError: not enough GPUs are visible or free.
    """
    gpus = visible_gpus()
    if count > len(gpus):
        raise ValueError(
            f"{count} GPUs requested, but {len(gpus)} visible; lower `gpus` in the configuration (0 for the CPU)"
        )
    held: list[str] = []
    locks: list[IO[str]] = []
    # Under SLURM every job sees its first GPU as 0, so indices can't tell whether two jobs mean the same one.
    uuids = _uuids()
    for gpu in gpus:
        if len(held) == count:
            break
        gpu = uuids.get(gpu, gpu)
        lock = _lock(gpu)
        if lock is None:
            continue
        # Workers do not inherit torchrun's lock. They hold this one, in case they outlive a killed torchrun.
        workers = _lock(f"{gpu}.workers")
        if workers is None:
            lock.close()
            continue
        workers.close()
        held.append(gpu)
        locks.append(lock)
    if len(held) < count:
        raise ValueError(
            f"{count} GPUs requested, but only {len(held)} of {len(gpus)} are free, as other mmfm jobs hold the rest; "
            "wait for them, or limit Snakemake with --resources gpu=N"
        )
    return held, locks


def _lock(name: str, how: int = file_lock.EXCLUSIVE) -> IO[str] | None:
    """Open and lock a file in the lock folder; None if another process holds the lock."""
    _LOCK_FOLDER.mkdir(mode=0o700, exist_ok=True)
    handle = open(_LOCK_FOLDER / name.replace("/", "_"), "w")  # noqa: SIM115 - kept open by the caller
    if file_lock.try_lock(handle, how) is False:
        handle.close()
        return None
    return handle


def join_gpus() -> list[IO[str]]:
    """Hold the GPUs of the launcher that started this process, shared with its other workers.

    Returns:
        The open lock files, to be kept until the process ends; empty without a launcher or GPUs.
    """
    gpus = os.environ.get(HELD, "").split(",")
    return [lock for gpu in gpus if gpu and (lock := _lock(f"{gpu}.workers", file_lock.SHARED))]


def command(stage: list[str], processes: int, nodes: int = 1) -> list[str]:
    """Return the command line that runs ``stage`` (name and arguments) in ``processes`` processes per node.

    Raises:
        ValueError: with several nodes, this is not a task of :func:`mmfm.infra.nodes.on_every_node`.
    """
    if processes == 1 and nodes == 1:
        return [sys.executable, "-m", "mmfm.cli", *stage]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--max-restarts=0"]
    torchrun.append("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    if nodes == 1:
        # Without the second, the processes meet at what the machine's full name resolves to, which may be nothing.
        torchrun += ["--standalone", "--local-addr=127.0.0.1"]
    else:
        torchrun += several_nodes.torchrun_options(nodes)
    return [*torchrun, "-m", "mmfm.cli", *stage]


def environment(threads: int, processes: int, gpus: int = 0) -> dict[str, str]:
    """Return the environment of the stage.

    It has the threads of each process for numerical libraries, no network access, and on GPUs an allocator whose
    segments can grow, unless the user has configured it: micro-batches of several sizes would fragment the memory.
    """
    share = str(max(1, threads // processes))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    added = {**dict.fromkeys(names, share), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # A stage saves its state when asked to stop; torchrun waits so many seconds for a large checkpoint. It has an
    # option for that, too, but older releases refuse to start with it.
    added["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "600"
    # PyTorch reads the first of these, and still the second, which is older.
    allocator = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if gpus and not any(name in os.environ for name in allocator):
        added[allocator[0]] = "expandable_segments:True"
    return {**os.environ, **added}


def main(arguments: list[str] | None = None) -> int:
    """Replace this process by the stage; return an exit status only if that fails."""
    parser = argparse.ArgumentParser(prog="python -m mmfm.infra.launch", description=_DESCRIPTION)
    parser.add_argument(
        "--gpus", type=int, default=0, help="GPUs of the job, one process each; 0 for the CPU (default)"
    )
    parser.add_argument("--processes", type=int, default=1, help="processes on the CPU, without --gpus (default: 1)")
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="CPU threads per node, all its processes together; at most what the job was given (default)",
    )
    parser.add_argument(
        "--nodes", type=int, default=1, help="machines of a SLURM job, which divide the processes evenly (default: 1)"
    )
    parser.add_argument("stage", nargs=argparse.REMAINDER, help="-- STAGE ARGUMENTS: name and arguments of the stage")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    stage = options.stage[1:] if options.stage[:1] == ["--"] else options.stage
    if not stage:
        parser.error("name a stage after --")
    held: list[str] = []
    locks: list[IO[str]] = []
    try:
        gpus = _per_node(options.gpus, options.nodes, "GPUs")
        if options.nodes > 1 and several_nodes.FIRST not in os.environ:
            line, variables = several_nodes.on_every_node(arguments, options.nodes, options.threads, gpus)
            os.execvpe(line[0], line, variables)
        threads = min(options.threads, cores.given())
        processes = gpus or min(_per_node(options.processes, options.nodes, "processes"), max(1, threads))
        line, variables = command(stage, processes, options.nodes), environment(threads, processes, gpus)
        if options.nodes > 1:
            several_nodes.require_same()
            variables |= several_nodes.interface()
        if gpus:
            held, locks = hold_gpus(gpus)
    except ValueError as error:
        print(f"launch: error: {error}", file=sys.stderr)
        return 2
    if job := os.environ.get("SLURM_JOB_ID"):
        given = f"{gpus} GPU{'s' * (gpus != 1)}" if gpus else f"{processes} process{'es' * (processes != 1)}"
        share = f"{given}, {threads} thread{'s' * (threads != 1)}"
        print(f"launch: SLURM job {job} on {several_nodes.name()}: {share}", file=sys.stderr, flush=True)
    if held:
        variables["CUDA_VISIBLE_DEVICES"] = variables[HELD] = ",".join(held)
        for lock in locks:  # inherited by the stage or torchrun, which replaces this process
            os.set_inheritable(lock.fileno(), True)
    else:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    variables[PARENT] = str(os.getpid())
    os.execvpe(line[0], line, variables)


def _per_node(count: int, nodes: int, what: str) -> int:
    if count % nodes and count > 1:
        raise ValueError(f"{count} {what} can't be divided among {nodes} nodes evenly; take a multiple of {nodes}")
    return -(-count // nodes)


if __name__ == "__main__":
    sys.exit(main())
