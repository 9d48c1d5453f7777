"""``latent_stats``: mean and variance of the latents per position, which normalise them.

Reads the latent moments of `extract`. Writes ``stats.pt``, {"mean", "var"} (C, H, W) float32 with the population
variance, and ``stats.json``. Takes milliseconds: there is nothing to resume.
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
    """Turn moments into statistics, and return their description.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no latent moments.
    """
    arrays, metadata = store.map_arrays(moments)
    if not {"count", "mean", "m2"} <= set(arrays) or "listing_digest" not in metadata:
        raise ValueError(f"'{moments}' holds no latent moments; make it with extract")
    found = Moments.from_arrays(arrays)
    mean, var = (torch.as_tensor(np.asarray(a)).float() for a in (found.mean, found.variance()))
    content = io.BytesIO()  # torch.save writes a file's name into it: through memory, equal statistics are equal files
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
