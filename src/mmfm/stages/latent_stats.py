"""``latent_stats``: mean and variance of the latents at every position, by which latents are normalised.

Reads: the latent moments of `extract`.
Writes: ``stats.pt``, {"mean", "var"} (C, H, W) float32 with the population variance, and ``stats.json``.
Unit of work: none; the stage takes milliseconds and there is nothing to resume.
After a kill: either the old files or the new ones, each whole.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfm.config import STAGES
from mmfm.data.moments import Moments
from mmfm.infra import store


def latent_stats(moments: Path, out: Path, out_json: Path) -> dict[str, Any]:
    """Turn moments into statistics and return the contents of ``stats.json``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no latent moments.
    """
    arrays, metadata = store.map_arrays(moments)
    if not {"count", "mean", "m2"} <= set(arrays) or "listing_digest" not in metadata:
        raise ValueError(f"'{moments}' holds no latent moments; give the latent_moments.safetensors that extract wrote")
    found = Moments.from_arrays(arrays)
    mean, var = (torch.as_tensor(np.asarray(a)).float() for a in (found.mean, found.variance()))
    content = io.BytesIO()  # torch.save(path) would write the file name into the file: equal statistics would differ
    torch.save({"mean": mean, "var": var}, content)
    with store.whole_file(out) as partial:
        partial.write_bytes(content.getvalue())
    about = {
        "digest": store.file_digest(out),
        "version": STAGES["latent_stats"].version,
        "moments_digest": metadata["digest"],
        "listing_digest": metadata["listing_digest"],
        "encoder_digest": metadata["encoder_digest"],
        "n_images": int(found.count),
        "latent_shape": list(mean.shape),
        "mean_range": [mean.min().item(), mean.max().item()],
        "std_range": [var.min().sqrt().item(), var.max().sqrt().item()],
        "constant_positions": (var <= 0).sum().item(),
    }
    store.write_json(out_json, about)
    return about
