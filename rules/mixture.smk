"""The mixture of the global tokens and its spatial counterpart: fitted here, or given."""

GMM = "<results>/gmm/{encoder}/k{k}/gmm.safetensors"
SPATIAL = "<results>/spatial_gmm/{encoder}/k{k}/spatial_gmm.zarr"

if C.gmm.weights == "fit":

    rule fit_gmm:
        input:
            tokens=rules.extract.output.tokens,
            listing=LISTING,
            init_means=C.gmm.init_means or [],
        output:
            gmm=GMM,
            assignment="<results>/gmm/{encoder}/k{k}/assignment.safetensors",
            about="<results>/gmm/{encoder}/k{k}/report.json",
            likelihood=report(
                "<results>/gmm/{encoder}/k{k}/likelihood.png",
                caption="../workflow/report/likelihood.rst",
                category="Mixture",
                labels={"encoder": "{encoder}", "modes": "{k}", "picture": "likelihood"},
            ),
            weights=report(
                "<results>/gmm/{encoder}/k{k}/weights.png",
                caption="../workflow/report/weights.rst",
                category="Mixture",
                labels={"encoder": "{encoder}", "modes": "{k}", "picture": "weights"},
            ),
            modes=report(
                "<results>/gmm/{encoder}/k{k}/modes.png",
                caption="../workflow/report/modes.rst",
                category="Mixture",
                labels={"encoder": "{encoder}", "modes": "{k}", "picture": "nearest images"},
            ),
        log:
            "<logs>/fit_gmm.{encoder}.k{k}.log",
        benchmark:
            "<benchmarks>/fit_gmm.{encoder}.k{k}.tsv"
        conda:
            "../envs/mmfm.yaml"
        threads: THREADS["fit_gmm"]
        resources:
            operation=OPERATION["fit_gmm"],
            gpu=GPUS["fit_gmm"],
            nodes=NODES["fit_gmm"],
            processes=C.processes,
            mem_mb=MEM_MB["fit_gmm"],
            runtime=RESOURCES["fit_gmm"].minutes,
            disk_mb=RESOURCES["fit_gmm"].disk_mb,
        params:
            settings=parameter("fit_gmm", lambda wildcards: {"gmm": {"n_components": int(wildcards.k)}}),
        shell:
            "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
            " --nodes {resources.nodes} -- fit_gmm --settings {params.settings:q}"
            ' --tokens {input.tokens:q} --listing {input.listing:q} --out-dir "$(dirname {output.gmm:q})" {resources.operation} 2>&1 | tee {log:q}'

    rule spatial_gmm:
        input:
            encoder=encoder_files,
            listing=LISTING,
            stats=STATISTICS,
            about=ABOUT_STATISTICS,
            gmm=rules.fit_gmm.output.gmm,
            assignment=rules.fit_gmm.output.assignment,
        output:
            mixture=directory(SPATIAL),
            about="<results>/spatial_gmm/{encoder}/k{k}/report.json",
        log:
            "<logs>/spatial_gmm.{encoder}.k{k}.log",
        benchmark:
            "<benchmarks>/spatial_gmm.{encoder}.k{k}.tsv"
        conda:
            "../envs/mmfm.yaml"
        threads: THREADS["spatial_gmm"]
        resources:
            operation=OPERATION["spatial_gmm"],
            gpu=GPUS["spatial_gmm"],
            nodes=NODES["spatial_gmm"],
            processes=C.processes,
            mem_mb=MEM_MB["spatial_gmm"],
            runtime=RESOURCES["spatial_gmm"].minutes,
            disk_mb=RESOURCES["spatial_gmm"].disk_mb,
        params:
            settings=parameter("spatial_gmm"),
        shell:
            "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
            " --nodes {resources.nodes} -- spatial_gmm --settings {params.settings:q}"
            ' --listing {input.listing:q} --encoder-weights "$(dirname {input.encoder[0]:q})" --stats {input.stats:q} --gmm {input.gmm:q}'
            " --assignment {input.assignment:q} --out {output.mixture:q} {resources.operation} 2>&1 | tee {log:q}"

    # The fits share the tokens. Each needs its spatial mixture for the coupling cost.
    rule sweep:
        input:
            fits=expand(rules.fit_gmm.output.about, k=C.sweep.modes, allow_missing=True),
            spatial=expand(rules.spatial_gmm.output.about, k=C.sweep.modes, allow_missing=True),
        output:
            picture=report(
                "<results>/gmm/{encoder}/sweep.png",
                caption="../workflow/report/sweep.rst",
                category="Mixture",
                labels={"encoder": "{encoder}", "modes": "all", "picture": "sweep"},
            ),
            table="<results>/gmm/{encoder}/sweep.json",
        log:
            "<logs>/sweep.{encoder}.log",
        benchmark:
            "<benchmarks>/sweep.{encoder}.tsv"
        conda:
            "../envs/mmfm.yaml"
        threads: 1
        resources:
            mem_mb=1000,
            runtime=10,
        params:
            settings=parameter("sweep"),
        shell:
            "python -m mmfm.cli sweep --settings {params.settings:q} --fits {input.fits:q} --spatial {input.spatial:q}"
            ' --out-dir "$(dirname {output.picture:q})" 2>&1 | tee {log:q}'

else:

    rule import_mixture:
        input:
            source=given_mixture,
            stats=STATISTICS,
        output:
            gmm=GMM,
        log:
            "<logs>/import_mixture.{encoder}.k{k}.log",
        benchmark:
            "<benchmarks>/import_mixture.{encoder}.k{k}.tsv"
        conda:
            "../envs/mmfm.yaml"
        threads: 1
        resources:
            mem_mb=MEM_MB["latent_stats"],
            runtime=10,
        shell:
            "python -m mmfm.cli import mixture {input.source:q} --out {output.gmm:q} --stats {input.stats:q}"
            " --modes {wildcards.k} 2>&1 | tee {log:q}"

    rule import_spatial:
        input:
            source=given_spatial,
            stats=STATISTICS,
            about=ABOUT_STATISTICS,
            gmm=GMM,
        output:
            mixture=directory(SPATIAL),
        log:
            "<logs>/import_spatial.{encoder}.k{k}.log",
        benchmark:
            "<benchmarks>/import_spatial.{encoder}.k{k}.tsv"
        conda:
            "../envs/mmfm.yaml"
        threads: 1
        resources:
            mem_mb=MEM_MB["latent_stats"],
            runtime=60,
            disk_mb=RESOURCES["spatial_gmm"].disk_mb,
        shell:
            "python -m mmfm.cli import spatial {input.source:q} --out {output.mixture:q} --stats {input.stats:q}"
            " --gmm {input.gmm:q} 2>&1 | tee {log:q}"


# The same command as in the rule `extract`, on the held-out images.
rule extract_heldout:
    input:
        encoder=encoder_files,
        listing=held_out,
    output:
        tokens=directory("<results>/cls_tokens/{encoder}/heldout/cls_tokens.zarr"),
        moments="<results>/cls_tokens/{encoder}/heldout/latent_moments.safetensors",
    log:
        "<logs>/extract.{encoder}.heldout.log",
    benchmark:
        "<benchmarks>/extract.{encoder}.heldout.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: THREADS["extract"]
    resources:
        operation=OPERATION["extract"],
        gpu=GPUS["extract"],
        nodes=NODES["extract"],
        processes=C.processes,
        mem_mb=MEM_MB["extract"],
        runtime=RESOURCES["extract"].minutes,
        disk_mb=RESOURCES["extract"].disk_mb,
    params:
        settings=parameter("extract"),
    shell:
        "python -m mmfm.infra.launch --gpus {resources.gpu} --processes {resources.processes} --threads {threads}"
        " --nodes {resources.nodes} -- extract --settings {params.settings:q}"
        ' --listing {input.listing:q} --encoder-weights "$(dirname {input.encoder[0]:q})" --out-tokens {output.tokens:q}'
        " --out-moments {output.moments:q} {resources.operation} 2>&1 | tee {log:q}"


rule heldout:
    input:
        gmm=GMM,
        train=rules.extract.output.tokens,
        heldout=rules.extract_heldout.output.tokens,
    output:
        "<results>/gmm/{encoder}/k{k}/heldout.json",
    log:
        "<logs>/heldout.{encoder}.k{k}.log",
    benchmark:
        "<benchmarks>/heldout.{encoder}.k{k}.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: THREADS["fit_gmm"]
    resources:
        mem_mb=MEM_MB["fit_gmm"],
        runtime=RESOURCES["fit_gmm"].minutes,
    shell:
        "python -m mmfm.cli heldout --gmm {input.gmm:q} --train {input.train:q} --heldout {input.heldout:q}"
        " --out-json {output:q} 2>&1 | tee {log:q}"


rule heldout_sweep:
    input:
        gmm=expand(GMM, k=C.sweep.modes, allow_missing=True),
        train=rules.extract.output.tokens,
        heldout=rules.extract_heldout.output.tokens,
    output:
        picture=report(
            "<results>/gmm/{encoder}/heldout.png",
            caption="../workflow/report/heldout.rst",
            category="Mixture",
            labels={"encoder": "{encoder}", "modes": "all", "picture": "held-out likelihood"},
        ),
        table="<results>/gmm/{encoder}/heldout.json",
    log:
        "<logs>/heldout_sweep.{encoder}.log",
    benchmark:
        "<benchmarks>/heldout_sweep.{encoder}.tsv"
    conda:
        "../envs/mmfm.yaml"
    threads: THREADS["fit_gmm"]
    resources:
        mem_mb=MEM_MB["fit_gmm"],
        runtime=RESOURCES["fit_gmm"].minutes,
    shell:
        "python -m mmfm.cli heldout --gmm {input.gmm:q} --train {input.train:q} --heldout {input.heldout:q}"
        " --out-json {output.table:q} --out-png {output.picture:q} 2>&1 | tee {log:q}"
