"""What a job is given: its parameter, its GPUs, its environment."""

import os
import sys
from pathlib import Path
from typing import Any

from mmfm import config
from mmfm.infra.store import canonical_json


def stage_parameter(
    settings: config.Config, stage: str, encoder: str = "", setting: str = "", model: str = "", **keys: dict[str, Any]
) -> str:
    """Return the one parameter of a rule: canonical JSON of the identity and budget keys that its stage reads.

    The stage's VERSION goes with them (the commands pass over it), so that raising it makes the stage run again.

    Args:
        setting: of the stages that have one; keys that it does not use are not the configured ones.
        model: entry of `models`, where it is not the configured one.
        keys: what the target's name sets, by section, e.g. ``gmm={"n_components": 512}``.
    """
    read = config.StageConfig.of(settings, stage, encoder=encoder, model=model, setting=setting or None)
    return canonical_json(read.with_keys(**keys).parameter())


def gpus_per_job(wanted: str | int, limit: int | None) -> int:
    """Return the GPUs of each GPU job.

    Args:
        wanted: the key `gpus`: a number, or ``auto`` for the limit.
        limit: Snakemake's global limit of the resource ``gpu``; None if there is none.

    Raises:
        ValueError: more are wanted than the limit. Snakemake would silently clamp the request.
    """
    if wanted == "auto":
        return limit or 0
    if not isinstance(wanted, int) or wanted < 0:
        raise ValueError(f"'gpus' is '{wanted}'; it must be a number or auto")
    if limit is not None and wanted > limit:
        raise ValueError(
            f"'gpus' is {wanted}, but only {limit} are available (the limit of the resource 'gpu' in the profile); "
            "lower it, set it to auto, or raise the limit with --resources gpu=N"
        )
    return wanted


def prepare_environment() -> None:
    """Make ``python`` in shell commands the one that runs Snakemake, also when its environment is not active.

    The package's own folder goes onto PYTHONPATH, so that rules run in a conda environment (which holds only what the
    package needs) find it.
    """
    for variable, first in (("PATH", Path(sys.executable).parent), ("PYTHONPATH", Path(__file__).parents[2])):
        rest = [os.environ[variable]] if os.environ.get(variable) else []
        os.environ[variable] = os.pathsep.join([str(first), *rest])
