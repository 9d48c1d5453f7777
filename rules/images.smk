"""The demo's images, unpacked, and the listing that numbers the images."""

DEMO_IMAGES = "<results>/images/fashion-mnist"
LISTING = "<results>/list_images/listing.train.safetensors"
HELDOUT = "<results>/list_images/listing.heldout.safetensors"


rule demo_images:
    input:
        multiext(
            f"{HERE}resources/demo/fashion-mnist/t10k-", images="images-idx3-ubyte.gz", labels="labels-idx1-ubyte.gz"
        ),
    output:
        directory(DEMO_IMAGES),
    log:
        "<logs>/demo_images.log",
    benchmark:
        "<benchmarks>/demo_images.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    shell:
        'python -m mmfm.cli demo_images --source "$(dirname {input.images:q})" --out {output:q} 2>&1 | tee {log:q}'


# Image folders of yours are not declared inputs: Snakemake would scan it at every start, which takes minutes for ImageNet.
# After adding or removing images, run: snakemake TARGET --cores all -R list_images
rule list_images:
    input:
        images_to_list,
    output:
        train=LISTING,
        heldout=HELDOUT,
    log:
        "<logs>/list_images.log",
    benchmark:
        "<benchmarks>/list_images.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: max(1, min(C.data.workers, MACHINE.cores)) if C.data.unreadable == "skip" else 1
    resources:
        operation=OPERATION["list_images"],
        mem_mb=2000,
        runtime=30,
    params:
        settings=parameter("list_images"),
    shell:
        "python -m mmfm.cli list_images --settings {params.settings:q} --root {input:q} --train {output.train:q}"
        " --heldout {output.heldout:q} {resources.operation} 2>&1 | tee {log:q}"
