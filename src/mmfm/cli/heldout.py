"""``mmfm heldout``: likelihood of held-out images under mixtures."""

import argparse
from pathlib import Path

from mmfm.infra import store

DESCRIPTION = """\
Compare the mean log-likelihood of held-out images under mixtures with that of the images that they were fitted to. The
gap is what the mixture has learned by heart; more modes are better only as long as the held-out likelihood grows.

  mmfm heldout --gmm gmm/k64/gmm.safetensors gmm/k256/gmm.safetensors --train cls_tokens.zarr \\
      --heldout heldout/cls_tokens.zarr --out-json heldout.json --out-png heldout.png

`snakemake results/gmm/dinov2/heldout.png` first fits all of sweep.modes, and encodes the held-out images
(data.holdout or data.heldout_root). docs/diagnostics.md explains how to choose K."""


def main(arguments: list[str]) -> int:
    """Compute the likelihoods, print a table, and write it."""
    parser = argparse.ArgumentParser(
        prog="mmfm heldout", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gmm", type=Path, nargs="+", required=True, help="mixtures, from fit_gmm")
    parser.add_argument("--train", type=Path, required=True, help="tokens that they were fitted to, from extract")
    parser.add_argument("--heldout", type=Path, required=True, help="tokens of the held-out images, from extract")
    parser.add_argument("--out-json", type=Path, help="the numbers (output)")
    parser.add_argument("--out-png", type=Path, help="a plot against the number of modes (output)")
    options = parser.parse_args(arguments)
    from mmfm.stages.heldout import heldout, plot, render

    rows = heldout(options.gmm, options.train, options.heldout)
    if options.out_png:
        plot(options.out_png, rows)
    if options.out_json:
        store.write_json(options.out_json, rows)
    print(render(rows), end="")
    return 0
