"""Short names of results, such as results/fid/dinov2_mode.k512.txt, and names that are no target."""

# Copies of the files with complete names, in which the rest is as configured. All kinds share one command: Snakemake
# would evaluate another only when the job runs, after the loop.
for kind in targets.OF_IMAGES:
    # Both match a name that lacks only the guidance scale; such a name is short.
    workflow.ruleorder(f"short_{kind}", kind)

    rule:
        name:
            f"short_{kind}"
        input:
            complete_names(kind),
        output:
            short_names(kind),
        log:
            f"<logs>/short_{kind}.{{request}}.log",
        benchmark:
            f"<benchmarks>/short_{kind}.{{request}}.tsv"
        wildcard_constraints:
            request=rf"(?!{COMPLETE_NAME}\.{targets.any_of(targets.ENDINGS[kind])}$){NAME}",
        localrule: True
        conda:
            "../envs/mmfm.yaml"
        threads: 1
        resources:
            mem_mb=100,
            runtime=1,
        shell:
            '(set -- {output:q}; for made in {input:q}; do cp "$made" "$1"; shift; [[ $made != *.txt ]] || cat "$made";'
            " done) 2>&1 | tee {log:q}"


rule unknown_target:
    input:
        unknown_target,
    output:
        "<results>/{name}",
    log:
        "<logs>/unknown_target.{name}.log",
    wildcard_constraints:
        name="|".join(rf"{kind}/(?!{name_pattern(kind)}$)[^/]+" for kind in targets.ENDINGS),
    conda:
        "../envs/mmfm.yaml"
    shell:
        "false 2> {log:q}"


# The results of a configuration with another `run`, or with none; a workflow that imports this one may have such files.
if not IMPORTED:

    rule unknown_run:
        input:
            unknown_target,
        output:
            "{folder}/{name}",
        log:
            "<logs>/unknown_run.{folder}.{name}.log",
        wildcard_constraints:
            folder=rf"(?!{RESULTS}/({targets.any_of(targets.ENDINGS)}/[^/]+|{targets.COMPARISON}\.\w+)$)results(/[^/]+)?",
            name=rf"{targets.any_of(targets.ENDINGS)}/[^/]+|{targets.COMPARISON}\.(txt|json|png|html)",
        conda:
            "../envs/mmfm.yaml"
        shell:
            "false 2> {log:q}"
