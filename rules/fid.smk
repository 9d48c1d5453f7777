"""Frechet distance: the reference, the distance of each variant, and the short names."""

FID = R + "fid/{encoder}_{setting}"
REFERENCE = R + "fid_reference/reference.safetensors"


rule fid_reference:
    input:
        branch(C.fid.reference == "train", then=[], otherwise=C.fid.reference),
        branch(C.data.root == "demo", then=DEMO_IMAGES, otherwise=[]),
        listing=LISTING,
        heldout=HELDOUT,
        detector=C.fid.weights,
    output:
        REFERENCE,
    log:
        R + "logs/fid_reference.log",
    benchmark:
        R + "benchmarks/fid_reference.tsv"
    params:
        settings=parameter("fid_reference"),
    threads: SHARED_CORES
    resources:
        gpu=GPUS,
        mem_mb=4000,
        runtime=720,
    conda:
        "../envs/mmfm.yaml"
    shell:
        "{LAUNCH} --gpus {resources.gpu} --threads {threads} -- fid_reference --settings {params.settings:q}"
        " --train-listing {input.listing:q} --heldout-listing {input.heldout:q} --detector-weights {input.detector:q}"
        " --out {output:q} {OPERATION[fid_reference]} 2>&1 | tee {log:q}"


rule fid:
    input:
        images=rules.sample.output.images,
        about=rules.sample.output.about,
        reference=REFERENCE,
        detector=C.fid.weights,
    output:
        text=FID + ".{training}.t{t}.txt",
        json=FID + ".{training}.t{t}.json",
    log:
        R + "logs/fid.{encoder}_{setting}.{training}.t{t}.log",
    benchmark:
        R + "benchmarks/fid.{encoder}_{setting}.{training}.t{t}.tsv"
    params:
        settings=parameter("fid"),
    threads: SHARED_CORES
    resources:
        gpu=GPUS,
        mem_mb=4000,
        runtime=120,
    conda:
        "../envs/mmfm.yaml"
    shell:
        "{LAUNCH} --gpus {resources.gpu} --threads {threads} -- fid --settings {params.settings:q}"
        " --images {input.images:q} --samples {input.about:q} --reference {input.reference:q}"
        " --detector-weights {input.detector:q} --out-txt {output.text:q} --out-json {output.json:q}"
        " {OPERATION[fid]} 2>&1 | tee {log:q}"


localrules:
    short_name,


_REQUEST = rf"(?P<e>{'|'.join(map(re.escape, ENCODERS))})_(?P<s>{'|'.join(SETTINGS)})(?P<v>{wf.variant_pattern(C.models)})"
_COMPLETE = rf"({'|'.join(map(re.escape, ENCODERS))})_{wf.complete_pattern(C.models)}"
# Snakemake writes one regular expression of all wildcards: named groups of our own would collide in it.
_PLAIN = re.sub(r"\?P<\w>", "", _REQUEST)


def complete_name(wildcards):
    """Return the file with the complete name behind a short one."""
    match = re.fullmatch(_REQUEST, wildcards.request)
    full = checked(wf.parse_variant, match["v"], match["s"], C)
    return R + f"fid/{match['e']}_{match['s']}.{full}.{wildcards.kind}"


# results/fid/dinov2_mode.txt and results/fid/dinov2_mode.k512.txt stand for what the configuration says of the rest.
rule short_name:
    input:
        complete_name,
    output:
        report(
            R + "fid/{request}.{kind}",
            caption="../workflow/report/fid.rst",
            category="Frechet distance",
            labels={"result": "{request}", "file": "{kind}"},
        ),
    log:
        R + "logs/short_name.{request}.{kind}.log",
    benchmark:
        R + "benchmarks/short_name.{request}.{kind}.tsv"
    wildcard_constraints:
        kind="txt|json",
        request=rf"(?!{_COMPLETE}\.(txt|json)$){_PLAIN}",
    threads: 1
    resources:
        mem_mb=100,
        runtime=1,
    conda:
        "../envs/mmfm.yaml"
    shell:
        "(cp {input:q} {output:q} && cat {output:q}) 2>&1 | tee {log:q}"


def unknown_target(wildcards):
    """Refuse a mistyped result with the list of the valid ones; otherwise Snakemake says only that no rule makes it."""
    names = [f"{R}fid/{encoder}_{setting}.txt" for encoder in ENCODERS for setting in SETTINGS]
    target = f"{R}fid/{wildcards.name}"
    raise WorkflowError(
        f"no target '{target}'{mmfm_config.nearest(target, names)}. Valid targets:\n  "
        + "\n  ".join(names)
        + f"\nwith any of .seedN .MODEL ({', '.join(C.models)}) .kN .tN before .txt, in this order."
    )


rule unknown_target:
    input:
        unknown_target,
    output:
        R + "fid/{name}",
    log:
        R + "logs/unknown_target.{name}.log",
    wildcard_constraints:
        name=rf"(?!{_PLAIN}\.(txt|json)$)[^/]+",
    conda:
        "../envs/mmfm.yaml"
    shell:
        "false 2> {log:q}"
