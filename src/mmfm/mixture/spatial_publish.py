"""The end of the stage spatial_gmm: from finished rows to the published store and its report."""

from pathlib import Path
from typing import Any

import numpy as np
import zarr

from mmfm.infra import stage_state, store
from mmfm.mixture.coupling import CouplingCost

STORE, REPORT = "spatial_gmm.zarr", "report.json"
"""Names of the results in the stage's state."""


def marker(state: Path, mode: int) -> Path:
    """Return the file whose existence says that a mode's rows are finished."""
    return state / f"component-{mode:05d}.safetensors"


def publish(
    state: Path, outputs: dict[str, Path], counts: np.ndarray, weights: np.ndarray, digests: dict[str, str]
) -> dict[str, Any]:
    """Check every row against its marker, fill in the modes without images, report, put both into their places.

    Args:
        state: the stage's state directory, with the partial store and a marker for every mode with images.
        outputs: places of store and report, by their names in the state.
        counts: (K,) images of each mode.
        weights: (K,).
        digests: of the inputs; become attributes.

    Returns:
        The report.

    Raises:
        ValueError: a row is not the one that its marker was written for.
    """
    group = zarr.open_group(state / "spatial.zarr", mode="r+")
    large = [group[name] for name in ("means", "variances") if name in group and group[name].ndim == 4]
    diag, weights, cost = len(large) > 1, np.asarray(weights, np.float64), CouplingCost(weights, counts)
    filled, empty = np.flatnonzero(counts), np.flatnonzero(counts == 0)
    variances, raised, row_digests = np.empty(len(counts)), 0, []
    totals = [np.zeros(array.shape[1:]) for array in large]
    for k in filled:
        rows = [array[int(k)] for array in large]
        variances[k], floored = _check_rows(marker(state, k), rows, counts[k])
        raised += floored
        row_digests.append(store.array_digest(*rows))
        for total, row in zip(totals, rows, strict=True):
            total += row
        cost.add(k, rows[0], float(rows[-1].mean(dtype=np.float64)) if diag else variances[k], variances[k])
    variances[empty] = variances[filled].mean()
    for k in empty:
        for array, total in zip(large, totals, strict=True):
            array[int(k)] = (total / len(filled)).astype(np.float32)
        cost.add(k, large[0][int(k)], float(totals[-1].mean() / len(filled)) if diag else variances[k], 0.0)
    small = {"weights": weights, "counts": counts} | ({"variances": variances} if not diag else {})
    for name, values in small.items():
        group.create_array(name, data=values, chunks=values.shape, overwrite=True)
    digest = store.array_digest(np.frombuffer("".join(row_digests).encode(), np.uint8), variances, weights, counts)
    group.attrs.update({**digests, "digest": digest})
    report = {
        "digest": digest,
        "covariance_type": "diag" if diag else "spherical",
        "n_images": int(counts.sum()),
        "n_components": len(counts),
        "empty_components": len(empty),
        "components_of_one_image": int((counts == 1).sum()),
        "latent_shape": list(large[0].shape[1:]),
        "variance": {"min": variances.min(), "median": float(np.median(variances)), "max": variances.max()},
        "mean_variance_by_images": float(variances @ counts / counts.sum()),
        "share_of_positions_raised_to_the_floor": raised / (len(filled) * totals[0].size),
        "coupling_cost": cost.result(),
        **digests,
    }
    with stage_state.finishing(state, outputs) as finished:
        store.write_json(finished / REPORT, report)
        store.place_linked(state / "spatial.zarr", finished / STORE)
    return report


def _check_rows(path: Path, rows: list[np.ndarray], count: int) -> tuple[float, int]:
    """Return a mode's average variance and its number of raised positions, after comparing its rows with its marker."""
    arrays, metadata = store.map_arrays(path)
    if metadata["row_digest"] != store.array_digest(*rows) or arrays["count"][0] != count:
        path.unlink()
        raise ValueError(
            f"the row of mode {int(path.stem.split('-')[1])} was damaged on disk; run the same command again to make "
            "it anew"
        )
    return float(arrays["variance"][0]), int(arrays["raised"][0]) if "raised" in arrays else 0
