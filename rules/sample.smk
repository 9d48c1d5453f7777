"""Generation."""

SAMPLE = R + "sample/{encoder}_{setting}/{training}.t{t}/"


def spatial_flag(wildcards, input):
    """Return the argument that names the spatial mixture, where the setting has one."""
    return f"--spatial-gmm {input.spatial_gmm}" if mixture_inputs(wildcards) else ""


rule sample:
    input:
        encoder_files,
        unpack(mixture_inputs),
        ema=rules.train.output.ema,
        stats=rules.latent_stats.output.stats,
        decoder=DECODER,
    output:
        images=SAMPLE + "images.npz",
        grid=report(
            SAMPLE + "grid.png",
            caption="../workflow/report/grid.rst",
            category="Samples",
            labels={"encoder": "{encoder}", "setting": "{setting}", "variant": "{training}", "time points": "{t}"},
        ),
        about=SAMPLE + "samples.json",
    log:
        R + "logs/sample.{encoder}_{setting}.{training}.t{t}.log",
    benchmark:
        R + "benchmarks/sample.{encoder}_{setting}.{training}.t{t}.tsv"
    params:
        settings=lambda wildcards: checked(
            lambda: wf.stage_parameter(C, "sample", wildcards.encoder, sample={"time_points": int(wildcards.t)})
        ),
        folder=encoder_folder,
        seed=lambda wildcards: training_variant(wildcards).seed,
        mixture=spatial_flag,
    threads: ALL_CORES
    resources:
        gpu=GPUS,
        mem_mb=8000,
        runtime=720,
        disk_mb=20000,
    conda:
        "../envs/mmfm.yaml"
    shell:
        "{LAUNCH} --gpus {resources.gpu} --threads {threads} -- sample --settings {params.settings:q}"
        " --seed {params.seed} --ema {input.ema:q} --stats {input.stats:q} --decoder {input.decoder:q}"
        " --encoder-weights {params.folder:q} {params.mixture}"
        " --out-dir $(dirname {output.images:q}) {OPERATION[sample]} 2>&1 | tee {log:q}"
