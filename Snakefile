"""MM-FM: flow matching in the latent space of a frozen encoder, with a Gaussian mixture as the source.

    snakemake results/fid/dinov2_mode.txt --cores all

Targets: results/fid/{encoder}_{setting}[_ag][.seedN][.MODEL][.kN][.tN][.gN].txt; what is left out is taken from the
configuration.
"""

from snakemake.utils import min_version

min_version("9.27")


configfile: "config/config.yaml"


include: "rules/common.smk"
include: "rules/images.smk"
include: "rules/extract.smk"
include: "rules/mixture.smk"
include: "rules/decoder.smk"
include: "rules/train.smk"
include: "rules/sample.smk"
include: "rules/fid.smk"


# `mmfm clean` judges by the configuration of the last run. A run in which nothing is to be done never starts.
onstart:
    remember_configuration()


atexit.register(remember_unstarted)


report: "workflow/report/workflow.rst"


localrules:
    all,


rule all:
    default_target: True
    input:
        # Those that need no class folders and no second model.
        expand("<results>/fid/{encoder}_{setting}.txt", encoder=ENCODERS, setting=["uncond", "gmm", "mode"]),
