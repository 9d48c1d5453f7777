"""Frechet distance: the reference, the distance of each variant, and the short names."""

REFERENCE = "<results>/fid_reference/reference.safetensors"


rule fid_reference:
    input:
        lambda wildcards: (
            []
            if C.fid.reference == "train"
            else given("fid.reference", C.fid.reference, "set it to `train` or an .npz")
        ),
        branch(C.data.root == "demo", then=DEMO_IMAGES, otherwise=[]),
        listing=LISTING,
        heldout=HELDOUT,
        detector=detector_weights,
    output:
        REFERENCE,
    log:
        "<logs>/fid_reference.log",
    benchmark:
        "<benchmarks>/fid_reference.tsv"
    # `train` can measure distances as it goes if the reference is there.
    priority: 1
    conda:
        "../envs/mmfm.yaml"
    threads: SHARED_CORES
    resources:
        operation=OPERATION["fid_reference"],
        gpu=GPUS,
        processes=C.processes,
        mem_mb=MEM_MB["fid_reference"],
        runtime=NEEDS["fid_reference"].minutes,
        disk_mb=NEEDS["fid_reference"].disk_mb,
    params:
        settings=parameter("fid_reference"),
    shell:
        "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
        " -- fid_reference --settings {params.settings:q}"
        " --train-listing {input.listing:q} --heldout-listing {input.heldout:q} --detector-weights {input.detector:q}"
        " --out {output:q} {resources.operation} 2>&1 | tee {log:q}"


rule fid:
    input:
        images=rules.sample.output.images,
        about=rules.sample.output.about,
        reference=REFERENCE,
        detector=detector_weights,
    output:
        text="<results>/fid/{encoder}_{setting}{ag}.{training}.t{t}{g}.txt",
        json="<results>/fid/{encoder}_{setting}{ag}.{training}.t{t}{g}.json",
    log:
        "<logs>/fid.{encoder}_{setting}{ag}.{training}.t{t}{g}.log",
    benchmark:
        "<benchmarks>/fid.{encoder}_{setting}{ag}.{training}.t{t}{g}.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: SHARED_CORES
    resources:
        operation=OPERATION["fid"],
        gpu=GPUS,
        processes=C.processes,
        mem_mb=MEM_MB["fid"],
        runtime=NEEDS["fid"].minutes,
        disk_mb=NEEDS["fid"].disk_mb,
    params:
        settings=parameter("fid"),
    shell:
        "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
        " -- fid --settings {params.settings:q}"
        " --images {input.images:q} --samples {input.about:q} --reference {input.reference:q}"
        " --detector-weights {input.detector:q} --out-txt {output.text:q} --out-json {output.json:q}"
        " {resources.operation} 2>&1 | tee {log:q}"


localrules:
    short_name,


# Both match a name that says all but a scale of guidance; it is a short one.
ruleorder: short_name > fid


# results/fid/dinov2_mode.txt and results/fid/dinov2_mode.k512.txt stand for what the configuration says of the rest.
rule short_name:
    input:
        text=lambda wildcards: complete_name(wildcards, "txt"),
        json=lambda wildcards: complete_name(wildcards, "json"),
    output:
        text=report(
            "<results>/fid/{request}.txt",
            caption="../workflow/report/fid.rst",
            category="Frechet distance",
            labels={"result": "{request}"},
        ),
        json="<results>/fid/{request}.json",
    log:
        "<logs>/short_name.{request}.log",
    benchmark:
        "<benchmarks>/short_name.{request}.tsv"
    wildcard_constraints:
        request=rf"(?!{COMPLETE_NAME}\.(txt|json)$){NAME}",
    conda:
        "../envs/mmfm.yaml"
    threads: 1
    resources:
        mem_mb=100,
        runtime=1,
    shell:
        "(cp {input.text:q} {output.text:q} && cp {input.json:q} {output.json:q} && cat {output.text:q}) 2>&1 | tee {log:q}"


rule unknown_target:
    input:
        unknown_target,
    output:
        "<results>/fid/{name}",
    log:
        "<logs>/unknown_target.{name}.log",
    wildcard_constraints:
        name=rf"(?!{NAME}\.(txt|json)$)[^/]+",
    conda:
        "../envs/mmfm.yaml"
    shell:
        "false 2> {log:q}"


# With `run` set, results lie one folder deeper: whoever forgets it gets the list, too.
if C.run:

    rule unknown_run:
        input:
            unknown_target,
        output:
            "results/fid/{name}",
        log:
            "<logs>/unknown_run.{name}.log",
        conda:
            "../envs/mmfm.yaml"
        shell:
            "false 2> {log:q}"
