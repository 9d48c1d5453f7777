"""``mmfm fdr``: distances in several detectors' features, as one number."""

import argparse
from pathlib import Path

from mmfm.infra import store

DESCRIPTION = """\
FDr of generated images: the mean, over detectors, of their Frechet distance divided by that of held-out real images. 1
is as close to the reference as real images are; no detector decides because its features are large.

  mmfm fdr inception.json dinov2.json --floors inception.heldout.json dinov2.heldout.json

Results are those of `mmfm evaluate --out` for one detector each, or of the workflow (results/fid/NAME.txt), which know
the held-out images' distance if data.holdout or data.heldout_root is set. The held-out images' number should be that of
the generated ones: fewer are farther from the reference."""


def main(arguments: list[str]) -> int:
    """Read results and print their FDr."""
    parser = argparse.ArgumentParser(
        prog="mmfm fdr", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="results of the same images, one for each detector")
    parser.add_argument(
        "--floors", type=Path, nargs="+", default=[], help="results of 'mmfm evaluate' of held-out real images"
    )
    parser.add_argument("--out-json", type=Path, help="result as JSON (output)")
    options = parser.parse_args(arguments)
    from mmfm.evaluation.fdr import collect, render

    read = [
        [store.read_json(path.with_suffix(".json")) for path in paths] for paths in (options.results, options.floors)
    ]
    found = collect(*read)
    if options.out_json:
        store.write_json(options.out_json, found)
    print(render(found), end="")
    return 0
