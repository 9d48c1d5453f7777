"""Whether generated images are copies of training images; short names as for distances."""


rule memorisation:
    input:
        encoder=encoder_files,
        images=rules.sample.output.images,
        about=rules.sample.output.about,
        listing=LISTING,
        train=rules.extract.output.tokens,
        heldout=rules.extract_heldout.output.tokens,
    output:
        picture="<results>/memorisation/{encoder}_{setting}{ag}.{training}{step}.t{t}{g}.png",
        json="<results>/memorisation/{encoder}_{setting}{ag}.{training}{step}.t{t}{g}.json",
    log:
        "<logs>/memorisation.{encoder}_{setting}{ag}.{training}{step}.t{t}{g}.log",
    benchmark:
        "<benchmarks>/memorisation.{encoder}_{setting}{ag}.{training}{step}.t{t}{g}.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: THREADS["fid"]
    resources:
        gpu=GPUS["fid"],
        nodes=NODES["fid"],
        processes=C.processes,
        mem_mb=MEM_MB["fid"],
        runtime=RESOURCES["fid"].minutes,
    shell:
        "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
        " --nodes {resources.nodes} -- memorisation --images {input.images:q} --samples {input.about:q}"
        " --train {input.train:q} --heldout {input.heldout:q} --listing {input.listing:q}"
        ' --encoder-weights "$(dirname {input.encoder[0]:q})" --out-png {output.picture:q} --out-json {output.json:q}'
        " 2>&1 | tee {log:q}"


# Both match a name that lacks only the guidance scale; such a name is short.
ruleorder: short_memorisation > memorisation


rule short_memorisation:
    input:
        picture=lambda wildcards: complete_name(wildcards, "png", "memorisation"),
        json=lambda wildcards: complete_name(wildcards, "json", "memorisation"),
    output:
        picture=report(
            "<results>/memorisation/{request}.png",
            caption="../workflow/report/memorisation.rst",
            category="Memorisation",
            labels={"result": "{request}"},
        ),
        json="<results>/memorisation/{request}.json",
    log:
        "<logs>/short_memorisation.{request}.log",
    benchmark:
        "<benchmarks>/short_memorisation.{request}.tsv"
    wildcard_constraints:
        request=rf"(?!{COMPLETE_NAME}\.(png|json)$){NAME}",
    localrule: True
    conda:
        "../envs/mmfm.yaml"
    threads: 1
    resources:
        mem_mb=100,
        runtime=1,
    shell:
        "(cp {input.picture:q} {output.picture:q} && cp {input.json:q} {output.json:q}) 2>&1 | tee {log:q}"
