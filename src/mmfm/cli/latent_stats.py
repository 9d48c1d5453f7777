"""``mmfm latent_stats``: the latents' mean and variance per position."""

import io
from pathlib import Path

import numpy as np

from mmfm import config
from mmfm.cli.common import StageParser
from mmfm.infra import store

VERSION = config.VERSIONS["latent_stats"]

DESCRIPTION = """\
Turn the latent moments that `extract` took into the statistics that normalise the latents: exact mean and population
variance per position, float32 (C, H, W), as a PyTorch file {"mean", "var"} that other implementations of RAE read too.

  mmfm latent_stats --config config/config.yaml --moments latent_moments.safetensors --out stats.pt \\
      --out-json stats.json

Takes milliseconds; there is nothing to resume."""


def main(arguments: list[str]) -> int:
    """Read moments, write statistics."""
    parser = StageParser("latent_stats", DESCRIPTION)
    parser.add_argument("--moments", type=Path, required=True, help="latent moments from extract")
    parser.add_argument("--out", type=Path, required=True, help="statistics (output, .pt)")
    parser.add_argument("--out-json", type=Path, required=True, help="their provenance and ranges (output)")
    options, _ = parser.parse(arguments)
    import torch

    from mmfm.statistics import Moments

    arrays, metadata = store.map_arrays(options.moments)
    if not {"count", "mean", "m2"} <= set(arrays) or "listing_digest" not in metadata:
        raise ValueError(f"'{options.moments}' holds no latent moments; make it with extract")
    moments = Moments.from_arrays(arrays)
    mean, var = (torch.as_tensor(np.asarray(a)).float() for a in (moments.mean, moments.variance()))
    content = io.BytesIO()  # torch.save writes a file's name into it: through memory, equal statistics are equal files
    torch.save({"mean": mean, "var": var}, content)
    with store.whole_file(options.out) as partial:
        partial.write_bytes(content.getvalue())
    flat = (var <= 0).sum().item()
    about = {
        "digest": store.file_digest(options.out),
        "version": VERSION,
        "moments_digest": metadata["digest"],
        "listing_digest": metadata["listing_digest"],
        "encoder_digest": metadata["encoder_digest"],
        "n_images": int(moments.count),
        "latent_shape": list(mean.shape),
        "mean_range": [mean.min().item(), mean.max().item()],
        "std_range": [var.min().sqrt().item(), var.max().sqrt().item()],
        "constant_positions": flat,
    }
    store.write_json(options.out_json, about)
    low, high = about["std_range"]
    print(f"latent_stats: {about['n_images']:,} images, latents {about['latent_shape']}, std {low:.3f} to {high:.3f}")
    return 0
