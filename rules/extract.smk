"""Encoder: fetched where it is not a local folder; one pass over the images; latent statistics."""


localrules:
    fetch_encoder,


# The only rules with network access are the fetching ones: eight ranks never race to download.
rule fetch_encoder:
    output:
        config=R + "fetched/{encoder}/config.json",
        processor=R + "fetched/{encoder}/preprocessor_config.json",
        weights=R + "fetched/{encoder}/model.safetensors",
    log:
        R + "logs/fetch_encoder.{encoder}.log",
    benchmark:
        R + "benchmarks/fetch_encoder.{encoder}.tsv"
    params:
        model=lambda wildcards: C.encoders[wildcards.encoder].weights.removeprefix("hf:"),
    threads: 1
    resources:
        mem_mb=1000,
        runtime=60,
    conda:
        "../envs/mmfm.yaml"
    shell:
        "hf download {params.model:q} config.json preprocessor_config.json model.safetensors"
        " --local-dir $(dirname {output.config:q}) 2>&1 | tee {log:q}"


rule extract:
    input:
        encoder_files,
        listing=LISTING,
    output:
        tokens=directory(R + "cls_tokens/{encoder}/cls_tokens.zarr"),
        moments=R + "cls_tokens/{encoder}/latent_moments.safetensors",
    log:
        R + "logs/extract.{encoder}.log",
    benchmark:
        R + "benchmarks/extract.{encoder}.tsv"
    params:
        settings=parameter("extract"),
        folder=encoder_folder,
    threads: SHARED_CORES
    resources:
        gpu=GPUS,
        mem_mb=4000,
        runtime=720,
        disk_mb=5000,
    conda:
        "../envs/mmfm.yaml"
    shell:
        "{LAUNCH} --gpus {resources.gpu} --threads {threads} -- extract --settings {params.settings:q}"
        " --listing {input.listing:q} --encoder-weights {params.folder:q} --out-tokens {output.tokens:q}"
        " --out-moments {output.moments:q} {OPERATION[extract]} 2>&1 | tee {log:q}"


rule latent_stats:
    input:
        moments=rules.extract.output.moments,
    output:
        stats=R + "latent_stats/{encoder}/stats.pt",
        about=R + "latent_stats/{encoder}/stats.json",
    log:
        R + "logs/latent_stats.{encoder}.log",
    benchmark:
        R + "benchmarks/latent_stats.{encoder}.tsv"
    params:
        settings=parameter("latent_stats"),
    threads: 1
    resources:
        mem_mb=2000,
        runtime=5,
    conda:
        "../envs/mmfm.yaml"
    shell:
        "python -m mmfm.cli latent_stats --settings {params.settings:q} --moments {input.moments:q}"
        " --out {output.stats:q} --out-json {output.about:q} 2>&1 | tee {log:q}"
