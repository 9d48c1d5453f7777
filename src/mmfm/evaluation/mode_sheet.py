"""A contact sheet of the worst and the best modes: training images of each beside the images generated from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mmfm import data
from mmfm.data import Listing
from mmfm.evaluation.contact_sheet import MAX_SIDE, cropped_row
from mmfm.evaluation.mode_quality import MIN_IMAGES, ModeQuality, limits
from mmfm.infra import store

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORST, BEST = 8, 2
"""Modes in the picture."""

COLUMNS = 8
"""Images of each kind in a row."""

RETURNED, STRAYED = (31, 119, 180), (230, 97, 1)
"""Colours of the frames: blue and orange, which colour-blind readers can tell apart."""

_READABLE = 64
_LONGEST_NAME = 26  # characters
_FRAME, _GAP, _BETWEEN = 4, 3, 36  # pixels


def chosen(quality: ModeQuality) -> dict[str, list[int]]:
    """Return the modes in the picture by group: the worst of the ranking, and those of the highest certain share."""
    worst, rest = quality.ranking()[:WORST].tolist(), quality.ranking()[WORST:]
    certain = limits(quality.returned[rest], quality.n[rest])[0]
    best = rest[np.lexsort((quality.distance[rest], -certain))][:BEST].tolist()
    return {name: modes for name, modes in (("worst", worst), ("best", best)) if modes}


def draw(
    path: str | Path,
    quality: ModeQuality,
    listing: Listing,
    nearest: dict[int, np.ndarray],
    classes: dict[int, str],
    families: Sequence[str],
    images: np.ndarray,
    modes: np.ndarray,
    returned: np.ndarray,
) -> None:
    """Write the contact sheet as PNG.

    Args:
        listing: the training images.
        nearest: indices of the training images that are likeliest under each mode of :func:`chosen`, likeliest first.
        classes: the most common class of these modes' training images, with its share; empty for a single class.
        families: of the fonts that can draw these.
        images: (n, S, S, 3) uint8, the generated images.
        modes: (n,) the modes that they were drawn from.
        returned: (n,) bool, whether they lie in their mode again.

    Raises:
        ValueError: a training image can't be read.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = chosen(quality)
    side = min(MAX_SIDE, images.shape[1])
    heights = [len(rows) for rows in groups.values()] or [1]
    figure = Figure(figsize=(13, 0.35 + 0.66 * sum(heights) + 0.4 * len(heights)), dpi=130)
    figure.set_layout_engine("constrained", h_pad=0.06)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    if not groups:
        _say_nothing_is_ranked(panels[0], quality)
    for axes, (name, rows) in zip(panels, groups.items(), strict=False):
        strips = []
        for mode in rows:
            training = cropped_row(listing, nearest[mode], COLUMNS, side).transpose(0, 2, 3, 1)
            own = np.flatnonzero(modes == mode)[:COLUMNS]
            strips.append(_strip(training, [_shrunk(images[i], side) for i in own], returned[own]))
        _show(axes, strips)
        room = 22 if name == "worst" else 8  # for the words above the columns
        axes.set_title(_title(name, quality), loc="left", fontsize=10, fontweight="bold", pad=room)
        labels = [_label(mode, quality, classes.get(mode, "")) for mode in rows]
        axes.set_yticks((np.arange(len(rows)) + 0.5) * len(strips[0]), labels, fontsize=8, fontfamily=families)
        if name == "worst":
            _head(axes, strips[0].shape[1])
    with store.whole_file(path) as partial:
        figure.savefig(partial, format="png", bbox_inches="tight", pad_inches=0.15)


def _shrunk(image: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(data.center_crop(Image.fromarray(image), side), np.uint8)


def _strip(training: np.ndarray, generated: Sequence[np.ndarray], returned: np.ndarray) -> np.ndarray:
    """Return a row of the picture: training images, a space, and generated images in coloured frames."""
    scale = max(1, -(-_READABLE // training.shape[1]))
    cell = training.shape[1] * scale + 2 * _FRAME
    step = cell + _GAP
    strip = np.full((step, 2 * COLUMNS * step + _BETWEEN, 3), 255, np.uint8)
    for place, image in enumerate([*training, *generated]):
        left = place * step + (_BETWEEN if place >= COLUMNS else 0)
        if place >= COLUMNS:
            strip[:cell, left : left + cell] = RETURNED if returned[place - COLUMNS] else STRAYED
        inner = image.repeat(scale, 0).repeat(scale, 1)
        strip[_FRAME : cell - _FRAME, left + _FRAME : left + cell - _FRAME] = inner
    return strip


def _show(axes: "Axes", strips: list[np.ndarray]) -> None:
    axes.imshow(np.concatenate(strips), interpolation="nearest")
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _head(axes: "Axes", width: int) -> None:
    """Write above the first group what its columns are; ``width`` is that of a row in pixels."""
    axes.text(0, -6, "training images, likeliest first", fontsize=8.5, va="bottom", color="0.25")
    words = {
        "generated from this mode, not selected:  ": "0.25",
        "returned": _hexadecimal(RETURNED),
        "  or  ": "0.25",
        "in another mode": _hexadecimal(STRAYED),
    }
    written = axes.text((width + _BETWEEN) / 2, -6, "", fontsize=8.5, va="bottom")
    for word, colour in words.items():
        written = axes.annotate(
            word, (1, 0), xycoords=written, fontsize=8.5, va="bottom", color=colour,
            fontweight="bold" if colour.startswith("#") else "normal",
        )  # fmt: skip


def _hexadecimal(colour: tuple[int, int, int]) -> str:
    return "#" + bytes(colour).hex()


def _title(name: str, quality: ModeQuality) -> str:
    ranked, poor = len(quality.ranking()), int((quality.shortfall > 0).sum())
    if name == "best":
        return "For comparison, the best modes"
    few = f"with at least {MIN_IMAGES} generated images"
    certain = "none is poor beyond chance" if not poor else f"{poor:,} are poor beyond chance"
    return f"The worst of {ranked:,} modes {few}; {certain}"


def _label(mode: int, quality: ModeQuality, common: str) -> str:
    # Long names, as ImageNet has them, would make the images small.
    short = common if len(common) <= _LONGEST_NAME else f"{common[: _LONGEST_NAME - 1]}…"
    head = f"mode {mode}: {short}" if common else f"mode {mode}"
    returned = f"{quality.returned[mode]} of {quality.n[mode]} return"
    distance = f"distance {quality.distance[mode]:.2f}"
    if quality.n_real[mode]:
        returned += f" (expected {quality.expected[mode]:.0%})"
        distance += f" (real images {quality.real_distance[mode]:.2f})"
    return f"{head}\n{returned}\n{distance}"


def _say_nothing_is_ranked(axes: "Axes", quality: ModeQuality) -> None:
    axes.set_axis_off()
    text = (
        f"No mode has {MIN_IMAGES} generated images: {int(quality.n.sum()):,} images in {len(quality.n):,} modes.\n"
        f"Raise sample.n_images to {10 * len(quality.n):,} to see which modes are poor."
    )
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=11)
