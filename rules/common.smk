"""Configuration, names and resources that the rules share."""

import atexit
import logging
import re
import shlex
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

from mmfm import config as mmfm_config
from mmfm.config.choices import DETECTORS, ENCODER_FAMILIES, INCEPTION_FILE, INCEPTION_URL
from mmfm.infra.store import canonical_json, model_files
from mmfm.published import layout
from mmfm.workflow import checks, facts, failure, jobs, last_run, locks, misspelt, outlook, targets
from mmfm.workflow.resources import Estimator

MODULE = "docs/deployment.md"
"""The document that explains how another workflow imports this one."""

PUBLISHED = "docs/published.md"
"""The document that explains published files."""

METRICS = "docs/metrics.md#other-programs"
"""The document that explains files for other programs."""

MODES = "docs/metrics.md#modes"
"""The document that explains how modes are judged by their images."""

REPORTED = {
    "fid": ("Frechet distance", {"txt": {}}),
    "memorisation": ("Memorisation", {"png": {}}),
    "mode_quality": ("Modes", {"txt": {"as": "numbers"}, "png": {"as": "worst and best modes"}}),
}
"""What `--report` shows of each kind of result: its category, and more labels by the ending of a file."""

CONFIGURATION, IMAGES, RUNS = "config/README.md", "docs/your-own-data.md", "README.md#changing-stopping-resuming"
"""The documents that explain errors of the configuration, of the images and of runs."""


FAILED = failure.Record()
logger.addFilter(FAILED.keep)


def shorten_errors():
    """Leave tracebacks and the commands of failed jobs to Snakemake's own log, unless they are asked for."""
    asked = workflow.output_settings
    if workflow.is_main_process and not (asked.verbose or asked.show_failed_logs or asked.printshellcmds):
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.addFilter(FAILED.passes)
                handler.setFormatter(failure.Brief(FAILED, handler.formatter))


if not IMPORTED:
    shorten_errors()


def stop_retrying(number):
    """Retry a job no more, nor its group. What a stage refuses once, it refuses again."""
    for job in workflow.dag.jobs:
        if workflow.dag.jobid(job) == number and job.rule.module_globals is globals():
            for each in (job, workflow.dag.get_job_group(job) or job):
                each.attempt = each.restart_times + 1


FAILED.on_refusal = stop_retrying


def refusal(message):
    """Return an error that the terminal shows as its message alone."""
    FAILED.refusals.append(message)
    return WorkflowError(message)


def checked(function, *arguments, document=CONFIGURATION):
    """Call a function; a ValueError becomes a message that ends with a document."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise refusal(f"{error} (see {document})") from None


C = checked(mmfm_config.build, mmfm_config.Config, config)
RESULTS = f"results/{C.run}" if C.run else "results"

if IMPORTED and C.data.root == "demo" and not Path(HERE).is_dir():
    raise refusal(f"the demo's files are in a clone only; import that, or set 'data.root' to a folder (see {MODULE})")


pathvars:
    results=RESULTS,
    logs="<results>/logs",
    benchmarks="<results>/benchmarks",


# The rules' functions and the stages know the paths without the changes that a module statement can make to them.
if (
    IMPORTED
    and workflow.modifier.path_modifier.replace_prefix(workflow.pathvars.apply("<results>/x")) != f"{RESULTS}/x"
):
    raise refusal(f"a module can't move the results with `prefix` or `pathvars`; set the key 'run' (see {MODULE})")


ENCODERS = list(C.encoders)
SETTINGS = list(mmfm_config.SETTINGS)
COMPARED = targets.compared_settings(C)
# Fetched files lie outside the results; runs share them.
FETCHED = C.published.folder
DETECTOR = f"{FETCHED}/detectors/{INCEPTION_FILE}"
# Published weights, compared with a given reference, need no images.
NO_IMAGES = C.train.weights == "published" and C.fid.reference != "train"
# Autoguidance: the suffix of a setting's name.
GUIDED = ["", "_ag"]

# Jobs run the Python of Snakemake's own environment, even if that is not activated.
jobs.prepare_environment()

# Ctrl-C and schedulers signal all processes of a job. `tee` ignores signals so that the stage's last messages reach the
# log; it also locks the log for `refuse_start`. This is set here because changing the rules' commands would rerun
# everything.
shell.prefix(
    "set -euo pipefail; tee() {{ trap '' HUP INT TERM USR1; exec 9>> \"$1\"; flock -n 9 2> /dev/null || true; "
    'exec tee "$@"; }}; '
)


def limit(name):
    """Return the limit of a resource in the profile or on the command line; None without one."""
    found = workflow.global_resources.get(name)
    return None if found is None else found.value


def given_resources(rule):
    """Return what --set-resources gives to a rule, by the name that an importing workflow may have changed."""
    given = workflow.resource_settings._parsed_overwrite_resources
    return {name: value.raw for name, value in given.get(workflow.modifier.modify_rulename(rule), {}).items()}


# Where a profile sends jobs to other machines, `max-threads` and `gpu_per_node` say what one of them has.
MACHINE = jobs.Machine(
    cores=workflow.resource_settings.max_threads or workflow.cores or 1,
    gpus=limit("gpu") if limit("gpu_per_node") is None else limit("gpu_per_node"),
    total=limit("gpu"),
)
if workflow.is_main_process:
    jobs.tell_jobs(MACHINE)
else:
    MACHINE = jobs.told("machine", MACHINE)
    # Snakemake would cut a job's GPUs on all of its nodes down to those of the first.
    workflow.global_resources["gpu"] = sys.maxsize
# Stages that can run in parallel on a CPU take half of the cores each.
HALF = ["extract", "fit_gmm", "fid_reference", "fid"]


def share(rule, gpus=C.gpus):
    """Return what a job of a rule takes of the machines."""
    part = 2 if rule in HALF else 1
    return checked(lambda: MACHINE.share(rule, gpus, C.processes, part=part, given=given_resources(rule)))


# Estimated resources by stage, which some schedulers enforce; `mmfm scale` prints the same numbers. They are those of
# the largest encoder.
FACTS = facts.gather(C, RESULTS)
SHARES = {stage: share(stage) for stage, about in mmfm_config.STAGES.items() if about.estimated}
SHARES["latent_stats"] = jobs.Share(gpus=0, processes=1, nodes=1, threads=1)


def estimator(share, config=C):
    """Return the estimates for jobs with a share of the machines."""
    return Estimator(config, LARGEST, share.processes, share.gpus > 0, FACTS)


LARGEST = max(ENCODERS, key=lambda name: Estimator(C, name, 1, False, FACTS).encoder.flops)
RESOURCES = {stage: getattr(estimator(share), stage)() for stage, share in SHARES.items()}
# Of one node.
MEM_MB = {stage: RESOURCES[stage].mem_mb(share.processes_per_node, share.gpus > 0) for stage, share in SHARES.items()}
GPUS, NODES, THREADS = (
    {stage: getattr(share, what) for stage, share in SHARES.items()} for what in ("gpus", "nodes", "threads")
)

# Operation keys by stage, as `section.key=value`. They are passed as `resources`, which Snakemake does not compare
# between runs as it does `params`, so changing them reruns nothing.
OPERATION = {
    stage: " ".join(mmfm_config.StageConfig.of(C, stage, encoder=ENCODERS[0]).operation())
    for stage in mmfm_config.STAGES
}

if workflow.is_main_process:
    _lock = locks.clear_stale_locks(Path(".snakemake"))


wildcard_constraints:
    encoder="|".join(map(re.escape, ENCODERS)),
    features="|".join(map(re.escape, ENCODERS)),
    setting="|".join(SETTINGS),
    ag="|".join(GUIDED),
    k=r"\d+",
    t=r"\d+",
    g=r"(\.g\d+(\.\d+)?)?",
    step=r"(\.step\d+)?",
    n=r"\d+",
    training=rf"seed\d+\.{targets.any_of(C.models)}(\.k\d+)?(\.guide)?",


# A result's name: encoder, setting, autoguidance, and a variant of which any part may be missing.
NAME = rf"{targets.any_of(ENCODERS)}_{targets.any_of(SETTINGS)}(_ag)?({targets.variant_pattern(C.models)})"
# That of several seeds, which has the number of seeds first.
SEVERAL = rf"{targets.any_of(ENCODERS)}_{targets.any_of(SETTINGS)}(_ag)?({targets.seeds_pattern(C.models)})"
COMPLETE_NAME = rf"{targets.any_of(ENCODERS)}_{targets.complete_pattern(C)}"


def parameter(stage, named=lambda wildcards: {}):
    """Return a function for `params` that gives a job's parameter, the only value that Snakemake compares.

    `named` returns the keys set by the wildcards, by section, and the model.
    """

    def value(wildcards):
        encoder, setting = getattr(wildcards, "encoder", ENCODERS[0]), getattr(wildcards, "setting", "")
        return checked(lambda: jobs.stage_parameter(C, stage, encoder, setting, **named(wildcards)))

    return value


def remember_unstarted():
    """Record the configuration of a run that had nothing to do. Dry runs do not count."""
    executed = workflow.executor_plugin is not None and not workflow.dryrun and not workflow.touch
    if workflow.is_main_process and executed and Path(RESULTS).is_dir():
        remember_configuration()


def remember_configuration():
    """Record the configuration and the stages' folders for `mmfm clean` and the Python API."""
    # Rules of a workflow that imports this one are none of these.
    own = [rule for rule in workflow.rules if rule.module_globals is globals()]
    outputs = [Path(output) for rule in own for output in rule.output]
    folders = (path.relative_to(RESULTS).parts[0] for path in outputs if path.is_relative_to(RESULTS))
    last_run.save(C, RESULTS, folders)


def feature_encoder(wildcards):
    """Return the name of the encoder whose tokens are the features: the configured one, or the job's own."""
    return C.fid.encoder or getattr(wildcards, "features", None) or wildcards.encoder


def reference_file(wildcards):
    """Return the reference that a job's images are compared with."""
    names = {"features": feature_encoder(wildcards)} if C.fid.detector == "encoder" else {}
    return REFERENCE.replace("<results>", RESULTS).format(**names)


def encoder_folder(name):
    """Return an encoder's folder: the configured one, or the one it is downloaded to."""
    weights = C.encoders[name].weights
    return f"{FETCHED}/models/{weights.removeprefix('hf:')}" if weights.startswith("hf:") else weights


def names_of_files(encoder):
    """Return the names of the files that a section of `encoders` needs."""
    return model_files(ENCODER_FAMILIES[encoder.family].timm)


def encoder_files(wildcards):
    """Return the files of a job's encoder."""
    folder = encoder_folder(wildcards.encoder)
    if folder == C.encoders[wildcards.encoder].weights:
        checked(checks.encoder, wildcards.encoder, C.encoders[wildcards.encoder])
    return [f"{folder}/{name}" for name in names_of_files(C.encoders[wildcards.encoder])]


def given(key, path, remedy):
    """Return a configured path; if it does not exist, fail with one line that names the key."""
    if not Path(path).exists():
        raise refusal(f"'{key}' is '{path}', which does not exist; {remedy} (see {CONFIGURATION})")
    return path


def images_to_list(wildcards):
    """Return the demo's images; folders of the user's are no input (see list_images), but checked before a listing."""
    demo = C.data.root == "demo"
    if not Path(LISTING.replace("<results>", RESULTS)).exists():
        if not demo:
            checked(checks.images, C.data.root, document=IMAGES)
        checked(checks.heldout_images, C.data.heldout_root, document=IMAGES)
    return DEMO_IMAGES.replace("<results>", RESULTS) if demo else []


def detector_weights(wildcards):
    """Return the weights file of the detector: the configured one, or that of the encoder that gives the features."""
    checked(checks.detector, C)
    if C.fid.detector == "encoder":
        return f"{encoder_folder(feature_encoder(wildcards))}/model.safetensors"
    if C.fid.weights == "fetch":
        return DETECTOR
    return given("fid.weights", C.fid.weights, "set it to `fetch`, or see 'mmfm fid_reference --help'")


def training_variant(wildcards):
    """Return the variant in the `training` wildcard."""
    text = f".{wildcards.training.removesuffix('.guide')}"
    return checked(targets.parse_variant, text, wildcards.setting, C, document=targets.DOCUMENT)


def trained_model(wildcards):
    """Return the seed of `train`, the model, and whether it is a guide, set by a job's wildcards."""
    complete = training_variant(wildcards)
    guide = wildcards.training.endswith(".guide")
    return {"train": {"seed": complete.seed}, "model": complete.model, "guide": guide}


def trained(wildcards):
    """Return the section `train` of a training."""
    named = trained_model(wildcards)
    return C.train_of(wildcards.setting, named["model"], guide=named["guide"])


def training_share(wildcards):
    """Return what a training takes of the machines; its recipe may want other GPUs."""
    wanted = trained(wildcards).gpus
    return share("train", C.gpus if wanted == "auto" else wanted)


def training_gpus(wildcards):
    """Return the GPUs of a training."""
    return training_share(wildcards).gpus


def training_threads(wildcards):
    """Return the threads of a training on each node."""
    return training_share(wildcards).threads


def training_resources(wildcards):
    """Return the estimate of a training, whose recipe and model may differ from those of `train`."""
    return estimator(training_share(wildcards), replace(C, train=trained(wildcards))).train()


def training_mem_mb(wildcards):
    """Return the memory of a training on each node, in MB."""
    taken = training_share(wildcards)
    return training_resources(wildcards).mem_mb(taken.processes_per_node, taken.gpus > 0)


def demanded_steps(wildcards):
    """Return the steps of a training whose weights the named targets ask for."""
    if workflow.is_main_process:
        named = [name for name in workflow.dag_settings.targets if ".step" in name]
        jobs.tell_jobs(MACHINE, named)
    else:
        named = jobs.told("targets", [])
    steps = set()
    for name in named:
        try:
            asked = targets.parse_targets(name.replace(".adm.txt", ".txt"), C)
        except ValueError:
            continue  # another kind of file, or a name that the rules refuse
        for target in asked:
            training = str(replace(target.variant, t=None, g=None, step=None))
            if (target.encoder, target.setting, training) == (wildcards.encoder, wildcards.setting, wildcards.training):
                steps.add(target.variant.step)
    return steps - {None}


def weights_file(wildcards):
    """Return the weights to sample: those of the last step, or of a milestone."""
    if C.train.weights != "train":
        return given_weights_here(wildcards)
    made_by = rules.milestone if wildcards.step else rules.train
    return made_by.output.ema.format(n=wildcards.step.removeprefix(".step"), **dict(wildcards.items()))


def mixture_inputs(wildcards):
    """Return the mixture files of a job; empty for a setting without a mixture."""
    k = training_variant(wildcards).k
    if k is None:
        return {"gmm": [], "spatial_gmm": []}
    names = {"encoder": wildcards.encoder, "k": k}
    return {
        name: path.replace("<results>", RESULTS).format(**names)
        for name, path in (("gmm", GMM), ("spatial_gmm", SPATIAL))
    }


def guide_weights(wildcards):
    """Return the weights of the guide of an autoguidance job: a configured file, or an output of the rule `train`.

    A trained guide's folder ends in `.guide`, because a guide may differ from the main model only in its budget.
    """
    if not wildcards.ag:
        return []
    if C.guide.weights != "train":
        if C.guide.weights == "published":
            checked(layout.guide, C.encoders[wildcards.encoder].family, wildcards.setting, document=PUBLISHED)
        return GIVEN_GUIDE.replace("<results>", RESULTS).format(**dict(wildcards.items()))
    checked(C.section, "model", "", C.guide.model)
    guide = replace(training_variant(wildcards), model=C.guide.model, t=None, g=None, step=None)
    names = {"encoder": wildcards.encoder, "setting": wildcards.setting, "training": f"{guide}.guide"}
    return rules.train.output.ema.format(**names)


def sampled(wildcards):
    """Return the keys of `sample` set by a job's wildcards."""
    text = f".{wildcards.training}.t{wildcards.t}{wildcards.g}"
    complete = checked(targets.parse_variant, text, wildcards.setting, C, bool(wildcards.ag), document=targets.DOCUMENT)
    guidance = targets.guidance_of(complete.g, bool(wildcards.ag), C)
    return {"sample": {"time_points": complete.t, "guidance": guidance}}


def detector_file(wildcards):
    """Return the weights file of the detector for a shell command; it may be missing."""
    own = f"{encoder_folder(feature_encoder(wildcards))}/model.safetensors"
    given = DETECTOR if C.fid.weights == "fetch" else C.fid.weights
    return shlex.quote(own if C.fid.detector == "encoder" else given)


def sample_operation(wildcards):
    """Return the operation keys of `sample`, and the detector if its features are wanted.

    The detector is not an input, because it does not change the images. Its file may be missing. Given weights do not
    know the seed in the target's name.
    """
    seed = "" if C.train.weights == "train" else f" --seed {training_variant(wildcards).seed}"
    if not C.sample.features:
        return f"{OPERATION['sample']}{seed}"
    return f"{OPERATION['sample']}{seed} --detector {C.fid.detector} --detector-weights {detector_file(wildcards)}"


def preview_decoder(wildcards):
    """Return the decoder for previews during training: the configured file, or the one trained here, once it exists.

    It is not an input of `train`, because it does not affect the weights. (`ancient` does not work: if an ancient input
    is made in the same run, Snakemake 9.27 skips jobs whose output is missing or whose parameter has changed.)
    """
    given = C.decoder.weights.format(encoder=wildcards.encoder)
    own = f"{RESULTS}/decoder/{wildcards.encoder}/decoder.safetensors"
    return shlex.quote(given if given.endswith(".safetensors") else own)


def train_operation(wildcards):
    """Return the operation keys of `train`, the decoder for previews, and the files for Frechet distances.

    Like the decoder, detector and reference are not inputs, because they do not affect the weights. The priority of
    `fid_reference` makes it normally run first.
    """
    train = trained(wildcards)
    kept = tuple(sorted({*train.milestone_steps, *demanded_steps(wildcards)}))
    named = trained_model(wildcards)
    read = mmfm_config.StageConfig.of(
        C, "train", encoder=wildcards.encoder, model=named["model"], setting=wildcards.setting, guide=named["guide"]
    ).with_keys(train={"milestone_steps": kept})
    words = f"{' '.join(read.operation())} --decoder {preview_decoder(wildcards)}"
    if not train.preview.fid_every:
        return words
    detector, reference = detector_file(wildcards), shlex.quote(reference_file(wildcards))
    return f"{words} --detector {C.fid.detector} --detector-weights {detector} --fid-reference {reference}"


def fitted_mixture(wildcards):
    """Return the mixture files that a job judges the modes by; fail without modes or their training images."""
    setting = wildcards.setting
    if not mmfm_config.SETTINGS[setting].mixture:
        mixed = ", ".join(name for name, about in mmfm_config.SETTINGS.items() if about.mixture)
        raise refusal(
            f"the setting '{setting}' has a Gaussian source, which has no modes to judge; name one of {mixed} "
            f"(see {MODES})"
        )
    if C.gmm.weights != "fit":
        raise refusal(
            f"'gmm.weights' is '{C.gmm.weights}', and a mixture that was not fitted here has no training images to judge "
            f"its modes by; set it to `fit` (see {MODES})"
        )
    found = mixture_inputs(wildcards)
    return {**found, "assignment": f"{Path(found['gmm']).parent}/assignment.safetensors"}


def completed(wildcards):
    """Return encoder and setting as a name has them, and its variant, completed by the configuration."""
    encoder, setting, ag, text = re.fullmatch(NAME, wildcards.request).group(1, 2, 3, 4)
    complete = checked(targets.parse_variant, text, setting, C, ag is not None, document=targets.DOCUMENT)
    return f"{encoder}_{setting}{ag or ''}", complete


def complete_names(kind):
    """Return a function that gives the files of a kind of result with the complete name that a short one stands for."""

    def files(wildcards):
        head, complete = completed(wildcards)
        return [f"{RESULTS}/{kind}/{head}.{complete}.{ending}" for ending in targets.ENDINGS[kind]]

    return files


def short_names(kind):
    """Return the files of a kind of result under a short name, marked for `--report`."""
    category, labels = REPORTED[kind]
    files = {ending: f"<results>/{kind}/{{request}}.{ending}" for ending in targets.ENDINGS[kind]}
    for ending, more in labels.items():
        about = {"caption": f"../workflow/report/{kind}.rst", "category": category}
        files[ending] = report(files[ending], labels={"result": "{request}", **more}, **about)
    return list(files.values())


def name_pattern(kind):
    """Return a regular expression for the names of a kind of result that a rule makes."""
    heads = {"fid": f"({NAME}|{SEVERAL})", "curve": "[^/]+", "reconstruction": targets.any_of(ENCODERS)}
    found = rf"{heads.get(kind, NAME)}\.{targets.any_of(targets.ENDINGS[kind])}"
    return rf"({found}|{NAME}\.adm\.txt)" if kind == "fid" else found


def held_out(wildcards):
    """Return the listing of the held-out images; fail if there are none."""
    if not C.data.holdout and not C.data.heldout_root:
        raise refusal(
            f"there are no held-out images; set 'data.holdout' to a number of the images, or 'data.heldout_root' to a "
            f"folder of others (see {IMAGES})"
        )
    return HELDOUT.replace("<results>", RESULTS)


def referenced_images(wildcards):
    """Return the listing of the images of the reference; fail if the reference is a file already."""
    if C.fid.reference != "train":
        raise refusal(
            f"'fid.reference' is '{C.fid.reference}', so the reference is a file already; give that to other programs "
            f"(see {METRICS})"
        )
    return LISTING.replace("<results>", RESULTS)


def evaluator(wildcards):
    """Return guided-diffusion's evaluator, which lies where fetched files do; fail if it is not there."""
    folder = f"{FETCHED}/guided-diffusion"
    path = f"{folder}/evaluations/evaluator.py"
    if not Path(path).exists():
        raise refusal(
            f"there is no '{path}'; run `git clone https://github.com/openai/guided-diffusion {folder}`, or link your "
            f"copy there (see {METRICS})"
        )
    return path


def evaluated_reference(wildcards):
    """Return the reference for the original evaluator: the given file, or one of the training images."""
    if C.fid.reference != "train":
        return given_reference(wildcards)
    if C.fid.detector != "inception" or "sfid" not in C.fid.metrics:
        raise refusal(
            "the original evaluator needs moments of Inception's features: set 'fid.detector' to inception and add sfid "
            f"to 'fid.metrics', or set 'fid.reference' to an .npz (see {METRICS})"
        )
    return ADM_REFERENCE.replace("<results>", RESULTS)


def evaluated_images(wildcards):
    """Return the generated images of a result."""
    head, complete = completed(wildcards)
    return f"{RESULTS}/sample/{head}/{complete}/images.npz"


def of_seeds(wildcards):
    """Return the results of the seeds that a name stands for."""
    encoder, setting, ag, text = re.fullmatch(SEVERAL, wildcards.several).group(1, 2, 3, 4)
    found = checked(targets.parse_seeds, text, setting, C, ag is not None, document=targets.DOCUMENT)
    return [f"{RESULTS}/fid/{encoder}_{setting}{ag or ''}.{complete}.json" for complete in found]


def parsed_curve(wildcards):
    """Return what varies along a curve, and the result at each point."""
    try:
        return targets.parse_curve(wildcards.curve, C)
    except ValueError:
        raise refusal(misspelt.explain_unknown(f"{RESULTS}/curve/{wildcards.curve}.png", RESULTS, C)) from None


def of_curve(wildcards):
    """Return the results at the points of a curve."""
    found = parsed_curve(wildcards)[1]
    return [f"{RESULTS}/fid/{each.encoder}_{each.setting}{'_ag' * each.guided}.{each.variant}.json" for each in found]


def varying(wildcards):
    """Return what varies along a curve."""
    return parsed_curve(wildcards)[0]


def compared(template):
    """Return a file for every encoder and setting of the comparison; `template` may use the parts of its name."""
    found = []
    for encoder in ENCODERS:
        for setting in COMPARED:
            variant = checked(targets.parse_variant, "", setting, C)
            names = {"encoder": encoder, "setting": setting, "variant": variant, "k": variant.k}
            names["training"] = replace(variant, t=None, g=None)
            if variant.k is not None or "{k}" not in template:
                found.append(f"{RESULTS}/{template}".format(**names))
    return list(dict.fromkeys(found))


def unknown_target(wildcards):
    """Fail with what is wrong with the name; Snakemake would only say that no rule makes it."""
    folder = getattr(wildcards, "folder", RESULTS)
    raise refusal(misspelt.explain_unknown(f"{folder}/{wildcards.name}", RESULTS, C))


def refuse_start():
    """Fail if there is no scheduler to submit to, or if a job of another run is still at work on a job of this one."""
    if workflow.is_main_process:
        about = workflow.executor_plugin.name, workflow.resource_settings.max_threads
        checked(jobs.require_cluster, *about, limit("gpu"), limit("gpu_per_node"), document="docs/cluster.md")
        checked(
            locks.refuse_logs_in_use, [log for job in workflow.dag.needrun_jobs() for log in job.log], document=RUNS
        )


def summarise_failure(log):
    """Print what a failed run ends with; `log` holds the paths of Snakemake's own log."""
    # A rule without output, such as `all`, makes nothing that could be finished.
    every = Counter(job.rule.name for job in workflow.dag.jobs if job.rule.output)
    missing = Counter(job.rule.name for job in workflow.dag.needrun_jobs() if job.rule.output)
    counts = {rule.name: (every[rule.name] - missing[rule.name], every[rule.name]) for rule in workflow.rules}
    paths = [str(Path(path).relative_to(Path.cwd())) for path in log]
    lines = failure.summary(FAILED.failures(), counts, MEM_MB, ", ".join(paths), FAILED.stopped)
    if workflow.is_main_process and lines:
        print(*lines, sep="\n", file=sys.stderr, flush=True)
        FAILED.summarised = True


def say_what_comes():
    """Say what a run without a named target makes, and how long that takes."""
    named = IMPORTED or workflow.dag_settings.targets
    if workflow.is_main_process and not named and not workflow.touch:
        needed = workflow.dag.needrun_jobs(exclude_finished=False)  # a dry run finishes them all
        count = Counter(job.rule.name for job in needed if job.rule.output)
        seconds = {stage: estimate.seconds for stage, estimate in RESOURCES.items()} if FACTS.known else None
        print(outlook.outlook(rules.all.input, count, seconds), file=sys.stderr, flush=True)


def say_what_would_come():
    """Say so at the end of a dry run, which has no `onstart`."""
    if workflow.dryrun and workflow.dag is not None and any(workflow.dag.needrun_jobs(exclude_finished=False)):
        say_what_comes()
