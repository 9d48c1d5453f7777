"""Detector features of generated images, read from the output of `sample` or computed."""

from pathlib import Path

import numpy as np
import torch

from mmfm import data
from mmfm.data.moments import CovarianceMoments
from mmfm.evaluation.detector import Detector
from mmfm.evaluation.moments import merged, own_part
from mmfm.infra import store
from mmfm.infra.distributed import Ranks
from mmfm.infra.progress import Progress


def sampled_features(images_path: str | Path, images_digest: str, detector: Detector) -> np.ndarray | None:
    """Return the features (n, D) that `sample` wrote next to the images, or None if not made by this detector."""
    path = Path(images_path).with_name("features.safetensors")
    if not path.is_file():
        return None
    arrays, about = store.map_arrays(path)
    made_from = about.get("detector_digest"), about.get("images_digest")
    return arrays["features"] if made_from == (detector.digest, images_digest) else None


def image_moments(
    images: np.ndarray, detector: Detector, batch_size: int, ranks: Ranks, features: np.ndarray | None = None
) -> CovarianceMoments:
    """Return the feature moments of images (n, S, S, 3) uint8, on every process.

    Each process handles a contiguous part; the parts are merged in order.

    Args:
        features: (n, D), if already computed by this detector for these images.
    """
    n, own = len(images), own_part(len(images), ranks)
    moments = CovarianceMoments.zeros(detector.dimension, ranks.device)
    with Progress("fid", n, "images", enabled=ranks.is_main) as progress:
        for rows in data.ranges(own.start, own.stop, batch_size):
            if features is None:
                batch = torch.from_numpy(np.array(images[rows.start : rows.stop])).permute(0, 3, 1, 2)
                moments.update(detector.features(batch))
            else:
                moments.update(torch.from_numpy(np.array(features[rows.start : rows.stop])).to(ranks.device))
            progress.advance(min(len(rows) * ranks.world, n - progress.done))
    return merged(moments, ranks)
