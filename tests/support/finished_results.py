"""Finished results as the stages leave them, made from the demo's images without any network."""

from pathlib import Path
from typing import Any

import numpy as np

from mmfm.infra import store
from support.fid_runs import write_samples

WARNING = "This number is NOT an ImageNet FID."


def write_result(
    results: Path, images: np.ndarray, setting: str, distance: float, encoder: str = "dinov2", seed: int = 0,
    guide: str = "", **changes: Any,
) -> Path:  # fmt: skip
    """Write a Frechet distance, its images, its training's history and its mixture's report; return the distance.

    Args:
        images: (n, S, S, 3) uint8.
        guide: ``_ag`` for a name of autoguidance.
        changes: of the record.
    """
    mixture = setting in ("gmm", "mode")
    training = f"seed{seed}.tiny{'.k64' if mixture else ''}"
    inputs = {"stats": f"stats-{encoder}", **({"spatial_gmm": f"mixture-{encoder}"} if mixture else {})}
    samples = write_samples(
        results / "sample" / f"{encoder}_{setting}{guide}" / f"{training}.t25", images, setting=setting, seed=seed,
        n_modes=64 if mixture else 0, inputs=inputs,
    )  # fmt: skip
    report = {
        "digest": f"mixture-{encoder}", "stats_digest": f"stats-{encoder}", "gmm_digest": "fit",
        "coupling_cost": {"gaussian": 2.0, "mixture_independent": 1.9, "mode_coupled": 0.75},
    }  # fmt: skip
    store.write_json(results / "spatial_gmm" / encoder / "k64" / "report.json", report)
    history = results / "train" / f"{encoder}_{setting}" / training / "history.jsonl"
    history.parent.mkdir(parents=True, exist_ok=True)
    history.write_text('{"step": 310, "seconds": 30.0, "loss": 0.9}\n{"step": 620, "seconds": 61.5, "loss": 0.7}\n')
    record = {
        "stage": "fid", "measure": "Frechet distance (not an FID)", "frechet_distance": distance, "warnings": [WARNING],
        "n_images": len(images), "floor": 0.25, "floor_n_images": 70,
        "detector": {"name": "fashion-mnist classifier (demo)", "digest": "de" * 32},
        "reference": {"source": "the 300 training images", "digest": "ef" * 32},
        "samples": store.read_json(samples / "samples.json"),
    }  # fmt: skip
    path = results / "fid" / f"{encoder}_{setting}{guide}.{training}.t25.json"
    store.write_json(path, {**record, **changes})
    return path


def write_mixture(folder: Path) -> None:
    """Write the report of a fit, that of the spatial mixture of :func:`write_result`."""
    report = {
        "n_images": 300, "n_components": 64, "active_components": 63, "n_iter": 12, "converged": True, "bic": -1234.5,
        "images_per_active_component": {"min": 1, "median": 4.0, "max": 19}, "class_nmi": 0.5,
        "gmm_digest": "fit",
    }  # fmt: skip
    store.write_json(folder / "report.json", report)
