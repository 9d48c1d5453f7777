"""``mmfm memorisation``: are generated images copies of training images?"""

import argparse
from pathlib import Path

DESCRIPTION = """\
Find the training image nearest to every generated one, and compare the distances with those of held-out real images. A
generator that learned the distribution is as far from its training images as real images that it never saw; one that
copies is closer. Distances are those of the encoder's global tokens, so images are alike if the encoder says so.

  mmfm memorisation --images images.npz --samples samples.json --train cls_tokens.zarr \\
      --heldout heldout/cls_tokens.zarr --listing listing.train.safetensors \\
      --encoder-weights resources/demo/encoder --out-png memorisation.png --out-json memorisation.json

`snakemake results/memorisation/dinov2_mode.png` makes all of these first. It needs held-out images (data.holdout or
data.heldout_root). Two tests warn: all distances together, and the closest ones, which finds a few copies among many
images. Blurred images are closer to everything: look at the pairs in the picture.

The training images are not encoded again. Their tokens are read from disk in blocks; 50,000 generated and as many
held-out images against 1.28 million of 768 dimensions are 2e14 operations (an estimate: 40 minutes of a core, seconds
of a GPU) and twice 154 MB. There is nothing to resume: after an interruption, start again. torchrun shares the encoding
among processes.
docs/metrics.md#memorisation explains the numbers."""


def main(arguments: list[str]) -> int:
    """Compare the images, write picture and numbers, and print a summary."""
    parser = argparse.ArgumentParser(
        prog="mmfm memorisation", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="images.npz, from sample")
    parser.add_argument("--samples", type=Path, required=True, help="samples.json, from sample")
    parser.add_argument("--train", type=Path, required=True, help="tokens of the training images, from extract")
    parser.add_argument("--heldout", type=Path, required=True, help="tokens of the held-out images, from extract")
    parser.add_argument("--listing", type=Path, required=True, help="listing of the training images, from list_images")
    parser.add_argument(
        "--encoder-weights", type=Path, required=True, help="folder of the encoder that made the tokens"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images per encoder call (default: 64)")
    parser.add_argument("--out-png", type=Path, required=True, help="closest pairs and histogram (output)")
    parser.add_argument("--out-json", type=Path, required=True, help="the numbers (output)")
    options = parser.parse_args(arguments)
    from mmfm.infra.distributed import process_group
    from mmfm.stages.memorisation import Files, memorisation, render

    files = Files(
        options.images, options.samples, options.train, options.heldout, options.listing, options.encoder_weights
    )
    with process_group() as ranks:
        result = memorisation(files, options.out_png, options.out_json, ranks, options.batch_size)
        if ranks.is_main:
            print(render(result), end="")
    return 0
