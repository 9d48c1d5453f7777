"""Images: the embedded ones unpacked, and the listing that numbers them."""

DEMO_IMAGES = R + "images/fashion-mnist"
IMAGE_ROOT = DEMO_IMAGES if C.data.root == "demo" else C.data.root
LISTING = R + "list_images/listing.train.safetensors"
HELDOUT = R + "list_images/listing.heldout.safetensors"


rule demo_images:
    input:
        multiext("resources/demo/fashion-mnist/t10k-", images="images-idx3-ubyte.gz", labels="labels-idx1-ubyte.gz"),
    output:
        directory(DEMO_IMAGES),
    log:
        R + "logs/demo_images.log",
    benchmark:
        R + "benchmarks/demo_images.tsv"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=5,
    conda:
        "../envs/mmfm.yaml"
    shell:
        "python -m mmfm.cli demo_images --source $(dirname {input.images:q}) --out {output:q} 2>&1 | tee {log:q}"


# A folder of one's own is no declared input: walking it on every dry run would take minutes at ImageNet's size.
# After adding or removing images: snakemake -R list_images ...
rule list_images:
    input:
        branch(C.data.root == "demo", then=DEMO_IMAGES, otherwise=[]),
    output:
        train=LISTING,
        heldout=HELDOUT,
    log:
        R + "logs/list_images.log",
    benchmark:
        R + "benchmarks/list_images.tsv"
    params:
        settings=parameter("list_images"),
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    conda:
        "../envs/mmfm.yaml"
    shell:
        "python -m mmfm.cli list_images --settings {params.settings:q} --root {IMAGE_ROOT:q} --train {output.train:q}"
        " --heldout {output.heldout:q} {OPERATION[list_images]} 2>&1 | tee {log:q}"
