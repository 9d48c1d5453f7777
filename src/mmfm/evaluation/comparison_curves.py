"""Several curves in one plot, as SVG that takes its text colour from the page around it."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_INK = "#010203"
"""Colour of axes and text; the page's colour replaces it."""

_MOST = 200
"""Points of a curve, so that a long training does not make a long page."""


@dataclass(frozen=True)
class Curve:
    """A curve: its label, its colour, and points (x, value)."""

    label: str
    colour: str
    points: list[tuple[float, float]]


def draw_curves(curves: Sequence[Curve], name: str, x: str = "step") -> str:
    """Plot curves and return an ``<svg>`` element.

    A curve of more than 200 points is shown as the mean of equal parts. Curves of one colour, as those of one setting
    have, differ in their dashes. The axis is logarithmic if the values differ by more than five times.

    Args:
        name: of the values, at their axis and for those who can't see the plot.
        x: what they are plotted against.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "text.color": _INK, "axes.edgecolor": _INK,
        "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        used: list[str] = []
        for i, curve in enumerate(curves):
            points = _thinned(curve.points)
            dashes = ("-", "--", ":", "-.")[used.count(curve.colour) % 4]
            used.append(curve.colour)
            # The first are the broadest, so that equal curves can all be seen.
            width, marker = max(1.2, 3 - 0.7 * i), "." if len(points) < 25 else ""
            axes.plot(
                *zip(*points, strict=True), dashes, color=curve.colour, linewidth=width, marker=marker,
                label=curve.label,
            )  # fmt: skip
        values = [value for curve in curves for _, value in curve.points]
        if min(values) > 0 and max(values) > 5 * min(values):
            axes.set_yscale("log")
            for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                which(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.set(xlabel=x, ylabel=name)
        axes.grid(alpha=0.2, color=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    labels = ", ".join(curve.label for curve in curves)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{name} by {x} of {labels}"', svg, count=1)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points, or the means of equal parts of them, each at its last x."""
    size = -(-len(points) // _MOST)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]
