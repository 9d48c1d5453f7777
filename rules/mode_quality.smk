"""Which modes are poor: numbers and a picture."""


rule mode_quality:
    input:
        images=rules.sample.output.images,
        about=rules.sample.output.about,
        encoder=encoder_files,
        stats=STATISTICS,
        about_stats=ABOUT_STATISTICS,
        decoder=DECODER,
        gmm=lambda wildcards: fitted_mixture(wildcards)["gmm"],
        assignment=lambda wildcards: fitted_mixture(wildcards)["assignment"],
        spatial_gmm=lambda wildcards: fitted_mixture(wildcards)["spatial_gmm"],
        listing=LISTING,
        tokens=rules.extract.output.tokens,
        heldout=HELDOUT,
    output:
        json="<results>/mode_quality/{encoder}_{setting}{ag}.{training}{step}.t{t}{g}.json",
        text="<results>/mode_quality/{encoder}_{setting}{ag}.{training}{step}.t{t}{g}.txt",
        picture="<results>/mode_quality/{encoder}_{setting}{ag}.{training}{step}.t{t}{g}.png",
    log:
        "<logs>/mode_quality.{encoder}_{setting}{ag}.{training}{step}.t{t}{g}.log",
    benchmark:
        "<benchmarks>/mode_quality.{encoder}_{setting}{ag}.{training}{step}.t{t}{g}.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: THREADS["mode_quality"]
    resources:
        operation=OPERATION["mode_quality"],
        gpu=GPUS["mode_quality"],
        nodes=NODES["mode_quality"],
        processes=C.processes,
        mem_mb=MEM_MB["mode_quality"],
        runtime=RESOURCES["mode_quality"].minutes,
        disk_mb=RESOURCES["mode_quality"].disk_mb,
    params:
        settings=parameter("mode_quality"),
    shell:
        "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
        " --nodes {resources.nodes} -- mode_quality --settings {params.settings:q}"
        ' --images {input.images:q} --samples {input.about:q} --encoder-weights "$(dirname {input.encoder[0]:q})"'
        " --stats {input.stats:q} --decoder {input.decoder:q} --gmm {input.gmm:q} --assignment {input.assignment:q}"
        " --spatial-gmm {input.spatial_gmm:q} --tokens {input.tokens:q}"
        " --train-listing {input.listing:q} --heldout-listing {input.heldout:q}"
        " --out-json {output.json:q} --out-txt {output.text:q} --out-png {output.picture:q}"
        " {resources.operation} 2>&1 | tee {log:q}"
