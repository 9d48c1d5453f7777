"""Detector features of generated images, read from the output of `sample` or computed."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from mmfm import data
from mmfm.evaluation.collected import Collected
from mmfm.evaluation.detector import Detector, Outputs
from mmfm.evaluation.moments import own_part
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


def image_statistics(
    images: np.ndarray,
    kinds: Iterable[str],
    detector: Detector,
    batch_size: int,
    ranks: Ranks,
    features: np.ndarray | None = None,
    chosen: np.ndarray | None = None,
    name: str = "fid",
) -> Collected:
    """Return this process's part of the statistics of images (n, S, S, 3) uint8.

    Each process handles a contiguous part; :meth:`Collected.of_all` merges them in order.

    Args:
        kinds: which of :data:`mmfm.evaluation.collected.KINDS`.
        features: (n, D), if already computed by this detector for these images; used if they suffice.
        chosen: (m,) int64, the images to see; None for all.
        name: of the progress bar.
    """
    n = len(images if chosen is None else chosen)
    own = own_part(n, ranks)
    part = Collected(kinds, own, detector)
    known = features if part.needs_features_only else None
    with Progress(name, n, "images", enabled=ranks.is_main) as progress:
        for rows in data.ranges(own.start, own.stop, batch_size):
            if known is not None:
                part.update(Outputs(torch.from_numpy(np.array(known[rows.start : rows.stop])).to(ranks.device)))
            else:
                part_of = slice(rows.start, rows.stop) if chosen is None else chosen[rows.start : rows.stop]
                part.see(torch.from_numpy(np.array(images[part_of])).permute(0, 3, 1, 2), detector)
            progress.advance(min(len(rows) * ranks.world, n - progress.done))
    return part
