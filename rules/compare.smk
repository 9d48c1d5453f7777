"""The three settings side by side."""


# The command finds what else it reads from the results' names.
rule comparison:
    input:
        distances=compared("fid/{encoder}_{setting}.{variant}.json"),
        images=compared("sample/{encoder}_{setting}/{variant}/images.npz"),
        # Given weights have no history, and given mixtures no report.
        history=compared("train/{encoder}_{setting}/{training}/history.jsonl") if C.train.weights == "train" else [],
        mixtures=compared("spatial_gmm/{encoder}/k{k}/report.json") if C.gmm.weights == "fit" else [],
    output:
        picture=report(
            "<results>/comparison.png",
            caption="../workflow/report/comparison.rst",
            category="Comparison",
            labels={"result": "images"},
        ),
        text=report(
            "<results>/comparison.txt",
            caption="../workflow/report/comparison.rst",
            category="Comparison",
            labels={"result": "distances"},
        ),
        json="<results>/comparison.json",
        page=report(
            "<results>/comparison.html",
            caption="../workflow/report/comparison.rst",
            category="Comparison",
            labels={"result": "page"},
        ),
    log:
        "<logs>/comparison.log",
    benchmark:
        "<benchmarks>/comparison.tsv"
    localrule: True
    conda:
        "../envs/mmfm.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    shell:
        "python -m mmfm.cli compare {input.distances:q}"
        " --out {output.picture:q} --out {output.text:q} --out {output.json:q} --out {output.page:q} 2>&1 | tee {log:q}"
