"""``latent_stats``: mean and variance of the latents at every position, by which latents are normalised.

Reads: the latent moments of `extract`, or a file of statistics if ``latent_stats.weights`` names one.
Writes: ``stats.pt``, {"mean", "var"} (C, H, W) float32, and ``stats.json``. Computed variances are the population's.
    Without a mean, ``mean`` is None: latents are then divided, not centred.
Unit of work: none; the stage takes milliseconds and there is nothing to resume.
After a kill: either the old files or the new ones, each whole.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfm.autoencoder.encoders import latent_shape
from mmfm.autoencoder.rae import load_statistics
from mmfm.config import STAGES, StageConfig
from mmfm.data.moments import Moments
from mmfm.infra import store


@dataclass(frozen=True)
class GivenStatistics:
    """A file of statistics that was not made here.

    Attributes:
        path: a PyTorch file {"mean": tensor (C, H, W) or None, "var": tensor (C, H, W)}, as RAE publishes them.
        encoder_weights: folder of the encoder whose latents they normalise; None checks no shape.
        input_size: side of that encoder's input, pixels.
    """

    path: Path
    encoder_weights: Path | None = None
    input_size: int = 0


def latent_stats(config: StageConfig, source: Path | GivenStatistics, out: Path, out_json: Path) -> dict[str, Any]:
    """Write the statistics and return the contents of ``stats.json``.

    Args:
        source: the latent moments of `extract`, or given statistics.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no latent moments, or no statistics of the encoder's latents.
    """
    mean, var, made_from = _given(source) if isinstance(source, GivenStatistics) else _computed(source)
    kept = mean if config.latent_stats.mean and mean.any() else None
    content = io.BytesIO()  # torch.save(path) would write the file name into the file: equal statistics would differ
    torch.save({"mean": kept, "var": var}, content)
    with store.whole_file(out) as partial:
        partial.write_bytes(content.getvalue())
    about = {
        "digest": store.file_digest(out),
        "version": STAGES["latent_stats"].version,
        **made_from,
        "latent_shape": list(var.shape),
        "mean_range": None if kept is None else [kept.min().item(), kept.max().item()],
        "std_range": [var.min().sqrt().item(), var.max().sqrt().item()],
        "constant_positions": (var <= 0).sum().item(),
    }
    store.write_json(out_json, about)
    return about


def _computed(moments: Path) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Return mean and population variance of moments, (C, H, W) float32, and what they were made from."""
    arrays, metadata = store.map_arrays(moments)
    if not {"count", "mean", "m2"} <= set(arrays) or "listing_digest" not in metadata:
        raise ValueError(f"'{moments}' holds no latent moments; give the latent_moments.safetensors that extract wrote")
    found = Moments.from_arrays(arrays)
    mean, var = (torch.as_tensor(np.asarray(a)).float() for a in (found.mean, found.variance()))
    made_from = {
        "moments_digest": metadata["digest"],
        "listing_digest": metadata["listing_digest"],
        "encoder_digest": metadata["encoder_digest"],
        "n_images": int(found.count),
    }
    return mean, var, made_from


def _given(source: GivenStatistics) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Return given mean and variance, (C, H, W) float32, and what they were made from."""
    shape = latent_shape(source.encoder_weights, source.input_size) if source.encoder_weights else None
    mean, var = load_statistics(source.path, shape)
    return mean, var, {"given_digest": store.file_digest(source.path), "n_images": None}
