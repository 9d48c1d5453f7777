"""``mmfm latent_stats``: compute the mean and variance of the latents per position."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
Compute the statistics that normalise the latents: exact mean and population variance at every position, float32
(C, H, W). They are written as a PyTorch file {"mean", "var"}, which other implementations of RAE can read.

  mmfm latent_stats --config config/config.yaml --moments latent_moments.safetensors --out stats.pt \\
      --out-json stats.json

This takes milliseconds; there is nothing to resume."""


def main(arguments: list[str]) -> int:
    """Parse the arguments, run the stage, and print a summary."""
    parser = StageParser("latent_stats", DESCRIPTION)
    parser.add_argument("--moments", type=Path, required=True, help="latent moments, from extract")
    parser.add_argument("--out", type=Path, required=True, help="statistics (.pt, output)")
    parser.add_argument("--out-json", type=Path, required=True, help="provenance and ranges of the statistics (output)")
    options, _ = parser.parse(arguments)
    from mmfm.stages.latent_stats import latent_stats

    about = latent_stats(options.moments, options.out, options.out_json)
    low, high = about["std_range"]
    print(f"latent_stats: {about['n_images']:,} images, latents {about['latent_shape']}, std {low:.3f} to {high:.3f}")
    return 0
