"""Configuration, names and resources that the rules share."""

import re
import shlex
from pathlib import Path

from snakemake.exceptions import WorkflowError

from mmfm import config as mmfm_config
from mmfm import workflow as wf
from mmfm.infra.store import MODEL_FILES
from mmfm.needs import Estimator


def checked(function, *arguments):
    """Call a function of the package; what the user can mend becomes one line instead of a traceback."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise WorkflowError(str(error)) from None


C = checked(mmfm_config.build, mmfm_config.Config, config)
RESULTS = f"results/{C.run}" if C.run else "results"


pathvars:
    results=RESULTS,
    logs="<results>/logs",
    benchmarks="<results>/benchmarks",


ENCODERS = list(C.encoders)
SETTINGS = list(mmfm_config.SETTINGS)

# Stages run `python`: that of the environment Snakemake itself runs in, also when it was not activated.
wf.prepare_environment()

_gpu_limit = workflow.global_resources.get("gpu")
GPUS = checked(wf.gpus_per_job, C.gpus, _gpu_limit.value if _gpu_limit is not None else None)
ALL_CORES = max(1, workflow.cores or 1)
# Stages that can run beside others leave them half of the cores.
SHARED_CORES = max(1, ALL_CORES // 2)

# What a job of each stage takes, for the schedulers that enforce it; `mmfm scale` prints the same numbers. The first
# encoder stands for all: they differ little.
PROCESSES = GPUS or C.processes
NEEDS = Estimator(C, ENCODERS[0], PROCESSES, GPUS > 0).stages()
MEM_MB = {stage: need.mem_mb(PROCESSES, GPUS > 0) for stage, need in NEEDS.items()}

# Operation keys by stage, as `section.key=value`. They reach the commands as resources, which are not compared between
# runs as `params` are: they change no number, so changing them reruns nothing.
OPERATION = {stage: " ".join(mmfm_config.stage_operation(C, stage)) for stage in mmfm_config.STAGES}

if workflow.is_main_process:
    _lock = wf.clear_stale_locks(Path(".snakemake"))


wildcard_constraints:
    encoder="|".join(map(re.escape, ENCODERS)),
    setting="|".join(SETTINGS),
    k=r"\d+",
    t=r"\d+",
    training=rf"seed\d+\.({'|'.join(map(re.escape, C.models))})(\.k\d+)?",


# A result's name: encoder, setting, and the variant as far as it is named (see mmfm.workflow.Variant).
NAME = rf"({'|'.join(map(re.escape, ENCODERS))})_({'|'.join(SETTINGS)})(({wf.variant_pattern(C.models)}))"
COMPLETE_NAME = rf"({'|'.join(map(re.escape, ENCODERS))})_{wf.complete_pattern(C.models)}"


def parameter(stage, replaced=lambda wildcards: {}):
    """Return a function for `params`: the stage's settings as canonical JSON, the only thing that Snakemake compares.

    `replaced` gives the keys that the wildcards set, by section.
    """

    def value(wildcards):
        encoder = getattr(wildcards, "encoder", ENCODERS[0])
        return checked(lambda: wf.stage_parameter(C, stage, encoder, **replaced(wildcards)))

    return value


def encoder_folder(wildcards):
    """Return the folder with the weights of a job's encoder: the configured one, or where it is fetched to."""
    weights = C.encoders[wildcards.encoder].weights
    return f"{RESULTS}/fetched/{wildcards.encoder}" if weights.startswith("hf:") else weights


def encoder_files(wildcards):
    """Return the files of the encoder as declared inputs."""
    return [f"{encoder_folder(wildcards)}/{name}" for name in MODEL_FILES]


def training_variant(wildcards):
    """Return the complete variant behind the `training` wildcard."""
    return checked(wf.parse_variant, f".{wildcards.training}", wildcards.setting, C)


def trained_model(wildcards):
    """Return the keys of `train` and the section `model` that a job's wildcards set."""
    complete = training_variant(wildcards)
    keys = {"seed": complete.seed, "model": complete.model}
    return {"train": keys, "model": mmfm_config.keys_of_kind(C.models[complete.model], "identity")}


def mixture_inputs(wildcards):
    """Return the mixture's files of a job; empty for a setting without a mixture."""
    k = training_variant(wildcards).k
    if k is None:
        return {"gmm": [], "spatial_gmm": []}
    names = {"encoder": wildcards.encoder, "k": k}
    return {
        "gmm": rules.fit_gmm.output.gmm.format(**names),
        "spatial_gmm": rules.spatial_gmm.output[0].format(**names),
    }


def preview_decoder(wildcards):
    """Return the decoder for previews during training: given, or the pipeline's own once it is there.

    No input of `train`, because it changes no weight. (`ancient` would not do: Snakemake 9.27 then forgets a job whose
    output is missing or whose parameter changed if the ancient input is made in the same run.)
    """
    given = C.decoder.weights.format(encoder=wildcards.encoder)
    own = f"{RESULTS}/decoder/{wildcards.encoder}/decoder.safetensors"
    return shlex.quote(own if given == "train" else given)


def complete_name(wildcards, kind):
    """Return the file with the complete name behind a short one; `kind` is txt or json."""
    encoder, setting, text = re.fullmatch(NAME, wildcards.request).group(1, 2, 3)
    complete = checked(wf.parse_variant, text, setting, C)
    return f"{RESULTS}/fid/{encoder}_{setting}.{complete}.{kind}"


def unknown_target(wildcards):
    """Refuse a mistyped result with the list of the valid ones; otherwise Snakemake says only that no rule makes it."""
    names = [f"{RESULTS}/fid/{encoder}_{setting}.txt" for encoder in ENCODERS for setting in SETTINGS]
    target = f"{RESULTS}/fid/{wildcards.name}"
    raise WorkflowError(
        f"no target '{target}'{mmfm_config.nearest(target, names)}. Valid targets:\n  "
        + "\n  ".join(names)
        + f"\nwith any of .seedN .MODEL ({', '.join(C.models)}) .kN .tN before .txt, in this order."
    )
