"""Short names of results, such as results/fid/dinov2_mode.k512.txt, and names that are no target."""

# What `--report` shows of each kind of result: its category, and more labels by the ending of a file.
REPORTED = {
    "fid": ("Frechet distance", {"txt": {}}),
    "memorisation": ("Memorisation", {"png": {}}),
    "mode_quality": ("Modes", {"txt": {"as": "numbers"}, "png": {"as": "worst and best modes"}}),
}


def short_names(kind):
    """Return the files of a kind of result under a short name, marked for `--report`."""
    category, labels = REPORTED[kind]
    files = {ending: f"<results>/{kind}/{{request}}.{ending}" for ending in targets.ENDINGS[kind]}
    for ending, more in labels.items():
        about = {"caption": f"../workflow/report/{kind}.rst", "category": category}
        files[ending] = report(files[ending], labels={"result": "{request}", **more}, **about)
    return list(files.values())


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
            '(name={output[0]:q}; for made in {input:q}; do cp "$made" "${{name%.*}}.${{made##*.}}";'
            ' [[ $made != *.txt ]] || cat "$made"; done) 2>&1 | tee {log:q}'


def known_names(kind):
    """Return a regular expression for the names of a kind of result that rules make."""
    heads = {"fid": f"({NAME}|{SEVERAL})", "curve": "[^/]+", "reconstruction": targets.any_of(ENCODERS)}
    found = rf"{heads.get(kind, NAME)}\.{targets.any_of(targets.ENDINGS[kind])}"
    return rf"({found}|{NAME}\.adm\.txt)" if kind == "fid" else found


rule unknown_target:
    input:
        unknown_target,
    output:
        "<results>/{name}",
    log:
        "<logs>/unknown_target.{name}.log",
    wildcard_constraints:
        name="|".join(rf"{kind}/(?!{known_names(kind)}$)[^/]+" for kind in targets.ENDINGS),
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
            folder=rf"(?!{RESULTS}/[^/]+/[^/]+$)results(/[^/]+)?",
            name=rf"{targets.any_of(targets.ENDINGS)}/[^/]+",
        conda:
            "../envs/mmfm.yaml"
        shell:
            "false 2> {log:q}"
