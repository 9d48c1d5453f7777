"""One pass over the images by the encoder; latent statistics, computed or given."""

STATISTICS = "<results>/latent_stats/{encoder}/stats.pt"
ABOUT_STATISTICS = "<results>/latent_stats/{encoder}/stats.json"


rule extract:
    input:
        encoder=encoder_files,
        listing=LISTING,
    output:
        tokens=directory("<results>/cls_tokens/{encoder}/cls_tokens.zarr"),
        moments="<results>/cls_tokens/{encoder}/latent_moments.safetensors",
    log:
        "<logs>/extract.{encoder}.log",
    benchmark:
        "<benchmarks>/extract.{encoder}.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: THREADS["extract"]
    resources:
        operation=OPERATION["extract"],
        gpu=GPUS["extract"],
        nodes=NODES["extract"],
        processes=C.processes,
        mem_mb=MEM_MB["extract"],
        runtime=RESOURCES["extract"].minutes,
        disk_mb=RESOURCES["extract"].disk_mb,
    params:
        settings=parameter("extract"),
    shell:
        "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
        " --nodes {resources.nodes} -- extract --settings {params.settings:q}"
        ' --listing {input.listing:q} --encoder-weights "$(dirname {input.encoder[0]:q})" --out-tokens {output.tokens:q}'
        " --out-moments {output.moments:q} {resources.operation} 2>&1 | tee {log:q}"


if C.latent_stats.weights == "compute":

    rule latent_stats:
        input:
            moments=rules.extract.output.moments,
        output:
            stats=STATISTICS,
            about=ABOUT_STATISTICS,
        log:
            "<logs>/latent_stats.{encoder}.log",
        benchmark:
            "<benchmarks>/latent_stats.{encoder}.tsv"
        conda:
            "../envs/mmfm.yaml"
        threads: 1
        resources:
            mem_mb=MEM_MB["latent_stats"],
            runtime=RESOURCES["latent_stats"].minutes,
            disk_mb=RESOURCES["latent_stats"].disk_mb,
        params:
            settings=parameter("latent_stats"),
        shell:
            "python -m mmfm.cli latent_stats --settings {params.settings:q} --moments {input.moments:q}"
            " --out {output.stats:q} --out-json {output.about:q} 2>&1 | tee {log:q}"

else:

    rule given_statistics:
        input:
            statistics=given_statistics,
            encoder=[] if C.latent_stats.weights == "published" else encoder_files,
        output:
            stats=STATISTICS,
            about=ABOUT_STATISTICS,
        log:
            "<logs>/given_statistics.{encoder}.log",
        benchmark:
            "<benchmarks>/given_statistics.{encoder}.tsv"
        conda:
            "../envs/mmfm.yaml"
        threads: 1
        resources:
            mem_mb=MEM_MB["latent_stats"],
            runtime=RESOURCES["latent_stats"].minutes,
            disk_mb=RESOURCES["latent_stats"].disk_mb,
        params:
            settings=parameter("latent_stats"),
            checked=lambda wildcards, input: (
                f"--encoder-weights {shlex.quote(str(Path(input.encoder[0]).parent))}"
                f" --input-size {C.encoders[wildcards.encoder].input_size}"
                if input.encoder
                else ""
            ),
        shell:
            "python -m mmfm.cli latent_stats --settings {params.settings:q} --given {input.statistics:q} {params.checked}"
            " --out {output.stats:q} --out-json {output.about:q} 2>&1 | tee {log:q}"
