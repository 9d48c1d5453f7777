"""``mmfm milestone``: the weights of an earlier step of a finished training."""

import argparse
from pathlib import Path

DESCRIPTION = """\
Write the EMA weights of an earlier step of a finished training, from the checkpoint that it kept for
train.milestones, train.milestone_steps or a target with .stepN. They are bit for bit those of a training that ends
there. Snakemake runs this for targets with .stepN.

  mmfm milestone --ema results/train/dinov2_mode/seed0.tiny.k256/ema.safetensors --step 60 --out ema60.safetensors"""


def main(arguments: list[str]) -> int:
    """Publish the weights of a step."""
    parser = argparse.ArgumentParser(
        prog="mmfm milestone", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ema", type=Path, required=True, help="weights that `train` published")
    parser.add_argument("--step", type=int, required=True, help="step whose weights are wanted")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    options = parser.parse_args(arguments)
    from mmfm.training import milestones

    milestones.publish(options.ema, options.step, options.out)
    return 0
