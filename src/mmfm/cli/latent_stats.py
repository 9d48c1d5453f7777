"""``mmfm latent_stats``: compute the mean and variance of the latents per position, or take given ones."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
Compute the statistics that normalise the latents: exact mean and population variance at every position, float32
(C, H, W). They are written as a PyTorch file {"mean", "var"}, which other implementations of RAE can read.

  mmfm latent_stats --config config/config.yaml --moments latent_moments.safetensors --out stats.pt \\
      --out-json stats.json

With --given they are taken from such a file instead. Its mean may be missing or None: the latents are then divided, not
centred. latent_stats.mean=false leaves out the mean of either.

This takes milliseconds; there is nothing to resume."""


def main(arguments: list[str]) -> int:
    """Parse the arguments, run the stage, and print a summary."""
    parser = StageParser("latent_stats", DESCRIPTION)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--moments", type=Path, help="latent moments, from extract")
    source.add_argument("--given", type=Path, help="statistics to take (.pt)")
    parser.add_argument("--encoder-weights", type=Path, help="with --given: the encoder's folder, to check the shape")
    parser.add_argument("--input-size", type=int, help="with --encoder-weights: the side of its input, pixels")
    parser.add_argument("--out", type=Path, required=True, help="statistics (.pt, output)")
    parser.add_argument("--out-json", type=Path, required=True, help="provenance and ranges of the statistics (output)")
    options, config = parser.parse(arguments)
    if bool(options.encoder_weights) != bool(options.input_size):
        parser.error("--encoder-weights and --input-size belong together")
    from mmfm.stages.latent_stats import GivenStatistics, latent_stats

    given = options.given and GivenStatistics(options.given, options.encoder_weights, options.input_size or 0)
    about = latent_stats(config, given or options.moments, options.out, options.out_json)
    low, high = about["std_range"]
    images = "given" if about["n_images"] is None else f"{about['n_images']:,} images"
    centred = "" if about["mean_range"] else ", no mean"
    print(f"latent_stats: {images}, latents {about['latent_shape']}, std {low:.3f} to {high:.3f}{centred}")
    return 0
