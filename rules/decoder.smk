"""The decoder: trained here, or given."""

DECODER = R + "decoder/{encoder}/decoder.safetensors"

if C.decoder.weights == "train":

    rule train_decoder:
        input:
            encoder_files,
            listing=LISTING,
        output:
            decoder=DECODER,
            history=R + "decoder/{encoder}/history.jsonl",
            curve=report(
                R + "decoder/{encoder}/curve.png",
                caption="../workflow/report/decoder_curve.rst",
                category="Decoder",
                labels={"encoder": "{encoder}", "picture": "learning curve"},
            ),
            reconstruction=report(
                R + "decoder/{encoder}/reconstruction.png",
                caption="../workflow/report/reconstruction.rst",
                category="Decoder",
                labels={"encoder": "{encoder}", "picture": "reconstruction"},
            ),
        log:
            R + "logs/train_decoder.{encoder}.log",
        benchmark:
            R + "benchmarks/train_decoder.{encoder}.tsv"
        params:
            settings=parameter("train_decoder"),
            folder=encoder_folder,
        threads: ALL_CORES
        resources:
            gpu=GPUS,
            mem_mb=16000,
            runtime=4320,
        conda:
            "../envs/mmfm.yaml"
        shell:
            "{LAUNCH} --gpus {resources.gpu} --threads {threads} -- train_decoder --settings {params.settings:q}"
            " --listing {input.listing:q} --encoder-weights {params.folder:q} --out-dir $(dirname {output.decoder:q})"
            " {OPERATION[train_decoder]} 2>&1 | tee {log:q}"

else:

    rule given_decoder:
        input:
            lambda wildcards: C.decoder.weights.format(encoder=wildcards.encoder),
        output:
            decoder=DECODER,
        log:
            R + "logs/given_decoder.{encoder}.log",
        benchmark:
            R + "benchmarks/given_decoder.{encoder}.tsv"
        threads: 1
        resources:
            mem_mb=500,
            runtime=5,
        conda:
            "../envs/mmfm.yaml"
        shell:
            "cp {input:q} {output:q} 2>&1 | tee {log:q}"
