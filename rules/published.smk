"""Fetching: encoders, published files, the detector's weights."""

TIMM_MODELS = [
    about.weights.removeprefix("hf:")
    for about in C.encoders.values()
    if about.weights.startswith("hf:") and ENCODER_FAMILIES[about.family].timm
]


# Fetching rules alone need a network. They are no part of the stages, so that ranks never race to download.
rule fetch_encoder:
    output:
        config=f"{FETCHED}/models/{{model}}/config.json",
        processor=f"{FETCHED}/models/{{model}}/preprocessor_config.json",
        weights=f"{FETCHED}/models/{{model}}/model.safetensors",
    log:
        "<logs>/fetch_encoder.{model}.log",
    benchmark:
        "<benchmarks>/fetch_encoder.{model}.tsv"
    wildcard_constraints:
        model=rf"(?!{targets.any_of(TIMM_MODELS)}/)[^/]+/[^/]+" if TIMM_MODELS else "[^/]+/[^/]+",
    localrule: True
    conda:
        "../envs/mmfm.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=60,
    shell:
        'python -m mmfm.cli fetch --repository {wildcards.model:q} --folder "$(dirname {output.config:q})"'
        " config.json preprocessor_config.json model.safetensors 2>&1 | tee {log:q}"


# timm's models have no preprocessor_config.json.
rule fetch_timm_encoder:
    output:
        config=f"{FETCHED}/models/{{model}}/config.json",
        weights=f"{FETCHED}/models/{{model}}/model.safetensors",
    log:
        "<logs>/fetch_timm_encoder.{model}.log",
    benchmark:
        "<benchmarks>/fetch_timm_encoder.{model}.tsv"
    wildcard_constraints:
        model=targets.any_of(TIMM_MODELS) if TIMM_MODELS else "(?!)",
    localrule: True
    conda:
        "../envs/mmfm.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=60,
    shell:
        'python -m mmfm.cli fetch --repository {wildcards.model:q} --folder "$(dirname {output.config:q})"'
        " config.json model.safetensors 2>&1 | tee {log:q}"


rule fetch_published:
    output:
        f"{FETCHED}/{{file}}",
    log:
        "<logs>/fetch_published.{file}.log",
    benchmark:
        "<benchmarks>/fetch_published.{file}.tsv"
    wildcard_constraints:
        file=rf"{targets.any_of(layout.FOLDERS)}/.+",
    localrule: True
    conda:
        "../envs/mmfm.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=720,
        # As resources, which Snakemake does not compare: another revision does not delete what was fetched.
        repository=C.published.repository,
        revision=C.published.revision,
        folder=FETCHED,
    shell:
        "python -m mmfm.cli fetch --repository {resources.repository:q} --revision {resources.revision:q}"
        " --folder {resources.folder:q} {wildcards.file:q} 2>&1 | tee {log:q}"


rule fetch_detector:
    output:
        DETECTOR,
    log:
        "<logs>/fetch_detector.log",
    benchmark:
        "<benchmarks>/fetch_detector.tsv"
    localrule: True
    conda:
        "../envs/mmfm.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=60,
    params:
        url=INCEPTION_URL,
    shell:
        "python -m mmfm.cli fetch --url {params.url:q} {output:q} 2>&1 | tee {log:q}"


# For a login node with a network: all that the configuration can need.
rule fetched:
    input:
        fetchable,
    output:
        "<results>/fetched.txt",
    log:
        "<logs>/fetched.log",
    benchmark:
        "<benchmarks>/fetched.tsv"
    localrule: True
    conda:
        "../envs/mmfm.yaml"
    threads: 1
    resources:
        mem_mb=100,
        runtime=10,
    shell:
        "(printf '%s\\n' {input:q} > {output:q}) 2>&1 | tee {log:q}"


# Sampling needs of an encoder only how it normalises pixels.
rule processor:
    output:
        "<results>/processor/{encoder}/preprocessor_config.json",
    log:
        "<logs>/processor.{encoder}.log",
    benchmark:
        "<benchmarks>/processor.{encoder}.tsv"
    localrule: True
    conda:
        "../envs/mmfm.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        family=lambda wildcards: C.encoders[wildcards.encoder].family,
    shell:
        "python -m mmfm.cli import processor {params.family} --out {output:q} 2>&1 | tee {log:q}"
