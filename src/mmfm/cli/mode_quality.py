"""``mmfm mode_quality``: find the modes whose generated images are poor."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
Which modes are bad? Every image of a setting with a mixture starts from noise of a mode. This encodes the generated
images with the generator's own encoder, and finds, for every mode, how many of its images lie in it again (by the
largest posterior of the mixture of the global tokens) and how far they are from its mean. As many real images, encoded
and decoded, say what to expect: held-out ones, or training images if there are none.

  mmfm mode_quality --config config/config.yaml --config config/demo.yaml --images images.npz --samples samples.json \\
      --encoder-weights resources/demo/encoder --stats stats.pt --decoder resources/demo/decoder/decoder.safetensors \\
      --gmm gmm.safetensors --assignment assignment.safetensors --spatial-gmm spatial_gmm.zarr \\
      --tokens cls_tokens.zarr --train-listing listing.train.safetensors \\
      --heldout-listing listing.heldout.safetensors \\
      --out-json modes.json --out-txt modes.txt --out-png modes.png

writes  modes.json   the numbers of every mode
        modes.txt    all modes together, and the worst ones
        modes.png    the worst modes and, for comparison, the best: training images beside generated ones

How to read it. Even the images of a perfect flow don't all return, because modes overlap and the decoder loses details:
the expected share says how many would. A mode is poor if the upper limit of its share (Clopper and Pearson, 97.5 %) is
below that. Modes are ranked by this limit, so a few unlucky images don't make a mode bad; modes with fewer than 5
images are not ranked. If few real images of a poor mode return either, the decoder is to blame, or modes that overlap.

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
    parser.add_argument("--stats", type=Path, required=True, help="latent statistics, from latent_stats")
    parser.add_argument("--decoder", type=Path, required=True, help="decoder that made the images")
    parser.add_argument("--gmm", type=Path, required=True, help="mixture of the global tokens, from fit_gmm")
    parser.add_argument("--assignment", type=Path, required=True, help="mode of each training image, from fit_gmm")
    parser.add_argument("--spatial-gmm", type=Path, required=True, help="spatial mixture that the images started from")
    parser.add_argument("--tokens", type=Path, required=True, help="tokens of the training images, from extract")
    parser.add_argument("--train-listing", type=Path, required=True, help="listing of the training images")
    parser.add_argument("--heldout-listing", type=Path, help="listing of the held-out images; may be empty")
    parser.add_argument("--out-json", type=Path, required=True, help="the numbers (output)")
    parser.add_argument("--out-txt", type=Path, required=True, help="the summary (output)")
    parser.add_argument("--out-png", type=Path, required=True, help="the picture (output)")
    options, config = parser.parse(arguments)
    from mmfm.infra import memory
    from mmfm.infra.distributed import process_group
    from mmfm.stages.mode_quality import ModeQualityFiles, mode_quality, render

    files = ModeQualityFiles(
        options.images, options.samples, options.encoder_weights, options.stats, options.decoder, options.gmm,
        options.assignment, options.spatial_gmm, options.train_listing, options.tokens, options.heldout_listing,
    )  # fmt: skip
    with process_group() as ranks, memory.explained("Lower extract.batch_size; the numbers stay the same to rounding"):
        result = mode_quality(config, files, options.out_json, options.out_txt, options.out_png, ranks)
        if ranks.is_main:
            print(render(result), end="")
    return 0
