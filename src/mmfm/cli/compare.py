"""``mmfm compare``: finished Frechet distances side by side."""

import argparse
from pathlib import Path

from mmfm.infra import store

DESCRIPTION = """\
Set finished Frechet distances side by side: distance, seed, training, sampling, modes, coupling cost. The best is
marked with *. Rows with another detector, another reference or another number of images can't be compared with the
others; they are marked and explained.

  mmfm compare                                  all that is finished in results/
  mmfm compare results/flowers results/birds    in the folders of two runs
  mmfm compare results/fid/dinov2_{gmm,mode}.txt --out comparison.png

Only files of finished results are read; nothing is computed. `snakemake results/comparison.txt` first makes the three
settings uncond, gmm and mode.

writes  --out FILE.png    the same images of every result
        --out FILE.html   a page to send to others: also learning curves, mixtures, costs, configuration
        --out FILE.txt    the text that is printed
        --out FILE.json   the same as JSON (fields: docs/results-format.md)"""


def main(arguments: list[str]) -> int:
    """Read results, print the comparison, and write the files that are asked for."""
    parser = argparse.ArgumentParser(
        prog="mmfm compare", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", type=Path, nargs="*", default=[Path("results")],
        help="results folders, or single results FOLDER/fid/NAME.txt (default: results)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, action="append", default=[], help="a file to write; can be repeated")
    options = parser.parse_args(arguments)
    for path in options.out:
        if path.suffix not in (".txt", ".json", ".png", ".html"):
            raise ValueError(f"--out '{path}' ends in none of .txt, .json, .png and .html, which say what to write")
    from mmfm.evaluation.comparison import compare, render
    from mmfm.evaluation.comparison_page import page
    from mmfm.evaluation.comparison_picture import draw
    from mmfm.infra.pictures import save_picture
    from mmfm.infra.versions import installed
    from mmfm.workflow import accounts, compared

    comparison = compare(compared.find(options.results))
    text = render(comparison)
    print(text, end="")
    for path in options.out:
        if path.suffix == ".png":
            save_picture(draw(comparison), path)
        elif path.suffix == ".json":
            store.write_json(path, comparison.as_json())
        else:
            html = path.suffix == ".html"
            beside = compared.curves(comparison.results), accounts.runs_of(comparison)
            written = page(comparison, *beside, installed()) if html else text
            with store.whole_file(path) as partial:
                partial.write_text(written, encoding="utf-8")
    return 0
