"""The parameter, GPUs and environment of a job."""

import os
import sys
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


def gpus_per_job(wanted: str | int, limit: int | None) -> int:
    """Return the number of GPUs per job.

    Args:
        wanted: the key `gpus`: a number, or ``auto`` for the limit.
        limit: Snakemake's global limit of the resource ``gpu``; None if there is none.

    Raises:
        ValueError: ``wanted`` exceeds the limit (Snakemake would silently clamp it) or is not a number.
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
    """Make shell commands use the Python that runs Snakemake, even if its environment is not activated.

    The package's folder is added to PYTHONPATH, because the rules' conda environment has only its dependencies.
    """
    for variable, first in (("PATH", Path(sys.executable).parent), ("PYTHONPATH", Path(__file__).parents[2])):
        rest = [os.environ[variable]] if os.environ.get(variable) else []
        os.environ[variable] = os.pathsep.join([str(first), *rest])
