"""The parameter, the share of the machine, and the environment of a job."""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmfm import config
from mmfm.infra.store import canonical_json


def stage_parameter(
    configuration: config.Config,
    stage: str,
    encoder: str = "",
    setting: str = "",
    model: str = "",
    guide: bool = False,
    **keys: dict[str, Any],
) -> str:
    """Return the only parameter of a rule: canonical JSON of the identity and budget keys that its stage reads.

    It includes the stage's version (which the command ignores), so raising the version reruns the stage.

    Args:
        setting: setting of the job; empty for stages without one. Keys that it ignores have fixed values.
        model: entry of `models`; empty for ``train.model``.
        guide: whether a guide is trained.
        keys: keys set by the target's name, by section, e.g. ``gmm={"n_components": 512}``.
    """
    read = config.StageConfig.of(
        configuration, stage, encoder=encoder, model=model, setting=setting or None, guide=guide
    )
    return canonical_json(read.with_keys(**keys).parameter())


_TOLD = "MMFM_RUN"


@dataclass(frozen=True)
class Share:
    """What a job takes of the machines: GPUs and processes of the whole job, its nodes, and threads on each node."""

    gpus: int
    processes: int
    nodes: int
    threads: int

    @property
    def processes_per_node(self) -> int:
        """Processes on one node."""
        return -(-self.processes // self.nodes)


@dataclass(frozen=True)
class Machine:
    """What jobs share: this machine, or, where a profile sends jobs to others, one of their nodes.

    Attributes:
        cores: CPU cores.
        gpus: GPUs; the limit of the resource ``gpu_per_node`` in the profile, or of ``gpu``; None without either.
        total: GPUs that all jobs together may take, the limit of ``gpu``; None without one.
    """

    cores: int
    gpus: int | None
    total: int | None = None

    def share(
        self, rule: str, wanted: str | int, processes: int, *, part: int = 1, given: Mapping[str, Any] | None = None
    ) -> Share:
        """Return what a job takes.

        Args:
            wanted: GPUs on each node: a number, or ``auto`` for all of it.
            processes: on a CPU, of the whole job.
            part: a job on the CPU takes this part of the cores (2: half), so that as many run side by side.
            given: the rule's values of ``--set-resources``, which win.

        Raises:
            ValueError: a node, or all jobs together, have fewer GPUs (Snakemake would silently take those), or nodes
                can't share them evenly.
        """
        given = given or {}
        nodes = int(given.get("nodes", 1))
        if "gpu" in given:
            gpus, source = int(given["gpu"]), f"'gpu' of '{rule}' in set-resources"
        else:
            gpus, source = nodes * gpus_per_node(wanted, self.gpus), "'gpus'"
        if gpus % nodes:
            raise ValueError(f"{source} is {gpus}, which {nodes} nodes can't share evenly; take a multiple of {nodes}")
        each = gpus // nodes
        if self.gpus is not None and each > self.gpus:
            raise ValueError(
                f"{source} is {each}{' per node' if nodes > 1 else ''}, but only {self.gpus} are available (the limit "
                "of the resource 'gpu_per_node', or 'gpu', in the profile); lower it, or set it to auto"
            )
        if self.total is not None and gpus > self.total:
            raise ValueError(
                f"{nodes} nodes with {each} GPUs each are {gpus}, but all jobs together may take {self.total} (the "
                "limit of the resource 'gpu' in the profile); raise it, or take fewer nodes"
            )
        threads = self.cores * each // self.gpus if each and self.gpus else self.cores // part
        return Share(gpus, gpus or processes, nodes, max(1, min(self.cores, threads)))


def gpus_per_node(wanted: str | int, limit: int | None) -> int:
    """Return the GPUs of a job on each of its nodes.

    Args:
        wanted: the key `gpus`: a number, or ``auto`` for the limit.
        limit: GPUs of a node; None if the profile sets no limit.

    Raises:
        ValueError: ``wanted`` is not a number.
    """
    if wanted == "auto":
        return limit or 0
    if not isinstance(wanted, int) or wanted < 0:
        raise ValueError(f"'gpus' is '{wanted}'; it must be a number or auto")
    return wanted


def tell_jobs(machine: Machine, targets: Sequence[str] = ()) -> None:
    """Leave in the environment what the jobs' own Snakemakes can't know: the profile's machine, and the targets.

    On a node, Snakemake reads neither this run's profile nor its command line; it sees the GPUs of its job, and no
    target but its job's. Executors pass the environment on (SLURM's by ``--export=ALL``).

    Args:
        targets: those that matter to jobs.
    """
    os.environ[_TOLD] = canonical_json({"machine": asdict(machine), "targets": list(targets)})


def told(name: str, otherwise: Any) -> Any:
    """Return what :func:`tell_jobs` left, ``machine`` or ``targets``; ``otherwise`` if it left nothing."""
    if _TOLD not in os.environ:
        return otherwise
    found = json.loads(os.environ[_TOLD])[name]
    return Machine(**found) if name == "machine" else found


def require_cluster(executor: str, max_threads: int | None, gpus: int | None, gpus_of_node: int | None) -> None:
    """Check that jobs can be sent to other machines, if the executor does that.

    Args:
        max_threads, gpus, gpus_of_node: the profile's ``max-threads``, and its limits of ``gpu`` and ``gpu_per_node``.

    Raises:
        ValueError: the scheduler is not on this machine, or the profile does not describe the others.
    """
    if executor in ("local", "dryrun", "touch"):
        return
    if max_threads is None or (gpus and gpus_of_node is None):
        raise ValueError(
            "jobs go to other machines, so the profile must say what one of them has: max-threads, and with GPUs the "
            "resource gpu_per_node (on the command line: --resources gpu=N gpu_per_node=M)"
        )
    if executor == "slurm" and shutil.which("sbatch") is None:
        raise ValueError(
            "no 'sbatch' on the path; start Snakemake on a login node of the cluster, or leave out SLURM's profile to "
            "run here"
        )


def prepare_environment() -> None:
    """Make shell commands use the Python that runs Snakemake, even if its environment is not activated.

    The package's folder is added to PYTHONPATH, because the rules' conda environment has only its dependencies.
    """
    for variable, first in (("PATH", Path(sys.executable).parent), ("PYTHONPATH", Path(__file__).parents[2])):
        rest = [os.environ[variable]] if os.environ.get(variable) else []
        os.environ[variable] = os.pathsep.join([str(first), *rest])
