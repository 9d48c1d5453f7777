"""``mmfm scale``: what a configuration costs, before it is run."""

import argparse

from mmfm import config
from mmfm.workflow.resources import table

DESCRIPTION = """\
Print, for every stage of a configuration, what it reads and writes, the memory of every process, its arithmetic and its
time, as docs/scale.md explains. These are estimates from stated rates, not measurements.

  mmfm scale --config config/imagenet256.yaml --gpus 1 8"""


def main(arguments: list[str]) -> int:
    """Print one table per number of GPUs."""
    parser = argparse.ArgumentParser(
        prog="mmfm scale", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", metavar="YAML", action="append", default=[], help="files laid over config/config.yaml"
    )
    parser.add_argument("--encoder", default="dinov2", help="name in `encoders` (default dinov2)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8], help="numbers of GPUs; 0: one CPU core")
    parser.add_argument("--images", type=int, help="training images (default: ImageNet's 1,281,167, or the demo's)")
    options = parser.parse_args(arguments)
    loaded = config.load(["config/config.yaml", *options.config])
    loaded.section("encoder", options.encoder)
    for gpus in options.gpus:
        print(f"{gpus or 'No'} GPU{'' if gpus == 1 else 's'}\n\n{table(loaded, options.encoder, gpus, options.images)}")
    return 0
