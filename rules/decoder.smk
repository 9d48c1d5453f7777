"""The decoder: trained here, copied from the configured file, or imported from a published one."""

DECODER = "<results>/decoder/{encoder}/decoder.safetensors"

if C.decoder.weights == "train":

    rule train_decoder:
        input:
            encoder=encoder_files,
            listing=LISTING,
        output:
            decoder=DECODER,
            history="<results>/decoder/{encoder}/history.jsonl",
            curve=report(
                "<results>/decoder/{encoder}/curve.png",
                caption="../workflow/report/decoder_curve.rst",
                category="Decoder",
                labels={"encoder": "{encoder}", "picture": "learning curve"},
            ),
            reconstruction=report(
                "<results>/decoder/{encoder}/reconstruction.png",
                caption="../workflow/report/reconstruction.rst",
                category="Decoder",
                labels={"encoder": "{encoder}", "picture": "reconstruction"},
            ),
        log:
            "<logs>/train_decoder.{encoder}.log",
        benchmark:
            "<benchmarks>/train_decoder.{encoder}.tsv"
        # If the decoder exists, `train` can show previews.
        priority: 1
        conda:
            "../envs/mmfm.yaml"
        threads: THREADS["train_decoder"]
        resources:
            operation=OPERATION["train_decoder"],
            gpu=GPUS["train_decoder"],
            nodes=NODES["train_decoder"],
            processes=C.processes,
            mem_mb=MEM_MB["train_decoder"],
            runtime=RESOURCES["train_decoder"].minutes,
            disk_mb=RESOURCES["train_decoder"].disk_mb,
        params:
            settings=parameter("train_decoder"),
        shell:
            "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
            " --nodes {resources.nodes} -- train_decoder --settings {params.settings:q}"
            ' --listing {input.listing:q} --encoder-weights "$(dirname {input.encoder[0]:q})" --out-dir "$(dirname {output.decoder:q})"'
            " {resources.operation} 2>&1 | tee {log:q}"

elif C.decoder.weights.endswith(".safetensors"):

    rule given_decoder:
        input:
            given_decoder,
        output:
            decoder=DECODER,
        log:
            "<logs>/given_decoder.{encoder}.log",
        benchmark:
            "<benchmarks>/given_decoder.{encoder}.tsv"
        conda:
            "../envs/mmfm.yaml"
        threads: 1
        resources:
            mem_mb=500,
            runtime=10,
        shell:
            "cp {input:q} {output:q} 2>&1 | tee {log:q}"

else:

    rule import_decoder:
        input:
            source=given_decoder,
            stats=STATISTICS,
        output:
            decoder=DECODER,
        log:
            "<logs>/import_decoder.{encoder}.log",
        benchmark:
            "<benchmarks>/import_decoder.{encoder}.tsv"
        conda:
            "../envs/mmfm.yaml"
        threads: 1
        resources:
            mem_mb=6000,
            runtime=10,
        params:
            heads=C.decoder.num_heads,
            size=C.image.size,
        shell:
            "python -m mmfm.cli import decoder {input.source:q} --out {output.decoder:q} --stats {input.stats:q}"
            " --heads {params.heads} --image-size {params.size} 2>&1 | tee {log:q}"


# How closely the decoder reconstructs held-out images.
rule reconstruction:
    input:
        encoder=encoder_files,
        decoder=DECODER,
        listing=LISTING,
        heldout=HELDOUT,
        detector=detector_weights,
    output:
        text=report(
            "<results>/reconstruction/{encoder}.txt",
            caption="../workflow/report/reconstruction_numbers.rst",
            category="Decoder",
            labels={"encoder": "{encoder}", "picture": "rFID, PSNR, SSIM"},
        ),
        json="<results>/reconstruction/{encoder}.json",
        picture=report(
            "<results>/reconstruction/{encoder}.png",
            caption="../workflow/report/reconstruction.rst",
            category="Decoder",
            labels={"encoder": "{encoder}", "picture": "measured images"},
        ),
    log:
        "<logs>/reconstruction.{encoder}.log",
    benchmark:
        "<benchmarks>/reconstruction.{encoder}.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: THREADS["reconstruction"]
    resources:
        operation=OPERATION["reconstruction"],
        gpu=GPUS["reconstruction"],
        nodes=NODES["reconstruction"],
        processes=C.processes,
        mem_mb=MEM_MB["reconstruction"],
        runtime=RESOURCES["reconstruction"].minutes,
        disk_mb=RESOURCES["reconstruction"].disk_mb,
    params:
        settings=parameter("reconstruction"),
    shell:
        "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
        " --nodes {resources.nodes} -- reconstruction --settings {params.settings:q}"
        " --train-listing {input.listing:q} --heldout-listing {input.heldout:q}"
        ' --encoder-weights "$(dirname {input.encoder[0]:q})" --decoder {input.decoder:q}'
        " --detector-weights {input.detector:q} --out-txt {output.text:q} --out-json {output.json:q}"
        " --out-png {output.picture:q} {resources.operation} 2>&1 | tee {log:q}"
