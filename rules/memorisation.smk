"""Whether generated images are copies of training images."""


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
