"""``mmfm export``: give a finished target away."""

import argparse
from pathlib import Path

DESCRIPTION = """\
Write a finished target into a folder that needs nothing else to generate images.

  mmfm export results/fid/dinov2_mode.txt --out my-model
  mmfm export results/fid/dinov2_mode.txt --out published-layout --layout published

--layout hub (the default) writes safetensors, zarr, the configuration, and a model card README.md with a grid of images
and the numbers: upload the folder with `hf upload NAME my-model`. --layout published writes what the published code
reads: a checkpoint with the label table that it wants, decoder, statistics, and both mixtures as pickles of
scikit-learn (which must be installed). mmfm.open takes either folder."""


def main(arguments: list[str]) -> int:
    """Export one target."""
    parser = argparse.ArgumentParser(
        prog="mmfm export", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="results/fid/NAME.txt, or a folder of a training or of samples")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--layout", choices=("hub", "published"), default="hub", help="default: %(default)s")
    parser.add_argument("--licence", default="other", help="identifier for the model card (default: %(default)s)")
    options = parser.parse_args(arguments)
    from mmfm.workflow.exporting import export

    for path in export(options.target, options.out, options.layout, options.licence):
        print(f"export: {path} ({path.stat().st_size / 1e6:,.1f} MB)")
    return 0
