"""The first images of finished results side by side, as a picture. Nothing here imports PyTorch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmfm.evaluation.comparison import Comparison, Row, differs, distance_of, place_of, setting_of
from mmfm.infra import npz
from mmfm.infra.pictures import image_grid

IMAGES = 25
"""Number of images of each result."""

_COLUMNS, _LARGEST_SIDE = 5, 96
_PANELS = 3
"""Results in a row: the three settings of the workflow's comparison."""

_TITLE, _SMALL = 17, 12
"""Sizes of text, pixels."""

_MARGIN = 16


def draw(comparison: Comparison) -> Image.Image:
    """Draw the first images of every result: a panel per result, three in a row, every encoder in new rows.

    Images larger than 96 pixels are shown smaller.

    Raises:
        ValueError: no result has its images any more, or an ``images.npz`` is damaged.
    """
    if not any(result.images for result in comparison.results):
        raise ValueError("none of these results has its images any more; make them again for a picture")
    rows: list[list[Image.Image]] = []
    place = None
    for result, row in zip(comparison.results, comparison.rows, strict=True):
        if place_of(row) != place or len(rows[-1]) == _PANELS:
            rows.append([])
        place = place_of(row)
        rows[-1].append(_titled(_panel(result.images), _titles(row, comparison.rows)))
    sheet = _joined([_joined(panels, downwards=False) for panels in rows], downwards=True)
    whole = _titled(sheet, {caption(comparison): _SMALL}, gap=_MARGIN)
    framed = Image.new("RGB", (whole.width + 2 * _MARGIN, whole.height + 2 * _MARGIN), "white")
    framed.paste(whole, (_MARGIN, _MARGIN))
    return framed


def caption(comparison: Comparison) -> str:
    """Say which images the grids show."""
    rows = comparison.rows
    whose = "each result" if differs(rows, "seed") else f"seed {rows[0]['seed']}"
    count = min(IMAGES, *(row["n_images"] for row in rows))
    return (
        f"The first {count} images of {whose}, not selected; those in the same place are made from the same random "
        f"numbers{' if their seeds are equal' if differs(rows, 'seed') else ''}. {comparison.main['measure']}."
    )


def _titles(row: Row, rows: list[Row]) -> dict[str, int]:
    """Return the lines above a panel, with their sizes: what tells it from the others, and its distance."""
    several = len({place_of(other) for other in rows}) > 1
    name = f"{row['encoder']} {setting_of(row)}" if several else setting_of(row)
    mark = "  (best)" * row["best"] + "  (not comparable)" * (row["group"] > 0)
    lines = {f"{name}:  {distance_of(row)}{mark}": _TITLE}
    if differs(rows, "results"):
        lines[f"{row['results']}: {row['name']}"] = _SMALL
    elif len({(place_of(other), setting_of(other)) for other in rows}) < len(rows):
        lines[row["name"]] = _SMALL
    return lines


def _panel(path: Path | None) -> Image.Image:
    """Return the grid of a result, or say that its images are missing."""
    if path is None:
        return _titled(Image.new("RGB", (1, 1), "white"), {"its images no longer exist": _SMALL})
    return grid(path)


def grid(path: Path) -> Image.Image:
    """Arrange the first 25 images of ``images.npz``, five in a row; ValueError if the file is damaged."""
    images = npz.map_array(path)[:IMAGES]
    if images.shape[1] > _LARGEST_SIDE:
        size = (_LARGEST_SIDE, _LARGEST_SIDE)
        images = np.stack([np.asarray(Image.fromarray(i).resize(size, Image.Resampling.LANCZOS)) for i in images])
    return image_grid(images.transpose(0, 3, 1, 2), _COLUMNS)


def _titled(picture: Image.Image, lines: dict[str, int], gap: int = 4) -> Image.Image:
    """Put lines of text, with their sizes, above a picture; small text is grey."""
    fonts = {text: ImageFont.load_default(size=size) for text, size in lines.items()}
    widths = [int(font.getlength(text)) + 1 for text, font in fonts.items()]
    head = sum(size + 5 for size in lines.values()) + gap
    titled = Image.new("RGB", (max(picture.width, *widths), head + picture.height), "white")
    pen, top = ImageDraw.Draw(titled), 0
    for text, size in lines.items():
        pen.text((0, top), text, fill="#555555" if size == _SMALL else "black", font=fonts[text])
        top += size + 5
    titled.paste(picture, (0, head))
    return titled


def _joined(pictures: Sequence[Image.Image], downwards: bool) -> Image.Image:
    """Place pictures one below or beside the other, with a margin between them."""
    widths, heights = [picture.width for picture in pictures], [picture.height for picture in pictures]
    between = _MARGIN * (len(pictures) - 1)
    size = (max(widths), sum(heights) + between) if downwards else (sum(widths) + between, max(heights))
    joined, place = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        joined.paste(picture, (0, place) if downwards else (place, 0))
        place += (picture.height if downwards else picture.width) + _MARGIN
    return joined
