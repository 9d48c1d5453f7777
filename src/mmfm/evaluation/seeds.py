"""One setting with several seeds: mean and range of its metrics.

Nothing here imports PyTorch.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mmfm.config.choices import METRICS
from mmfm.evaluation.alike import metrics_of, require_alike, warnings_of


def summarise(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and range of the metrics of results that differ in nothing but their seed, as JSON values.

    Args:
        records: at least two results of the stage `fid`, by the names of their files without ending.

    Raises:
        ValueError: a record is no such result, a seed is there twice, or the results differ in more than their seed.
    """
    try:
        require_alike(records, ("seed", "weights", "guidance guide"), "their seed")
        seeds = [_seed(record) for record in records.values()]
        if len(seeds) < 2 or len(set(seeds)) < len(seeds):
            raise ValueError(
                f"the results have the seeds {', '.join(map(str, seeds))}; give two or more different ones"
            )
        record = next(iter(records.values()))
        return {
            "stage": "seeds",
            "measure": record["measure"],
            "results": list(records),
            "images_digests": [each["samples"]["images_digest"] for each in records.values()],
            "seeds": seeds,
            "trained": len({each["samples"]["weights"]["digest"] for each in records.values()}) > 1,
            "metrics": {name: _spread(of_seeds) for name, of_seeds in metrics_of(records.values()).items()},
            "warnings": warnings_of(records.values()),
            **{name: record[name] for name in ("n_images", "floor", "detector", "reference")},
            "configuration_digests": [each.get("configuration_digest") for each in records.values()],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a file is not a result of fid ({error!r}); make it again") from error


def _seed(record: Mapping[str, Any]) -> int:
    return int(record["samples"]["seed"])


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "min": min(values),
        "max": max(values),
        "std": statistics.stdev(values),
        "values": list(values),
    }


def render(summary: Mapping[str, Any]) -> str:
    """Return the result of :func:`summarise` as text."""
    seeds, metrics = summary["seeds"], summary["metrics"]
    distance = metrics["frechet"]
    what = "training and sampling" if summary["trained"] else "sampling, of the same weights"
    lines = [
        f"{summary['measure']}, {len(seeds)} seeds: {distance['mean']:.4f} "
        f"({distance['min']:.4f} to {distance['max']:.4f})",
        f"detector: {summary['detector']['name']}",
        *(f"WARNING: {warning}" for warning in summary["warnings"]),
        "",
    ]
    rows = {
        METRICS[name].title: f"{spread['mean']:.4f}, {spread['min']:.4f} to {spread['max']:.4f}, standard deviation "
        f"{spread['std']:.4f}"
        for name, spread in metrics.items()
    }
    rows["seeds"] = f"{', '.join(map(str, seeds))}, of {what}"
    rows["images"] = f"{summary['n_images']:,} for each seed"
    rows["reference"] = summary["reference"]["source"]
    for name, value in zip(summary["results"], distance["values"], strict=True):
        rows[name] = f"{value:.4f}"
    width = max(map(len, rows)) + 2
    return "\n".join([*lines, *(f"{name:<{width}}{value}" for name, value in rows.items())]) + "\n"
