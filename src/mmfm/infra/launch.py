"""Start a stage as the right processes: ``python -m mmfm.infra.launch [options] -- STAGE ARGUMENTS``.

One process is the stage's module itself (torchrun alone costs seconds); more are torchrun. OpenMP, MKL and OpenBLAS get
the threads that the stage owns, because two pools that share cores slow each other down many times over. On one machine
every GPU is held by one launcher at a time.
"""

import argparse
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

_LOCK_FOLDER = Path(tempfile.gettempdir()) / f"mmfm-gpus-{os.getuid()}"
_HELD = "MMFM_HELD_GPUS"
"""Environment variable by which a worker knows the GPUs that its launcher took."""


def visible_gpus() -> list[str]:
    """Return the identifiers of the GPUs that this process may use, without importing torch.

    ``CUDA_VISIBLE_DEVICES`` decides where it is set (empty: none); otherwise the driver is asked.
    """
    declared = os.environ.get("CUDA_VISIBLE_DEVICES")
    if declared is not None:
        return [gpu for gpu in declared.split(",") if gpu.strip() and gpu.strip() != "-1"]
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listing.stdout.split() if listing.returncode == 0 else []


def hold_gpus(count: int) -> tuple[list[str], list[IO[str]]]:
    """Take ``count`` GPUs that no other launcher of this user and machine holds.

    Returns:
        Their identifiers, and the open lock files: the GPUs are free again when these are closed, also by a kill.

    Raises:
        ValueError: fewer GPUs are visible, or free.
    """
    gpus = visible_gpus()
    if count > len(gpus):
        raise ValueError(
            f"{count} GPUs asked for, {len(gpus)} visible; lower `gpus` in the configuration (0 runs on the CPU)"
        )
    held, locks = [], []
    for gpu in gpus:
        if len(held) == count:
            break
        lock = _lock(gpu)
        if lock is None:
            continue
        # torchrun's workers do not inherit the first lock. If it was killed and they live on, this one shows it.
        workers = _lock(f"{gpu}.workers")
        if workers is None:
            lock.close()
            continue
        workers.close()
        held.append(gpu)
        locks.append(lock)
    if len(held) < count:
        raise ValueError(
            f"{count} GPUs asked for, only {len(held)} of {len(gpus)} are free: other jobs of mmfm hold the rest; "
            "wait for them, or give Snakemake the limit --resources gpu=N"
        )
    return held, locks


def _lock(name: str, how: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> IO[str] | None:
    """Return an open, locked file of the lock folder; None if others hold it."""
    _LOCK_FOLDER.mkdir(mode=0o700, exist_ok=True)
    handle = open(_LOCK_FOLDER / name.replace("/", "_"), "w")  # noqa: SIM115 - closed by the caller's exit
    try:
        fcntl.flock(handle, how)
    except OSError:
        handle.close()
        return None
    return handle


def join_gpus() -> list[IO[str]]:
    """Hold the GPUs of the launcher that started this process, together with its other workers.

    Returns:
        The open lock files; keep them for as long as the process lives. None without a launcher or GPUs.
    """
    gpus = os.environ.get(_HELD, "").split(",")
    return [lock for gpu in gpus if gpu and (lock := _lock(f"{gpu}.workers", fcntl.LOCK_SH))]


def command(stage: list[str], processes: int, nodes: int = 1) -> list[str]:
    """Return the command line that runs ``stage`` (name and arguments) as ``processes`` processes a node."""
    if processes == 1 and nodes == 1:
        return [sys.executable, "-m", "mmfm.cli", *stage]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--max-restarts=0"]
    # A stage saves its state when asked to stop: torchrun must pass the request on and wait for a large checkpoint.
    torchrun += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout=600"]
    if nodes == 1:
        torchrun.append("--standalone")
    else:
        # SLURM starts this launcher once per node; all meet at the first node's address.
        missing = [name for name in ("SLURM_JOB_ID", "SLURM_NODEID", "MMFM_FIRST_NODE") if name not in os.environ]
        if missing:
            raise ValueError(
                f"--nodes {nodes} needs {', '.join(missing)} in the environment: start it by srun, once a node"
            )
        job, first = int(os.environ["SLURM_JOB_ID"]), os.environ["MMFM_FIRST_NODE"]
        is_first = os.environ.get("SLURM_NODEID") == "0"
        torchrun += [
            f"--nnodes={nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-id={job}",
            f"--rdzv-endpoint={first}:{20000 + job % 20000}",
            f"--rdzv-conf=is_host={str(is_first).lower()}",
        ]
    return [*torchrun, "-m", "mmfm.cli", *stage]


def environment(threads: int, processes: int) -> dict[str, str]:
    """Return the environment of the stage: its share of threads for every numerical library, and no network."""
    share = str(max(1, threads // processes))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, share), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(arguments: list[str] | None = None) -> int:
    """Run a stage and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m mmfm.infra.launch", description=__doc__)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs on this node, one process each; 0: CPU")
    parser.add_argument("--processes", type=int, default=1, help="processes where there are no GPUs (default 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of all processes together")
    parser.add_argument("--nodes", type=int, default=1, help="machines (under SLURM)")
    parser.add_argument("stage", nargs=argparse.REMAINDER, help="-- STAGE ARGUMENTS")
    options = parser.parse_args(arguments)
    stage = options.stage[1:] if options.stage[:1] == ["--"] else options.stage
    if not stage:
        parser.error("name a stage after --")
    processes = options.gpus or min(options.processes, max(1, options.threads))
    variables = environment(options.threads, processes)
    try:
        line = command(stage, processes, options.nodes)
        held, locks = hold_gpus(options.gpus) if options.gpus else ([], [])
    except ValueError as error:
        print(f"launch: error: {error}", file=sys.stderr)
        return 2
    if held:
        variables["CUDA_VISIBLE_DEVICES"] = variables[_HELD] = ",".join(held)
        for lock in locks:  # inherited by the stage, or by torchrun, which replaces this process
            os.set_inheritable(lock.fileno(), True)
    else:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    os.execvpe(line[0], line, variables)


if __name__ == "__main__":
    sys.exit(main())
