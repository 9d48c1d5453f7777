"""Flow matching in the latent space."""

TRAIN = R + "train/{encoder}_{setting}/{training}/"


wildcard_constraints:
    training=rf"seed\d+\.({'|'.join(map(re.escape, C.models))})(\.k\d+)?",


def training_variant(wildcards):
    """Return the complete variant behind the `training` wildcard."""
    return checked(wf.parse_variant, "." + wildcards.training, wildcards.setting, C)


def mixture_inputs(wildcards):
    """Return the mixture's files of a job, none for a setting without a mixture."""
    complete = checked(wf.parse_variant, "." + wildcards.training, wildcards.setting, C)
    if complete.k is None:
        return {}
    names = {"encoder": wildcards.encoder, "k": complete.k}
    return {
        "gmm": rules.fit_gmm.output.gmm.format(**names),
        "spatial_gmm": rules.spatial_gmm.output[0].format(**names),
    }


def mixture_flags(wildcards, input):
    """Return the arguments that name the mixture's files, for commands that take them."""
    return " ".join(f"--{name.replace('_', '-')} {input[name]}" for name in mixture_inputs(wildcards))


rule train:
    input:
        encoder_files,
        unpack(mixture_inputs),
        listing=LISTING,
        stats=rules.latent_stats.output.stats,
        # Only the previews need it, so a newer decoder does not train the model again.
        decoder=ancient(DECODER),
    output:
        ema=TRAIN + "ema.safetensors",
        history=TRAIN + "history.jsonl",
        curve=report(
            TRAIN + "curve.png",
            caption="../workflow/report/curve.rst",
            category="Training",
            labels={"encoder": "{encoder}", "setting": "{setting}", "variant": "{training}", "picture": "curve"},
        ),
        preview=report(
            TRAIN + "preview.png",
            caption="../workflow/report/preview.rst",
            category="Training",
            labels={"encoder": "{encoder}", "setting": "{setting}", "variant": "{training}", "picture": "preview"},
        ),
    log:
        R + "logs/train.{encoder}_{setting}.{training}.log",
    benchmark:
        R + "benchmarks/train.{encoder}_{setting}.{training}.tsv"
    params:
        settings=lambda wildcards: checked(
            lambda: wf.stage_parameter(
                C,
                "train",
                wildcards.encoder,
                training_variant(wildcards).model,
                train={"seed": training_variant(wildcards).seed, "model": training_variant(wildcards).model},
            )
        ),
        folder=encoder_folder,
        mixture=mixture_flags,
    threads: ALL_CORES
    resources:
        gpu=GPUS,
        mem_mb=8000,
        runtime=7200,
        disk_mb=40000,
    conda:
        "../envs/mmfm.yaml"
    shell:
        "{LAUNCH} --gpus {resources.gpu} --threads {threads} -- train --settings {params.settings:q}"
        " --setting {wildcards.setting} --listing {input.listing:q} --encoder-weights {params.folder:q}"
        " --stats {input.stats:q} --decoder {input.decoder:q} {params.mixture}"
        " --out-dir $(dirname {output.ema:q}) {OPERATION[train]} 2>&1 | tee {log:q}"
