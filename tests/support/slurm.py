"""A SLURM cluster of two nodes on this machine: its own daemons, ports and files, with stand-ins for GPUs.

The controller and both nodes run here as root, without accounting; jobs that finish leave a line in ``completed``.
Memory limits are not enforced. Needs Debian's packages slurmctld, slurmd, slurm-client and munge.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
CONFIGURATION = Path("/etc/slurm/slurm.conf")
"""Where the executor's commands look, since it removes SLURM_CONF from the environment."""

NODES, CPUS, GPUS = ("node1", "node2"), 4, 2


def missing() -> str:
    """Return why there can be no cluster here; empty if there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge"
    if os.getuid() != 0:
        return "the daemons must be started by root"
    if CONFIGURATION.exists() and not CONFIGURATION.is_symlink():
        return f"this machine has a SLURM of its own ('{CONFIGURATION}')"
    return ""


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class NoCluster(Exception):
    """This machine has the programs, but they don't make a cluster."""


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        folder: its state, logs and configuration.
    """

    folder: Path
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def completed(self) -> list[dict[str, str]]:
        """What the controller recorded of each finished job (JobId, Name, JobState, NodeList, ...)."""
        file = self.folder / "completed"
        lines = file.read_text().splitlines() if file.exists() else []
        return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]

    def run(self, *command: str) -> str:
        """Run one of SLURM's commands and return what it prints."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def queue(self) -> list[list[str]]:
        """Return id, state, node list and comment (with the rule) of every unfinished job."""
        lines = self.run("squeue", "-h", "-o", "%i|%T|%N|%k").splitlines()
        return [line.split("|") for line in lines]

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float = 600) -> object:
        """Wait until ``condition`` holds and return its value; fail with the queue otherwise."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := condition():
                return value
            time.sleep(0.2)
        found = subprocess.run(["squeue"], capture_output=True, text=True)
        raise AssertionError(f"no {what} after {seconds:.0f} s; {found.stdout}{found.stderr}; {self.completed}")

    def running(self, rule: str) -> str | None:
        """Return the id of a running job of a rule."""
        return next((job for job, state, _, comment in self.queue() if state == "RUNNING" and rule in comment), None)

    def kill_node(self, name: str) -> None:
        """Let a node die: its daemon and everything that it started."""
        daemon = self.daemons.pop(name)
        for pid in (*_descendants(daemon.pid), *_steps(name), daemon.pid):
            _kill(pid)
        daemon.wait()
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=died")

    def start_node(self, name: str) -> None:
        """Start a node, also one that died."""
        self.daemons[name] = _start(["slurmd", "-D", "-N", name], self.folder / f"{name}.out")
        self.wait_for(lambda: self._responds(name), f"answer of {name}", 120)

    def wait_for_socket(self) -> None:
        """Wait until munged can be asked."""
        end = time.monotonic() + 60
        while not (self.folder / "munge.socket").exists():
            assert time.monotonic() < end, (self.folder / "munged.out").read_text()
            time.sleep(0.05)

    def _responds(self, name: str) -> bool:
        asked = subprocess.run(["sinfo", "-h", "-n", name, "-o", "%T"], capture_output=True, text=True, timeout=60)
        state = asked.stdout.strip()  # empty before the controller answers
        if state.startswith("down"):  # or no longer: then this fails
            subprocess.run(["scontrol", "update", f"NodeName={name}", "State=RESUME"], capture_output=True)
        return state.startswith(("idle", "mixed", "allocated"))

    def clear(self) -> None:
        """Cancel all jobs and wait until they are gone."""
        if jobs := [job for job, *_ in self.queue()]:
            subprocess.run(["scancel", *jobs], check=False)
        self.wait_for(lambda: not self.queue(), "empty queue", 120)


def _steps(node: str) -> list[int]:
    """Return the processes that keep a node's job steps, which outlive its daemon, and their descendants."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
            environment = (folder / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if command.startswith("slurmstepd") and f"SLURMD_NODENAME={node}" in environment:
            found += [int(folder.name), *_descendants(int(folder.name))]
        elif f"SLURMD_NODENAME={node}\0" in environment:
            found.append(int(folder.name))
    return found


def _descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(deeper for child in children for deeper in _descendants(child))]


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _start(command: list[str], output: Path) -> subprocess.Popen:
    with open(output, "a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "PATH": _PATH})


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _configuration(folder: Path) -> str:
    host, (controller, *ports) = socket.gethostname(), _free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=32000 "
        f"Gres=gpu:{GPUS} State=UNKNOWN"
        for name, port in zip(NODES, ports, strict=True)
    )
    return f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed
MinJobAge=600
KillWait=20
SlurmdTimeout=120
OverTimeLimit=0
GresTypes=gpu
MpiDefault=none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=UNLIMITED State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=UNLIMITED State=UP PriorityTier=10 PreemptMode=OFF
"""


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster, yield it, and stop it without leaving a process or a file outside ``folder``."""
    for name in ("state", "munge", "gpus", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o400)
    for i in range(GPUS):
        (folder / "gpus" / f"gpu{i}").symlink_to("/dev/null")
    (folder / "slurm.conf").write_text(_configuration(folder))
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpus/gpu[0-{GPUS - 1}]\n")
    CONFIGURATION.parent.mkdir(exist_ok=True)
    links = {CONFIGURATION: folder / "slurm.conf", CONFIGURATION.with_name("gres.conf"): folder / "gres.conf"}
    for link, target in links.items():
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    made = Cluster(folder)
    munge = ["munged", "-F", "--force", f"--key-file={folder}/munge/key", f"--socket={folder}/munge.socket"]
    munge += [f"--pid-file={folder}/munge/pid", f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed"]
    try:
        try:
            made.daemons["munged"] = _start(munge, folder / "munged.out")
            made.wait_for_socket()
            made.daemons["slurmctld"] = _start(["slurmctld", "-D"], folder / "slurmctld.out")
            for node in NODES:
                made.start_node(node)
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            raise NoCluster(f"SLURM's daemons do not start on this machine: {error}") from error
        yield made
    finally:
        try:
            if set(NODES) <= set(made.daemons):
                made.clear()
        finally:
            for name, daemon in reversed(made.daemons.items()):
                for pid in () if name == "munged" else (*_descendants(daemon.pid), *_steps(name)):
                    _kill(pid)
                daemon.terminate()
            for daemon in made.daemons.values():
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            for link in links:
                link.unlink(missing_ok=True)
