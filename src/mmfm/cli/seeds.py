"""``mmfm seeds``: mean and range of results that differ in their seed."""

import argparse
from pathlib import Path

from mmfm.infra import store

DESCRIPTION = """\
Summarise finished results of one setting that differ in nothing but their seed: mean and range of the Frechet distance
and of the other metrics that all of them have.

  mmfm seeds results/fid/dinov2_mode.seed{0,1,2}.txt --out-txt mode.txt --out-json mode.json

`snakemake results/fid/dinov2_mode.seeds5.txt` first makes the seeds 0 to 4."""


def main(arguments: list[str]) -> int:
    """Read results, print the summary, and write it."""
    parser = argparse.ArgumentParser(
        prog="mmfm seeds", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="results FOLDER/fid/NAME.txt or .json, one for each seed")
    parser.add_argument("--out-txt", type=Path, help="summary as text (output)")
    parser.add_argument("--out-json", type=Path, help="summary as JSON (output)")
    options = parser.parse_args(arguments)
    from mmfm.evaluation.alike import read
    from mmfm.evaluation.seeds import render, summarise

    summary = summarise(read(options.results))
    if options.out_txt:
        with store.whole_file(options.out_txt) as partial:
            partial.write_text(render(summary), encoding="utf-8")
    if options.out_json:
        store.write_json(options.out_json, summary)
    print(render(summary), end="")
    return 0
