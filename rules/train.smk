"""Training of the flow-matching model."""


rule train:
    input:
        unpack(mixture_inputs),
        encoder=encoder_files,
        listing=LISTING,
        stats=rules.latent_stats.output.stats,
        about=rules.latent_stats.output.about,
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
        mem_mb=MEM_MB["train"],
        runtime=RESOURCES["train"].minutes,
        disk_mb=RESOURCES["train"].disk_mb,
    params:
        settings=parameter("train", trained_model),
    shell:
        "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
        " -- train --settings {params.settings:q}"
        ' --setting {wildcards.setting} --listing {input.listing:q} --encoder-weights "$(dirname {input.encoder[0]:q})"'
        " --stats {input.stats:q} --gmm {input.gmm:q} --spatial-gmm {input.spatial_gmm:q}"
        ' --out-dir "$(dirname {output.ema:q})" {resources.operation} 2>&1 | tee {log:q}'
