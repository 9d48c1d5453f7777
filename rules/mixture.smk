"""The mixture of the global tokens and its spatial counterpart."""

GMM = R + "gmm/{encoder}/k{k}/"


rule fit_gmm:
    input:
        tokens=rules.extract.output.tokens,
    output:
        gmm=GMM + "gmm.safetensors",
        assignment=GMM + "assignment.safetensors",
        about=GMM + "report.json",
        likelihood=report(
            GMM + "likelihood.png",
            caption="../workflow/report/likelihood.rst",
            category="Mixture",
            labels={"encoder": "{encoder}", "modes": "{k}", "picture": "likelihood"},
        ),
        weights=report(
            GMM + "weights.png",
            caption="../workflow/report/weights.rst",
            category="Mixture",
            labels={"encoder": "{encoder}", "modes": "{k}", "picture": "weights"},
        ),
    log:
        R + "logs/fit_gmm.{encoder}.k{k}.log",
    benchmark:
        R + "benchmarks/fit_gmm.{encoder}.k{k}.tsv"
    params:
        settings=parameter("fit_gmm", gmm=lambda wildcards: {"n_components": int(wildcards.k)}),
    threads: SHARED_CORES
    resources:
        gpu=GPUS,
        mem_mb=8000,
        runtime=720,
    conda:
        "../envs/mmfm.yaml"
    shell:
        "{LAUNCH} --gpus {resources.gpu} --threads {threads} -- fit_gmm --settings {params.settings:q}"
        " --tokens {input.tokens:q} --out-dir $(dirname {output.gmm:q}) {OPERATION[fit_gmm]} 2>&1 | tee {log:q}"


rule spatial_gmm:
    input:
        encoder_files,
        listing=LISTING,
        stats=rules.latent_stats.output.stats,
        gmm=rules.fit_gmm.output.gmm,
        assignment=rules.fit_gmm.output.assignment,
    output:
        directory(R + "spatial_gmm/{encoder}/k{k}/spatial_gmm.zarr"),
    log:
        R + "logs/spatial_gmm.{encoder}.k{k}.log",
    benchmark:
        R + "benchmarks/spatial_gmm.{encoder}.k{k}.tsv"
    params:
        settings=parameter("spatial_gmm"),
        folder=encoder_folder,
    threads: ALL_CORES
    resources:
        gpu=GPUS,
        mem_mb=4000,
        runtime=720,
        disk_mb=15000,
    conda:
        "../envs/mmfm.yaml"
    shell:
        "{LAUNCH} --gpus {resources.gpu} --threads {threads} -- spatial_gmm --settings {params.settings:q}"
        " --listing {input.listing:q} --encoder-weights {params.folder:q} --stats {input.stats:q} --gmm {input.gmm:q}"
        " --assignment {input.assignment:q} --out {output:q} {OPERATION[spatial_gmm]} 2>&1 | tee {log:q}"
