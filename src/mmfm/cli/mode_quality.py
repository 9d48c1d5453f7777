"""``mmfm mode_quality``: find the modes whose generated images are poor."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
Which modes are bad? Every image of a setting with a mixture starts from noise of a mode. This encodes the generated
images with the generator's own encoder, and finds, for every mode, how many of its images lie in it again (by the
largest posterior of the mixture of the global tokens) and how far they are from its mean, beside the training images.

  mmfm mode_quality --config config/config.yaml --config config/demo.yaml --images images.npz --samples samples.json \\
      --encoder-weights resources/demo/encoder --gmm gmm.safetensors --spatial-gmm spatial_gmm.zarr \\
      --listing listing.train.safetensors --tokens cls_tokens.zarr \\
      --out-json modes.json --out-txt modes.txt --out-png modes.png

writes  modes.json   the numbers of every mode
        modes.txt    all modes together, and the worst ones
        modes.png    the worst modes and, for comparison, the best: training images beside generated ones

How to read it. Even the images of a perfect flow don't all return, because modes overlap: the expected share says how
many. A mode is poor if the upper limit of its share (Clopper and Pearson, 97.5 %) is below that. Modes are ranked by
this difference, so a few unlucky images don't make a mode bad; modes with fewer than 5 images are not ranked. Blurred
images that still show the right thing return, too: look at the picture, and at the distance.

The space is the generator's own, so compare settings with a mixture, steps of a training, or numbers of time points
with each other, not with other systems. There is nothing to resume: after an interruption, start again. torchrun shares
the images among processes; the numbers stay the same.

`snakemake results/mode_quality/dinov2_mode.png` makes all that is needed. docs/metrics.md#modes has more."""


def main(arguments: list[str]) -> int:
    """Parse the arguments, run the stage, and print the text."""
    parser = StageParser("mode_quality", DESCRIPTION)
    parser.add_argument("--images", type=Path, required=True, help="images.npz, from sample")
    parser.add_argument("--samples", type=Path, required=True, help="samples.json, from sample")
    parser.add_argument("--encoder-weights", type=Path, required=True, help="folder of the generator's encoder")
    parser.add_argument("--gmm", type=Path, required=True, help="mixture of the global tokens, from fit_gmm")
    parser.add_argument("--spatial-gmm", type=Path, required=True, help="spatial mixture that the images started from")
    parser.add_argument("--listing", type=Path, required=True, help="listing of the training images")
    parser.add_argument("--tokens", type=Path, required=True, help="tokens of the training images, from extract")
    parser.add_argument("--heldout", type=Path, nargs="?", help="tokens of held-out images, to compare with")
    parser.add_argument("--out-json", type=Path, required=True, help="the numbers (output)")
    parser.add_argument("--out-txt", type=Path, required=True, help="the summary (output)")
    parser.add_argument("--out-png", type=Path, required=True, help="the picture (output)")
    options, config = parser.parse(arguments)
    from mmfm.infra import memory
    from mmfm.infra.distributed import process_group
    from mmfm.stages.mode_quality import ModeQualityFiles, mode_quality, render

    files = ModeQualityFiles(
        options.images, options.samples, options.encoder_weights, options.gmm, options.spatial_gmm, options.listing,
        options.tokens, options.heldout,
    )  # fmt: skip
    with process_group() as ranks, memory.explained("Lower extract.batch_size; the numbers stay the same to rounding"):
        result = mode_quality(config, files, options.out_json, options.out_txt, options.out_png, ranks)
        if ranks.is_main:
            print(render(result), end="")
    return 0
