"""``mmfm latent_stats``: the latents' mean and variance per position."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
Turn the latent moments that `extract` took into the statistics that normalise the latents: exact mean and population
variance per position, float32 (C, H, W), as a PyTorch file {"mean", "var"} that other implementations of RAE read too.

  mmfm latent_stats --config config/config.yaml --moments latent_moments.safetensors --out stats.pt \\
      --out-json stats.json

Takes milliseconds; there is nothing to resume."""


def main(arguments: list[str]) -> int:
    """Parse, write statistics."""
    parser = StageParser("latent_stats", DESCRIPTION)
    parser.add_argument("--moments", type=Path, required=True, help="latent moments from extract")
    parser.add_argument("--out", type=Path, required=True, help="statistics (output, .pt)")
    parser.add_argument("--out-json", type=Path, required=True, help="their provenance and ranges (output)")
    options, _ = parser.parse(arguments)
    from mmfm.stages.latent_stats import latent_stats

    about = latent_stats(options.moments, options.out, options.out_json)
    low, high = about["std_range"]
    print(f"latent_stats: {about['n_images']:,} images, latents {about['latent_shape']}, std {low:.3f} to {high:.3f}")
    return 0
