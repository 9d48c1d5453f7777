"""Metrics of results that differ in one thing: evaluations, training step, guidance scale, or number of modes.

Nothing here imports PyTorch.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfm.config.choices import METRICS
from mmfm.evaluation.alike import metrics_of, require_alike, warnings_of
from mmfm.infra import store

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Axis:
    """What varies along a curve.

    Attributes:
        title: at the axis of the plot.
        value: of a record of the stage `fid`.
        varied: settings that vary with it, as :func:`mmfm.evaluation.alike.require_alike` names them.
        logarithmic: whether values are compared by their ratios.
    """

    title: str
    value: Callable[[Record], float]
    varied: tuple[str, ...]
    logarithmic: bool = True


def _scale(record: Record) -> float:
    """Return the guidance scale; 1 is no guidance, and then none is recorded."""
    guidance = record["samples"]["guidance"]
    return float(guidance["scale"]) if guidance else 1.0


AXES: dict[str, Axis] = {
    "t": Axis(
        "evaluations of the network (NFE)",
        lambda record: record["samples"]["function_evaluations"],
        ("time_points", "last_time"),
    ),
    "step": Axis("training step", lambda record: record["samples"]["weights"]["step"], ("step", "weights")),
    "g": Axis("guidance scale", _scale, ("guidance", "guidance scale"), logarithmic=False),
    "k": Axis(
        "modes",
        lambda record: record["samples"]["n_modes"],
        ("n_modes", "n_labels", "model num_classes", "weights", "guidance guide", "input spatial_gmm"),
    ),
}
"""By the part of a result's name that lists values."""

_OF_THE_FLOW = ("solver", "source_only", "guidance", "tolerances")
"""What images of the source alone, of a single time point, don't have."""


def collect(records: Mapping[str, Record], part: str) -> dict[str, Any]:
    """Return the metrics along a curve as JSON values, in ascending order of what varies.

    Args:
        records: at least two results of the stage `fid`, by the names of their files without ending.
        part: key of :data:`AXES`.

    Raises:
        ValueError: a record is no such result, or the results differ in more than what varies, or not in that.
    """
    axis = AXES[part]
    try:
        source = [record for record in records.values() if record["samples"]["source_only"]]
        varied = (*axis.varied, *(_OF_THE_FLOW if source and part == "t" else ()))
        require_alike(records, varied, axis.title)
        if any(axis.value(record) is None for record in records.values()):
            raise ValueError(f"a result does not say its {axis.title}, as with weights that were given; train them")
        points = sorted((axis.value(record), name) for name, record in records.items())
        values = [value for value, _ in points]
        if len(set(values)) < max(2, len(points)):
            listed = ", ".join(map(number, values))
            raise ValueError(
                f"the results' {axis.title}: {listed}; a curve needs two points or more, and each value once"
            )
        ordered = [records[name] for _, name in points]
        metrics, record = metrics_of(ordered), ordered[0]
        return {
            "stage": "curve",
            "varies": part,
            "measure": record["measure"],
            "setting": record["samples"]["setting"],
            "guidance": any(each["samples"]["guidance"] for each in ordered),
            "results": [name for _, name in points],
            "images_digests": [each["samples"]["images_digest"] for each in ordered],
            "values": values,
            "metrics": metrics,
            "best": {name: values[_best(name, row)] for name, row in metrics.items()},
            "image_size": record["samples"]["image_size"],
            "warnings": warnings_of(ordered),
            **{name: record[name] for name in ("n_images", "floor", "floor_n_images", "detector", "reference")},
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a file is not a result of fid ({error!r}); make it again") from error


def number(value: float) -> str:
    """Format a number, with all its digits if it is whole."""
    return f"{int(value):,}" if float(value).is_integer() else f"{value:,g}"


def _best(metric: str, row: list[float]) -> int:
    pick = max if METRICS[metric].larger else min
    return row.index(pick(row))


def render(curve: Record) -> str:
    """Return a curve as text: a column for each metric, with * at its best value."""
    metrics = curve["metrics"]
    columns = [[_heading(curve["varies"]), *map(number, curve["values"])]]
    for name, row in metrics.items():
        best = _best(name, row)
        columns.append(
            [METRICS[name].title, *(f"{value:.4f}{'*' if i == best else ' '}" for i, value in enumerate(row))]
        )
    widths = [max(map(len, column)) for column in columns]
    head = [f"{curve['measure']}, {curve['n_images']:,} images for each point; * is the best"]
    head.append(f"detector:  {curve['detector']['name']}")
    head.append(f"reference: {curve['reference']['source']}")
    if curve["floor"] is not None:
        head.append(f"floor:     {curve['floor']:.4f} (distance of {curve['floor_n_images']:,} held-out real images)")
    table = [
        "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in zip(*columns, strict=True)
    ]
    warnings = [f"WARNING: {warning}" for warning in curve["warnings"]]
    return "\n\n".join("\n".join(part) for part in (head, table, warnings) if part) + "\n"


def _heading(part: str) -> str:
    return "evaluations" if part == "t" else AXES[part].title


_LISTED = re.compile(r"\.(t|step|g|k)[\d.]+,[\d.,]*\d")
_SPELT = {"seed": "seed {}", "k": "{} modes", "step": "step {}", "t": "{} time points", "g": "guidance {}"}


def _title(name: str, setting: str) -> str:
    """Spell the parts of a curve's name but the one that the axis shows, ``dinov2_mode.seed1.t5,10`` say."""
    first, *parts = re.split(r"\.(?!\d)", _LISTED.sub("", name))
    encoder, known, rest = first.rpartition(f"_{setting}")
    words = [encoder, f"setting {setting}{rest}"] if known and rest in ("", "_ag") else [first]
    for part in parts:
        kind = re.fullmatch(r"([a-z]+)(\d[\d.]*)", part)
        words.append(_SPELT[kind[1]].format(kind[2]) if kind and kind[1] in _SPELT else part)
    return ", ".join(words)


def plot(curve: Record, path: Path, name: str) -> None:
    """Plot every metric against what varies, with a ring around its best value, as PNG.

    Args:
        name: of the curve's file, for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    axis, metrics = AXES[curve["varies"]], curve["metrics"]
    columns = min(len(metrics), 3)
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(max(5.0, 3.9 * columns), 3.4 * rows + 0.3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{_title(name, curve['setting'])}; {curve['n_images']:,} images for each point", fontsize=10)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (metric, row) in zip(panels, metrics.items(), strict=False):
        best = _best(metric, row)
        axes.plot(curve["values"], row, "o-", markersize=4, color="C0")
        axes.plot(curve["values"][best], row[best], "o", markersize=11, fillstyle="none", color="C3")
        axes.annotate(
            f"{row[best]:.4g}", (curve["values"][best], row[best]), (0, 9), textcoords="offset points", ha="center",
            color="C3", fontsize=9,
        )  # fmt: skip
        if metric == "frechet" and curve["floor"] is not None:
            # As a line it would often be so far below that the curve looked flat.
            axes.text(
                0.98, 0.96, f"real images: {curve['floor']:.3g}", transform=axes.transAxes, ha="right", va="top",
                fontsize=8, color="0.4",
            )  # fmt: skip
        if axis.logarithmic and curve["values"][0] > 0:
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(FixedLocator(curve["values"]))
        axes.xaxis.set_major_formatter(lambda value, _: number(value))
        better = "larger" if METRICS[metric].larger else "smaller"
        axes.set(xlabel=axis.title)
        axes.set_title(f"{METRICS[metric].title}: {better} is better", fontsize=10)
        axes.margins(x=0.08, y=0.18)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels:
        axes.set_visible(False)
    with store.whole_file(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})
