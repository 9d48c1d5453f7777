"""Configuration, names and resources that the rules share."""

import atexit
import re
import shlex
from dataclasses import replace
from pathlib import Path

from snakemake.exceptions import WorkflowError

from mmfm import config as mmfm_config
from mmfm.infra.store import MODEL_FILES
from mmfm.workflow import garbage, jobs, locks, targets
from mmfm.workflow.resources import Estimator


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
# Autoguidance: the suffix of a setting's name.
GUIDED = ["", "_ag"]

# Stages run `python`: that of the environment Snakemake itself runs in, also when it was not activated.
jobs.prepare_environment()

# Ctrl-C and schedulers signal all processes of a job: `tee` must outlive its stage, whose last words say what was saved.
# Here and not in the rules, because changed commands rerun everything.
shell.prefix("set -euo pipefail; tee() {{ trap '' HUP INT TERM USR1; exec tee \"$@\"; }}; ")

_gpu_limit = workflow.global_resources.get("gpu")
GPUS = checked(jobs.gpus_per_job, C.gpus, _gpu_limit.value if _gpu_limit is not None else None)
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
OPERATION = {
    stage: " ".join(mmfm_config.StageConfig.of(C, stage, encoder=ENCODERS[0]).operation())
    for stage in mmfm_config.STAGES
}

if workflow.is_main_process:
    _lock = locks.clear_stale_locks(Path(".snakemake"))


wildcard_constraints:
    encoder="|".join(map(re.escape, ENCODERS)),
    setting="|".join(SETTINGS),
    ag="|".join(GUIDED),
    k=r"\d+",
    t=r"\d+",
    g=r"(\.g\d+(\.\d+)?)?",
    training=rf"seed\d+\.{targets.any_of(C.models)}(\.k\d+)?(\.guide)?",


# A result's name: encoder, setting, autoguidance, and the variant as far as it is named (see mmfm.workflow.targets.Variant).
NAME = rf"{targets.any_of(ENCODERS)}_{targets.any_of(SETTINGS)}(_ag)?({targets.variant_pattern(C.models)})"
COMPLETE_NAME = rf"{targets.any_of(ENCODERS)}_{targets.complete_pattern(C)}"


def parameter(stage, named=lambda wildcards: {}):
    """Return a function for `params`: the stage's settings as canonical JSON, the only thing that Snakemake compares.

    `named` gives the keys that the wildcards set, by section, and the model.
    """

    def value(wildcards):
        encoder, setting = getattr(wildcards, "encoder", ENCODERS[0]), getattr(wildcards, "setting", "")
        return checked(lambda: jobs.stage_parameter(C, stage, encoder, setting, **named(wildcards)))

    return value


def remember_unstarted():
    """Record the configuration of a call that was no dry run, also if everything is made already."""
    executed = workflow.executor_plugin is not None and not workflow.dryrun and not workflow.touch
    if workflow.is_main_process and executed and Path(RESULTS).is_dir():
        remember_configuration()


def remember_configuration():
    """Record the configuration and the folders of the stages, by which `mmfm clean` judges."""
    outputs = [Path(output) for rule in workflow.rules for output in rule.output]
    garbage.remember(
        C, RESULTS, (path.relative_to(RESULTS).parts[0] for path in outputs if path.is_relative_to(RESULTS))
    )


def encoder_folder(wildcards):
    """Return the folder with the weights of a job's encoder: the configured one, or where it is fetched to."""
    weights = C.encoders[wildcards.encoder].weights
    return f"{RESULTS}/fetched/{wildcards.encoder}" if weights.startswith("hf:") else weights


def encoder_files(wildcards):
    """Return the files of the encoder as declared inputs."""
    folder = encoder_folder(wildcards)
    if folder == C.encoders[wildcards.encoder].weights:
        given(f"encoders.{wildcards.encoder}.weights", folder, "set it to such a folder, or to `hf:` and a model id")
    return [f"{folder}/{name}" for name in MODEL_FILES]


def given(key, path, remedy):
    """Return a path that the configuration names; one line instead of Snakemake's list of rules if it is not there."""
    if not Path(path).exists():
        raise WorkflowError(f"'{key}' is '{path}', but nothing is there; {remedy}")
    return path


def detector_weights(wildcards):
    """Return the detector's weights."""
    return given("fid.weights", C.fid.weights, "see 'mmfm fid_reference --help' for how to get them")


def training_variant(wildcards):
    """Return the complete variant behind the `training` wildcard."""
    return checked(targets.parse_variant, f".{wildcards.training.removesuffix('.guide')}", wildcards.setting, C)


def trained_model(wildcards):
    """Return the keys of `train` and the model that a job's wildcards set; a guide has its own budget."""
    complete = training_variant(wildcards)
    keys = {"seed": complete.seed, "model": complete.model}
    if wildcards.training.endswith(".guide"):
        keys["epochs"] = C.guide.epochs
    return {"train": keys, "model": complete.model}


def mixture_inputs(wildcards):
    """Return the mixture's files of a job; empty for a setting without a mixture."""
    k = training_variant(wildcards).k
    if k is None:
        return {"gmm": [], "spatial_gmm": []}
    names = {"encoder": wildcards.encoder, "k": k}
    return {
        "gmm": rules.fit_gmm.output.gmm.format(**names),
        "spatial_gmm": rules.spatial_gmm.output.mixture.format(**names),
    }


def guide_weights(wildcards):
    """Return the weights of the weaker model of an autoguidance job: given, or trained by the rule `train`.

    The folder of a trained guide is called `.guide`: with the main model's size and another budget it would meet the
    main model's weights otherwise.
    """
    if not wildcards.ag:
        return []
    if C.guide.weights != "train":
        return C.guide.weights.format(encoder=wildcards.encoder, setting=wildcards.setting)
    checked(C.section, "model", "", C.guide.model)
    guide = replace(training_variant(wildcards), model=C.guide.model, t=None, g=None)
    names = {"encoder": wildcards.encoder, "setting": wildcards.setting, "training": f"{guide}.guide"}
    return rules.train.output.ema.format(**names)


def sampled(wildcards):
    """Return the keys of `sample` that a job's wildcards set."""
    text = f".{wildcards.training}.t{wildcards.t}{wildcards.g}"
    complete = checked(targets.parse_variant, text, wildcards.setting, C, bool(wildcards.ag))
    guidance = targets.guidance_of(complete.g, bool(wildcards.ag), C)
    return {"sample": {"time_points": complete.t, "guidance": guidance}}


def sample_operation(wildcards):
    """Return the operation keys of `sample`, and the detector whose features it writes beside the images.

    The detector is no input, because it changes no image; its file need not be there.
    """
    if not C.sample.features:
        return OPERATION["sample"]
    return f"{OPERATION['sample']} --detector {C.fid.detector} --detector-weights {shlex.quote(C.fid.weights)}"


def preview_decoder(wildcards):
    """Return the decoder for previews during training: given, or the pipeline's own once it is there.

    No input of `train`, because it changes no weight. (`ancient` would not do: Snakemake 9.27 then forgets a job whose
    output is missing or whose parameter changed if the ancient input is made in the same run.)
    """
    given = C.decoder.weights.format(encoder=wildcards.encoder)
    own = f"{RESULTS}/decoder/{wildcards.encoder}/decoder.safetensors"
    return shlex.quote(own if given == "train" else given)


def train_operation(wildcards):
    """Return the operation keys of `train`, the decoder of its previews, and by what it measures distances.

    Detector and reference change no weight, so they are no inputs, as the decoder is none; the rule of the reference
    has a priority, by which it normally comes first.
    """
    words = f"{OPERATION['train']} --decoder {preview_decoder(wildcards)}"
    if not C.train.preview.fid_every:
        return words
    weights, reference = shlex.quote(C.fid.weights), shlex.quote(REFERENCE.replace("<results>", RESULTS))
    return f"{words} --detector {C.fid.detector} --detector-weights {weights} --fid-reference {reference}"


def complete_name(wildcards, kind):
    """Return the file with the complete name behind a short one; `kind` is txt or json."""
    encoder, setting, ag, text = re.fullmatch(NAME, wildcards.request).group(1, 2, 3, 4)
    complete = checked(targets.parse_variant, text, setting, C, ag is not None)
    return f"{RESULTS}/fid/{encoder}_{setting}{ag or ''}.{complete}.{kind}"


def unknown_target(wildcards):
    """Refuse a mistyped result with the list of the valid ones; otherwise Snakemake says only that no rule makes it."""
    names = [f"{RESULTS}/fid/{e}_{setting}{ag}.txt" for e in ENCODERS for setting in SETTINGS for ag in GUIDED]
    target = f"{RESULTS}/fid/{wildcards.name}"
    raise WorkflowError(
        f"no target '{target}'{mmfm_config.did_you_mean(target, names)}. Valid targets:\n  "
        + "\n  ".join(names)
        + f"\nwith any of .seedN .MODEL ({', '.join(C.models)}) .kN .tN .gN before .txt, in this order."
    )
