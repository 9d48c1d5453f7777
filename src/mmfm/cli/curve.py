"""``mmfm curve``: metrics of results that differ in one thing."""

import argparse
from pathlib import Path

from mmfm.infra import store

DESCRIPTION = """\
Plot the metrics of finished results of one setting against the one thing in which they differ; the best is marked.

  mmfm curve t results/fid/dinov2_mode.seed0.tiny.k256.t{5,10,25}.txt --out-png nfe.png

t: evaluations of the network    step: training step    g: guidance scale    k: number of modes

`snakemake results/curve/dinov2_mode.t5,10,25.png` first makes what is missing; the same with .step31,62,124 (milestones
of the training), .g1,1.5,2 and .k64,256. Points of .t, .step
and .g share one training."""


def main(arguments: list[str]) -> int:
    """Read results, print the curve, and write it."""
    parser = argparse.ArgumentParser(
        prog="mmfm curve", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("varies", choices=("t", "step", "g", "k"), help="what varies")
    parser.add_argument("results", type=Path, nargs="+", help="results FOLDER/fid/NAME.txt, one for each point")
    parser.add_argument("--out-png", type=Path, help="plot (output)")
    parser.add_argument("--out-txt", type=Path, help="table as text (output)")
    parser.add_argument("--out-json", type=Path, help="table as JSON (output)")
    options = parser.parse_args(arguments)
    from mmfm.evaluation.alike import read
    from mmfm.evaluation.curve import collect, plot, render

    curve = collect(read(options.results), options.varies)
    text = render(curve)
    if options.out_txt:
        with store.whole_file(options.out_txt) as partial:
            partial.write_text(text, encoding="utf-8")
    if options.out_png:
        plot(curve, options.out_png, options.out_png.stem)
    if options.out_json:
        store.write_json(options.out_json, curve)
    print(text, end="")
    return 0
