"""Image generation."""


rule sample:
    input:
        encoder=processor_files,
        ema=weights_file,
        stats=STATISTICS,
        about=ABOUT_STATISTICS,
        decoder=DECODER,
        spatial_gmm=lambda wildcards: mixture_inputs(wildcards)["spatial_gmm"],
        guide=guide_weights,
    output:
        images="<results>/sample/{encoder}_{setting}{ag}/{training}{step}.t{t}{g}/images.npz",
        grid=report(
            "<results>/sample/{encoder}_{setting}{ag}/{training}{step}.t{t}{g}/grid.png",
            caption="../workflow/report/grid.rst",
            category="Samples",
            labels={
                "encoder": "{encoder}",
                "setting": "{setting}{ag}",
                "variant": "{training}{step}{g}",
                "time points": "{t}",
            },
        ),
        about="<results>/sample/{encoder}_{setting}{ag}/{training}{step}.t{t}{g}/samples.json",
    log:
        "<logs>/sample.{encoder}_{setting}{ag}.{training}{step}.t{t}{g}.log",
    benchmark:
        "<benchmarks>/sample.{encoder}_{setting}{ag}.{training}{step}.t{t}{g}.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: THREADS["sample"]
    resources:
        operation=sample_operation,
        gpu=GPUS["sample"],
        nodes=NODES["sample"],
        processes=C.processes,
        mem_mb=MEM_MB["sample"],
        runtime=RESOURCES["sample"].minutes,
        disk_mb=RESOURCES["sample"].disk_mb,
    params:
        settings=parameter("sample", sampled),
    shell:
        "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
        " --nodes {resources.nodes} -- sample --settings {params.settings:q}"
        " --ema {input.ema:q} --stats {input.stats:q} --decoder {input.decoder:q}"
        ' --encoder-weights "$(dirname {input.encoder[0]:q})" --spatial-gmm {input.spatial_gmm:q}'
        " --setting {wildcards.setting} --guide {input.guide:q}"
        ' --out-dir "$(dirname {output.images:q})" {resources.operation} 2>&1 | tee {log:q}'
