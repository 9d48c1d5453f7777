"""The mixture of the global tokens and its spatial counterpart."""


rule fit_gmm:
    input:
        tokens=rules.extract.output.tokens,
    output:
        gmm="<results>/gmm/{encoder}/k{k}/gmm.safetensors",
        assignment="<results>/gmm/{encoder}/k{k}/assignment.safetensors",
        about="<results>/gmm/{encoder}/k{k}/report.json",
        likelihood=report(
            "<results>/gmm/{encoder}/k{k}/likelihood.png",
            caption="../workflow/report/likelihood.rst",
            category="Mixture",
            labels={"encoder": "{encoder}", "modes": "{k}", "picture": "likelihood"},
        ),
        weights=report(
            "<results>/gmm/{encoder}/k{k}/weights.png",
            caption="../workflow/report/weights.rst",
            category="Mixture",
            labels={"encoder": "{encoder}", "modes": "{k}", "picture": "weights"},
        ),
    log:
        "<logs>/fit_gmm.{encoder}.k{k}.log",
    benchmark:
        "<benchmarks>/fit_gmm.{encoder}.k{k}.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: SHARED_CORES
    resources:
        operation=OPERATION["fit_gmm"],
        gpu=GPUS,
        processes=C.processes,
        mem_mb=MEM_MB["fit_gmm"],
        runtime=NEEDS["fit_gmm"].minutes,
        disk_mb=NEEDS["fit_gmm"].disk_mb,
    params:
        settings=parameter("fit_gmm", lambda wildcards: {"gmm": {"n_components": int(wildcards.k)}}),
    shell:
        "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
        " -- fit_gmm --settings {params.settings:q}"
        ' --tokens {input.tokens:q} --out-dir "$(dirname {output.gmm:q})" {resources.operation} 2>&1 | tee {log:q}'


rule spatial_gmm:
    input:
        encoder=encoder_files,
        listing=LISTING,
        stats=rules.latent_stats.output.stats,
        about=rules.latent_stats.output.about,
        gmm=rules.fit_gmm.output.gmm,
        assignment=rules.fit_gmm.output.assignment,
    output:
        directory("<results>/spatial_gmm/{encoder}/k{k}/spatial_gmm.zarr"),
    log:
        "<logs>/spatial_gmm.{encoder}.k{k}.log",
    benchmark:
        "<benchmarks>/spatial_gmm.{encoder}.k{k}.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: ALL_CORES
    resources:
        operation=OPERATION["spatial_gmm"],
        gpu=GPUS,
        processes=C.processes,
        mem_mb=MEM_MB["spatial_gmm"],
        runtime=NEEDS["spatial_gmm"].minutes,
        disk_mb=NEEDS["spatial_gmm"].disk_mb,
    params:
        settings=parameter("spatial_gmm"),
    shell:
        "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
        " -- spatial_gmm --settings {params.settings:q}"
        ' --listing {input.listing:q} --encoder-weights "$(dirname {input.encoder[0]:q})" --stats {input.stats:q} --gmm {input.gmm:q}'
        " --assignment {input.assignment:q} --out {output:q} {resources.operation} 2>&1 | tee {log:q}"
