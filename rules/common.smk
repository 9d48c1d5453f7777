"""Configuration, names and resources that the rules share."""

import os
import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from mmfm import config as mmfm_config
from mmfm import workflow as wf


def checked(function, *arguments):
    """Call a function of the package; what the user can mend becomes one line instead of a traceback."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise WorkflowError(str(error)) from None


C = checked(mmfm_config.build, mmfm_config.Config, config)
R = f"results/{C.run}/" if C.run else "results/"
ENCODERS = list(C.encoders)
SETTINGS = list(mmfm_config.SETTINGS)

# Stages run `python`: that of the environment Snakemake itself runs in, also when it was not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

_gpu_limit = workflow.global_resources.get("gpu")
GPUS = checked(wf.gpus_per_job, C.gpus, _gpu_limit.value if _gpu_limit is not None else None)
ALL_CORES = max(1, workflow.cores or 1)
# Stages that can run beside others leave them half of the cores.
SHARED_CORES = max(1, ALL_CORES // 2)

# Operation keys by stage, as `section.key=value`. They stand in the commands as {OPERATION[stage]} and not in `params`,
# because they change no number: changing them reruns nothing.
OPERATION = {stage: " ".join(mmfm_config.stage_operation(C, stage)) for stage in mmfm_config.STAGES}
LAUNCH = f"python -m mmfm.infra.launch --processes {C.processes}"

if workflow.is_main_process:
    _lock = wf.clear_stale_locks(Path(".snakemake"))


wildcard_constraints:
    encoder="|".join(map(re.escape, ENCODERS)),
    setting="|".join(SETTINGS),
    k=r"\d+",
    t=r"\d+",
    variant=wf.variant_pattern(C.models),


def parameter(stage, **replaced):
    """Return an input function for `params`: the stage's settings as canonical JSON, the only thing that Snakemake
    compares. ``replaced`` maps sections to functions of the wildcards."""

    def value(wildcards):
        keys = {section: function(wildcards) for section, function in replaced.items()}
        encoder = getattr(wildcards, "encoder", ENCODERS[0])
        model = variant(wildcards).model if hasattr(wildcards, "variant") else ""
        return checked(lambda: wf.stage_parameter(C, stage, encoder, model, **keys))

    return value


def variant(wildcards):
    """Return the complete variant that a job's wildcards name."""
    setting = getattr(wildcards, "setting", "mode")
    return checked(wf.parse_variant, wildcards.variant, setting, C)


def encoder_folder(wildcards):
    """Return the folder with the weights of a job's encoder: the configured one, or where it is fetched to."""
    weights = C.encoders[wildcards.encoder].weights
    return R + f"fetched/{wildcards.encoder}" if weights.startswith("hf:") else weights


def encoder_files(wildcards):
    """Return the files of the encoder as declared inputs."""
    names = ("config.json", "preprocessor_config.json", "model.safetensors")
    return [f"{encoder_folder(wildcards)}/{name}" for name in names]
