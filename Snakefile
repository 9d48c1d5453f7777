"""MM-FM: flow matching in the latent space of a frozen encoder, with a Gaussian mixture as the source.

    snakemake results/fid/dinov2_mode.txt

Targets: results/fid/{encoder}_{setting}[_ag][.seedN][.MODEL][.kN][.stepN][.tN][.gN].txt; with .seedsN in the place of
.seedN, mean and range of N seeds. Parts that are left out are taken from the configuration. Names of one seed are also
those of results/mode_quality/NAME.png, the modes whose images are poor.
"""

from pathlib import Path

from snakemake.utils import min_version

from mmfm.config import demo_layer, imported

min_version("9.27")

# Whether another workflow imports this one as a module, with a configuration of its own (docs/deployment.md).
IMPORTED = not workflow.modifier.is_main_snakefile()
# The folder of the demo's files, with a slash at its end.
HERE = ""

if IMPORTED or not Path("config/config.yaml").exists():
    layers = [Path(workflow.source_path(f"config/{name}.yaml")) for name in ("config", "demo")]
    HERE = f"{Path(workflow.current_basedir.get_path_or_uri(secret_free=True)).resolve()}/"
    config = imported(config, *layers, Path(HERE))
else:

    configfile: "config/config.yaml"

    # The demo's values lie between the defaults and the user's own, exactly when its images are used.
    for layer in demo_layer(config, "config/config.yaml"):

        configfile: layer


include: "rules/common.smk"
include: "rules/given.smk"
include: "rules/images.smk"
include: "rules/published.smk"
include: "rules/extract.smk"
include: "rules/mixture.smk"
include: "rules/decoder.smk"
include: "rules/train.smk"
include: "rules/sample.smk"
include: "rules/fid.smk"
include: "rules/memorisation.smk"
include: "rules/mode_quality.smk"
include: "rules/names.smk"
include: "rules/compare.smk"


# Record the configuration for `mmfm clean`. A run that has nothing to do never starts.
onstart:
    refuse_start()
    say_fetches()
    remember_configuration()
    say_what_comes()


atexit.register(remember_unstarted)
if not IMPORTED:
    atexit.register(say_what_would_come)


onerror:
    summarise_failure(log)


report: "workflow/report/workflow.rst"


rule all:
    default_target: True
    input:
        expand("<results>/fid/{encoder}_{setting}.txt", encoder=ENCODERS, setting=COMPARED),
        rules.comparison.output,
    localrule: True
