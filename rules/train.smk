"""Training of the flow-matching model, and the weights of its milestones."""


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
    threads: ALL_CORES
    resources:
        operation=train_operation,
        gpu=GPUS,
        processes=C.processes,
        mem_mb=lambda wildcards: training_resources(wildcards).mem_mb(PROCESSES, GPUS > 0),
        runtime=lambda wildcards: training_resources(wildcards).minutes,
        disk_mb=lambda wildcards: training_resources(wildcards).disk_mb,
    params:
        settings=parameter("train", trained_model),
    shell:
        "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
        " -- train --settings {params.settings:q}"
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
