"""Weights of the flow-matching model: trained here, with those of milestones, or given; and of the guide."""

GIVEN = "<results>/train/{encoder}_{setting}/given{step}/ema.safetensors"
GIVEN_GUIDE = "<results>/train/{encoder}_{setting}/given.guide/ema.safetensors"


# Also where the weights are given: a guide may be trained for them.
rule train:
    input:
        unpack(mixture_inputs),
        encoder=encoder_files,
        listing=LISTING,
        stats=STATISTICS,
        about=ABOUT_STATISTICS,
    output:
        ema="<results>/train/{encoder}_{setting}/{training}/ema.safetensors",
        history="<results>/train/{encoder}_{setting}/{training}/history.jsonl",
        curve=report(
            "<results>/train/{encoder}_{setting}/{training}/curve.png",
            caption="../workflow/report/curve.rst",
            category="Training",
            labels={"encoder": "{encoder}", "setting": "{setting}", "variant": "{training}", "picture": "curve"},
        ),
    log:
        "<logs>/train.{encoder}_{setting}.{training}.log",
    benchmark:
        "<benchmarks>/train.{encoder}_{setting}.{training}.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: training_threads
    resources:
        operation=train_operation,
        gpu=training_gpus,
        nodes=NODES["train"],
        processes=C.processes,
        mem_mb=training_mem_mb,
        runtime=lambda wildcards: training_resources(wildcards).minutes,
        disk_mb=lambda wildcards: training_resources(wildcards).disk_mb,
    params:
        settings=parameter("train", trained_model),
    shell:
        "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
        " --nodes {resources.nodes} -- train --settings {params.settings:q}"
        ' --setting {wildcards.setting} --listing {input.listing:q} --encoder-weights "$(dirname {input.encoder[0]:q})"'
        " --stats {input.stats:q} --gmm {input.gmm:q} --spatial-gmm {input.spatial_gmm:q}"
        ' --out-dir "$(dirname {output.ema:q})" {resources.operation} 2>&1 | tee {log:q}'


# The weights of an earlier step, from the checkpoint that the training kept.
rule milestone:
    input:
        ema=rules.train.output.ema,
    output:
        ema="<results>/train/{encoder}_{setting}/{training}.step{n}/ema.safetensors",
    log:
        "<logs>/milestone.{encoder}_{setting}.{training}.step{n}.log",
    benchmark:
        "<benchmarks>/milestone.{encoder}_{setting}.{training}.step{n}.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: 1
    resources:
        mem_mb=MEM_MB["latent_stats"],
        runtime=30,
        disk_mb=RESOURCES["sample"].disk_mb,
    shell:
        "python -m mmfm.cli milestone --ema {input.ema:q} --step {wildcards.n} --out {output.ema:q} 2>&1 | tee {log:q}"


rule import_weights:
    input:
        source=given_weights,
        stats=STATISTICS,
    output:
        ema=GIVEN,
    log:
        "<logs>/import_weights.{encoder}_{setting}{step}.log",
    benchmark:
        "<benchmarks>/import_weights.{encoder}_{setting}{step}.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: 1
    resources:
        mem_mb=MEM_MB["latent_stats"],
        runtime=30,
        disk_mb=RESOURCES["sample"].disk_mb,
    params:
        expected=lambda wildcards: expected_weights(wildcards, C.train.model, published_step(wildcards)),
    shell:
        "python -m mmfm.cli import weights {input.source:q} --out {output.ema:q} --stats {input.stats:q}"
        " --expected {params.expected:q} 2>&1 | tee {log:q}"


use rule import_weights as import_guide with:
    input:
        source=given_guide,
        stats=STATISTICS,
    output:
        ema=GIVEN_GUIDE,
    log:
        "<logs>/import_guide.{encoder}_{setting}.log",
    benchmark:
        "<benchmarks>/import_guide.{encoder}_{setting}.tsv"
    params:
        expected=lambda wildcards: expected_weights(
            wildcards, C.guide.model, layout.GUIDE_STEP if C.guide.weights == "published" else None
        ),
