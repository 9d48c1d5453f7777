"""Dry runs of the workflow, many in one process: a process of its own for each would take seconds instead of 0.2 s.

Reads a list of the arguments of :func:`plan` as JSON from standard input and prints the list of the rules that would
run, each a sorted list of names.
"""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import yaml
from snakemake.api import SnakemakeApi
from snakemake.settings.types import ConfigSettings, DAGSettings, OutputSettings, Quietness, ResourceSettings

from mmfm import config

OVERLAY = Path("overlay.yaml")


def plan(
    keys: dict, targets: list[str], touch: bool = False, version: str | None = None, force: str | None = None,
    parameters: bool = False, graph: bool = False, operation: bool = False, resources: bool = False,
) -> list[str] | dict[str, str] | dict[str, dict]:  # fmt: skip
    """Return the rules that a call would run; with ``touch`` its outputs are made, empty, and recorded as up to date.

    Args:
        keys: laid over config.yaml.
        version: a stage whose VERSION is raised by one for this call.
        force: a rule to run in any case, as by ``-R``.
        parameters: return the parameter of every job of a stage by its first output instead.
        operation: return the operation keys of every job by its first output instead.
        resources: return what every job of a stage asks for by its first output instead.
        graph: return for every rule the rules whose outputs it reads, and the names of its outputs, instead.
    """
    OVERLAY.write_text(yaml.safe_dump(keys))
    before = dict(config.STAGES)
    if version:
        config.STAGES[version] = dataclasses.replace(before[version], version=before[version].version + 1)
    try:
        with SnakemakeApi(OutputSettings(quiet={Quietness.ALL})) as api:
            api_call = api.workflow(
                resource_settings=ResourceSettings(cores=2, resources={"gpu": 1}),
                config_settings=ConfigSettings(configfiles=[OVERLAY]),
                snakefile=Path("Snakefile"),
                workdir=Path(),
            )
            dag = api_call.dag(DAGSettings(targets=set(targets), forceall=touch, forcerun={force} if force else set()))
            dag.execute_workflow(executor="dryrun")
            jobs = list(api_call._workflow.dag.needrun_jobs(exclude_finished=False))
            if touch:
                for path in (Path(output) for job in jobs for output in job.output):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.touch() if path.suffix not in ("", ".zarr") else path.mkdir(exist_ok=True)
                dag.execute_workflow(executor="touch")
            if graph:
                found: dict[str, dict] = {}
                read = api_call._workflow.dag.dependencies
                for job in api_call._workflow.dag.jobs:
                    about = found.setdefault(job.rule.name, {"parents": [], "outputs": []})
                    about["parents"] = sorted({*about["parents"], *(parent.rule.name for parent in read[job])})
                    about["outputs"] = [Path(output).name for output in job.output]
                return found
            if operation:
                return {str(job.output[0]): job.resources.get("operation", "") for job in jobs}
            if resources:
                asked = ("gpu", "mem_mb", "runtime", "disk_mb")
                return {
                    str(job.output[0]): {name: job.resources.get(name) for name in asked} for job in jobs if job.output
                }
            if parameters:
                return {str(job.output[0]): job.params.settings for job in jobs if hasattr(job.params, "settings")}
            return sorted({job.rule.name for job in jobs})
    finally:
        config.STAGES.update(before)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        found = [plan(**call) for call in json.load(sys.stdin)]
    print(json.dumps(found))
