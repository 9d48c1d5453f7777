"""One stage on several nodes of a SLURM job.

The launcher on the first node starts itself again on every node by srun and passes on what it knows of the first: where
torchrun's agents meet, the versions that all must have, and a file that all must see.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

from mmfm.infra import versions

FIRST = "MMFM_FIRST_NODE"
"""Environment variable with what the other nodes must know of the first, as JSON."""

_NOWHERE = "192.0.2.1"  # reserved for documentation (RFC 5737); nothing is sent there
_LOOPBACK = "127."  # Debian's /etc/hosts gives the machine's own name 127.0.1.1, at which no other node finds it
_PORTS = 100
_VISIBLE_WITHIN = 90.0
"""Seconds within which every node must see a new file; NFS keeps attributes for up to 60."""


def name() -> str:
    """Return the name of this machine: SLURM's, in its jobs, or the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def on_every_node(arguments: list[str], nodes: int, threads: int, gpus: int) -> tuple[list[str], dict[str, str]]:
    """Return the command line that starts the launcher again on every node of this job, and its environment.

    Args:
        arguments: of the launcher.
        threads, gpus: on each node.

    Raises:
        ValueError: this is not a SLURM job, or a task of one, from which srun can't reach the other nodes.
    """
    if "SLURM_JOB_ID" not in os.environ or shutil.which("srun") is None:
        raise ValueError(f"{nodes} nodes requested, but this is not a SLURM job; use the profiles for SLURM")
    if "SLURM_STEP_ID" in os.environ:
        raise ValueError(
            f"{nodes} nodes requested, but the job runs on one; take the resources of profiles/slurm-multinode "
            "(mpi: srun, nodes, tasks)"
        )
    # The executor removes SLURM's variables from the job, so every size is given here.
    srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={threads}"]
    srun += ["--kill-on-bad-exit=1", *([f"--gpus-per-node={gpus}"] if gpus else [])]
    first = {
        "name": name(),
        "address": own_address(),
        "port": _free_port(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000),
        "versions": _versions(),
        "marker": str(_marker()),
    }
    variables = {**os.environ, FIRST: json.dumps(first)}
    return [*srun, sys.executable, "-m", "mmfm.infra.launch", *arguments], variables


def torchrun_options(nodes: int) -> list[str]:
    """Return torchrun's options for a task of :func:`on_every_node`.

    Raises:
        ValueError: this is none.
    """
    missing = [variable for variable in (FIRST, "SLURM_JOB_ID", "SLURM_NODEID") if variable not in os.environ]
    if missing:
        raise ValueError(f"{', '.join(missing)} not in the environment of a node's task; srun must pass it on")
    first = json.loads(os.environ[FIRST])
    # Without the last two, torchrun guesses by host names, and waits forever where they resolve to 127.0.1.1.
    return [
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-id={os.environ['SLURM_JOB_ID']}",
        f"--rdzv-endpoint={first['address']}:{first['port']}",
        f"--rdzv-conf=is_host={str(_is_first()).lower()}",
        f"--local-addr={_address_here(first)}",
    ]


def require_same() -> None:
    """Check that this node has the first one's versions and sees its files; call it in a task of :func:`on_every_node`.

    Raises:
        ValueError: it doesn't; the message names both nodes.
    """
    first = json.loads(os.environ[FIRST])
    if (here := _versions()) != first["versions"]:
        raise ValueError(
            f"{name()} has {here}, but {first['name']} has {first['versions']}; install the same on every node"
        )
    marker, end = Path(first["marker"]), time.monotonic() + _VISIBLE_WITHIN
    while not marker.exists():
        if time.monotonic() > end or not marker.parent.is_dir():
            raise ValueError(
                f"{name()} can't see '{marker}', which {first['name']} made; several nodes need one folder of results "
                "that they share"
            )
        time.sleep(1)


def interface() -> dict[str, str]:
    """Return the variable that leads gloo to the network in which the nodes meet, unless the user has set it."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    found = interface_of(_address_here(json.loads(os.environ[FIRST])))
    return {"GLOO_SOCKET_IFNAME": found} if found else {}


def own_address(other: str = _NOWHERE) -> str:
    """Return the IPv4 address of this machine in the network that leads to ``other``; by default, to anywhere."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((other, 9))
            return probe.getsockname()[0]
        except OSError:  # nodes of a cluster often have no route out of it
            return _address_without_route()


def _address_without_route() -> str:
    """Return the address that this machine's name stands for; if that is the loopback's, an interface's."""
    named = socket.gethostbyname(socket.gethostname())
    if not named.startswith(_LOOPBACK):
        return named
    import psutil

    every = (entry for addresses in psutil.net_if_addrs().values() for entry in addresses)
    found = (entry.address for entry in every if entry.family == socket.AF_INET)
    return next((address for address in found if not address.startswith(_LOOPBACK)), named)


def interface_of(address: str) -> str | None:
    """Return the name of this machine's network interface with an address; None if none has it."""
    import psutil

    for interface, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return interface
    return None


def _is_first() -> bool:
    return os.environ.get("SLURM_NODEID") == "0"


def _address_here(first: dict[str, str]) -> str:
    return first["address"] if _is_first() else own_address(first["address"])


def _free_port(first: int) -> int:
    """Return the first port from ``first`` on that nothing on this machine listens at."""
    for port in range(first, first + _PORTS):
        with socket.socket() as probe:
            # Like torchrun's store, which may use a port whose last connections are still closing.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue
    raise ValueError(f"no free port between {first} and {first + _PORTS - 1} on {name()} for the nodes to meet")


def _versions() -> str:
    """Return the versions of Python and PyTorch, and a digest of this package's code."""
    source, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(source.rglob("*.py")):
        digest.update(path.relative_to(source).as_posix().encode() + path.read_bytes())
    found = versions.installed()
    return f"mmfm {digest.hexdigest()[:8]} in Python {found['python']} with PyTorch {found.get('torch', '(none)')}"


def _marker() -> Path:
    """Make an empty file in the folder of results, and return its path."""
    folder = Path("results") if Path("results").is_dir() else Path()
    for path in folder.resolve().glob(".seen-by-all-nodes-*"):
        with contextlib.suppress(FileNotFoundError):  # another job may be at it
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()
    handle, path_here = tempfile.mkstemp(prefix=".seen-by-all-nodes-", dir=folder.resolve())
    os.close(handle)
    return Path(path_here)
