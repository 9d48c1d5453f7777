"""Frechet distances: the reference, one result per variant, those of several seeds, curves."""

# With the detector `encoder` there is a reference for each encoder whose tokens are the features.
_FEATURES = "{features}/" if C.fid.detector == "encoder" else ""
_DOTTED = ".{features}" if C.fid.detector == "encoder" else ""
REFERENCE = f"<results>/fid_reference/{_FEATURES}reference.safetensors"
ADM_REFERENCE = f"<results>/fid_reference/{_FEATURES}reference.npz"
# On a CPU, a slow detector must not keep the other stages waiting for cores: it runs when nothing else can.
_SLOW = not GPUS["fid_reference"] and bool(DETECTORS[C.fid.detector].cpu_rate)


rule fid_reference:
    input:
        given_reference,
        branch(C.data.root == "demo", then=DEMO_IMAGES, otherwise=[]),
        listing=[] if NO_IMAGES else LISTING,
        heldout=[] if NO_IMAGES else HELDOUT,
        detector=detector_weights,
    output:
        REFERENCE,
    log:
        f"<logs>/fid_reference{_DOTTED}.log",
    benchmark:
        f"<benchmarks>/fid_reference{_DOTTED}.tsv"
    # If the reference exists, `train` can measure distances.
    priority: -1 if _SLOW else 1
    conda:
        "../envs/mmfm.yaml"
    threads: MACHINE.cores if _SLOW else THREADS["fid_reference"]
    resources:
        operation=reference_operation,
        gpu=GPUS["fid_reference"],
        nodes=NODES["fid_reference"],
        processes=C.processes,
        mem_mb=MEM_MB["fid_reference"],
        runtime=RESOURCES["fid_reference"].minutes,
        disk_mb=RESOURCES["fid_reference"].disk_mb,
    params:
        settings=parameter("fid_reference"),
    shell:
        "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
        " --nodes {resources.nodes} -- fid_reference --settings {params.settings:q}"
        " --train-listing {input.listing:q} --heldout-listing {input.heldout:q} --detector-weights {input.detector:q}"
        " --out {output:q} {resources.operation} 2>&1 | tee {log:q}"


# The reference in the format of the ADM evaluator, for other programs.
rule adm_reference:
    input:
        reference=REFERENCE,
        listing=referenced_images,
    output:
        ADM_REFERENCE,
    log:
        f"<logs>/adm_reference{_DOTTED}.log",
    benchmark:
        f"<benchmarks>/adm_reference{_DOTTED}.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: THREADS["fid_reference"]
    resources:
        workers=C.fid.workers,
        mem_mb=MEM_MB["fid_reference"],
        runtime=60,
        disk_mb=C.fid.reference_images * C.image.size**2 * 3 // 10**6 + 200,
    params:
        images=C.fid.reference_images,
    shell:
        "python -m mmfm.cli adm_reference --reference {input.reference:q} --listing {input.listing:q}"
        " --images {params.images} --workers {resources.workers} --out {output:q} 2>&1 | tee {log:q}"


rule fid:
    input:
        images=rules.sample.output.images,
        about=rules.sample.output.about,
        reference=reference_file,
        detector=detector_weights,
    output:
        text="<results>/fid/{encoder}_{setting}{ag}.{training}{step}.t{t}{g}.txt",
        json="<results>/fid/{encoder}_{setting}{ag}.{training}{step}.t{t}{g}.json",
    log:
        "<logs>/fid.{encoder}_{setting}{ag}.{training}{step}.t{t}{g}.log",
    benchmark:
        "<benchmarks>/fid.{encoder}_{setting}{ag}.{training}{step}.t{t}{g}.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: THREADS["fid"]
    resources:
        operation=OPERATION["fid"],
        gpu=GPUS["fid"],
        nodes=NODES["fid"],
        processes=C.processes,
        mem_mb=MEM_MB["fid"],
        runtime=RESOURCES["fid"].minutes,
        disk_mb=RESOURCES["fid"].disk_mb,
    params:
        settings=parameter("fid"),
    shell:
        "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
        " --nodes {resources.nodes} -- fid --settings {params.settings:q}"
        " --images {input.images:q} --samples {input.about:q} --reference {input.reference:q}"
        " --detector-weights {input.detector:q} --out-txt {output.text:q} --out-json {output.json:q}"
        " {resources.operation} 2>&1 | tee {log:q}"


# Mean and range of several seeds: results/fid/dinov2_mode.seeds5.txt has those of the seeds 0 to 4.
rule seeds:
    input:
        of_seeds,
    output:
        text=report(
            "<results>/fid/{several}.txt",
            caption="../workflow/report/seeds.rst",
            category="Frechet distance",
            labels={"result": "{several}"},
        ),
        json="<results>/fid/{several}.json",
    log:
        "<logs>/seeds.{several}.log",
    benchmark:
        "<benchmarks>/seeds.{several}.tsv"
    wildcard_constraints:
        several=SEVERAL,
    localrule: True
    conda:
        "../envs/mmfm.yaml"
    threads: 1
    resources:
        mem_mb=100,
        runtime=1,
    shell:
        "python -m mmfm.cli seeds {input:q} --out-txt {output.text:q} --out-json {output.json:q} 2>&1 | tee {log:q}"


# Metrics along what varies: results/curve/dinov2_mode.t5,10,25.png, or .step31,62 or .g1,1.5,2 or .k64,256.
rule curve:
    input:
        of_curve,
    output:
        picture=report(
            "<results>/curve/{curve}.png",
            caption="../workflow/report/metric_curve.rst",
            category="Curves",
            labels={"result": "{curve}"},
        ),
        text="<results>/curve/{curve}.txt",
        json="<results>/curve/{curve}.json",
    log:
        "<logs>/curve.{curve}.log",
    benchmark:
        "<benchmarks>/curve.{curve}.tsv"
    wildcard_constraints:
        curve=r"[^/]+",
    localrule: True
    conda:
        "../envs/mmfm.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=1,
    params:
        varies=varying,
    shell:
        "python -m mmfm.cli curve {params.varies} {input:q} --out-png {output.picture:q} --out-txt {output.text:q}"
        " --out-json {output.json:q} 2>&1 | tee {log:q}"


# The numbers of guided-diffusion's own evaluator, which needs TensorFlow and so an environment of its own.
rule adm_evaluator:
    input:
        evaluator=evaluator,
        reference=evaluated_reference,
        images=evaluated_images,
    output:
        "<results>/fid/{request}.adm.txt",
    log:
        "<logs>/adm_evaluator.{request}.log",
    benchmark:
        "<benchmarks>/adm_evaluator.{request}.tsv"
    wildcard_constraints:
        request=NAME,
    conda:
        "../envs/tf-evaluator.yaml"
    threads: THREADS["fid"]
    resources:
        script=workflow.source_path("../workflow/scripts/run_evaluator.py"),
        gpu=min(1, GPUS["fid"]),
        # Features and spatial features of 60,000 images, and distances of 10,000 from 50,000 twice.
        mem_mb=16000,
        runtime=240,
    shell:
        '"${{EVALUATOR_PYTHON:-python}}" {resources.script:q} --evaluator {input.evaluator:q}'
        " --reference {input.reference:q} --images {input.images:q} --out {output:q} 2>&1 | tee {log:q}"
