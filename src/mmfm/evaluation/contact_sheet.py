"""A contact sheet of some modes, showing the images whose tokens are most likely under each mode."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from mmfm import data
from mmfm.data import Listing
from mmfm.infra import fonts, store
from mmfm.infra.pictures import image_grid
from mmfm.mixture.gaussian import Mixture

ReadTokens = Callable[[int, int], np.ndarray]
"""(start, stop) -> tokens (stop - start, C) float32."""

ROWS, COLUMNS = 3, 12
"""Modes per group of sizes, and images per mode."""

MAX_SIDE = 96
"""Largest side of an image in a contact sheet, pixels."""

_DENSITY_ROWS = 1024  # the densities of 1024 images take 67 MB at K = 8192


def choose_modes(counts: np.ndarray, each: int = ROWS) -> dict[str, list[int]]:
    """Choose the largest, median and smallest modes that have images, ``each`` of them.

    Args:
        counts: (K,) number of images per mode.

    Returns:
        modes by title, largest first; a single group if at most 3 ``each`` modes have images.
    """
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0].tolist()
    if len(order) <= 3 * each:
        return {"all modes with images": order}
    middle = (len(order) - each) // 2
    return {
        "largest modes": order[:each],
        "modes of median size": order[middle : middle + each],
        "smallest modes": order[-each:],
    }


def nearest_images(
    read: ReadTokens, labels: np.ndarray, mixture: Mixture, modes: Sequence[int], block: int, each: int = COLUMNS
) -> dict[int, np.ndarray]:
    """Find up to ``each`` images of each mode that are most likely under it.

    Args:
        labels: (N,) mode of each image.
        modes: modes to consider.
        block: tokens in memory at a time; blocks without an image of these modes are not read.

    Returns:
        image indices (n,) int64 by mode, most likely first, n <= ``each``.
    """
    images = np.flatnonzero(np.isin(labels, modes))
    found = {k: (np.empty(0), np.empty(0, np.int64)) for k in modes}
    for chunk in data.ranges(0, len(labels), block):
        own = images[np.searchsorted(images, chunk.start) : np.searchsorted(images, chunk.stop)]
        if not len(own):
            continue
        tokens = read(chunk.start, chunk.stop)[own - chunk.start]
        densities = _own_density(mixture, tokens, labels[own])
        for k in np.unique(labels[own]).tolist():
            new = labels[own] == k
            density, numbers = np.append(found[k][0], densities[new]), np.append(found[k][1], own[new])
            order = np.argsort(-density, kind="stable")[:each]
            found[k] = density[order], numbers[order]
    return {k: numbers for k, (_, numbers) in found.items()}


def _own_density(mixture: Mixture, tokens: np.ndarray, modes: np.ndarray) -> np.ndarray:
    """Return log w_k N(token; mode k) of each token (b, C) under its own mode, (b,) float64."""
    density = np.empty(len(tokens))
    for part in data.ranges(0, len(tokens), _DENSITY_ROWS):
        joint = mixture.log_joint(torch.from_numpy(tokens[part.start : part.stop])).cpu().numpy()
        density[part.start : part.stop] = joint[np.arange(len(part)), modes[part.start : part.stop]]
    return density


def draw(
    path: str | Path, listing: Listing, read: ReadTokens, labels: np.ndarray, mixture: Mixture, block: int
) -> None:
    """Write the contact sheet as PNG: one row per mode, labelled with its size, weight and most common class.

    A class whose name no installed font can draw is shown by its number.

    Args:
        listing: the images, in the order of the tokens.
        read, labels, mixture, block: see :func:`nearest_images`.

    Raises:
        ValueError: an image can't be read.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.bincount(labels, minlength=mixture.n_components)
    groups = choose_modes(counts)
    nearest = nearest_images(read, labels, mixture, [k for modes in groups.values() for k in modes], block)
    columns = max(map(len, nearest.values()))
    first = next(iter(nearest.values()))[0]
    side = min(MAX_SIDE, *data.read_image(listing.path(int(first))).size)
    names, families = fonts.drawable(listing.classes)
    heights = [len(modes) for modes in groups.values()]
    figure = Figure(figsize=(2.3 + 0.6 * columns, 0.45 * len(groups) + 0.63 * sum(heights)), dpi=130)
    figure.set_layout_engine("constrained", h_pad=0.06)
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (title, modes) in zip(rows[:, 0], groups.items(), strict=True):
        images = np.concatenate([cropped_row(listing, nearest[k], columns, side) for k in modes])
        sheet = np.asarray(image_grid(images, columns))
        axes.imshow(sheet, interpolation="nearest")
        axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
        centres = (np.arange(len(modes)) + 0.5) * sheet.shape[0] / len(modes)
        axes.set_yticks(
            centres,
            [_label(k, counts, labels, listing.labels, names, mixture) for k in modes],
            fontsize=7.5,
            fontfamily=families,
        )
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    with store.whole_file(path) as partial:
        figure.savefig(partial, bbox_inches="tight", pad_inches=0.1)


def cropped_row(listing: Listing, images: np.ndarray, columns: int, side: int) -> np.ndarray:
    """Return images (columns, 3, side, side) uint8, padded with white ones."""
    row = np.full((columns, 3, side, side), 255, np.uint8)
    for i, image in enumerate(images.tolist()):
        cropped = data.center_crop(data.read_image(listing.path(image)), side)
        row[i] = np.asarray(cropped, np.uint8).transpose(2, 0, 1)
    return row


def _label(
    k: int, counts: np.ndarray, labels: np.ndarray, classes: np.ndarray, names: Sequence[str], mixture: Mixture
) -> str:
    """Return the text beside a mode's images; ``classes`` (N,) are the images' classes, with these names."""
    images = f"{counts[k]:,} image{'s' if counts[k] > 1 else ''}"
    lines = [f"mode {k}", f"{images}, weight {float(mixture.weights[k]):.2%}"]
    if len(names) > 1:
        own = np.bincount(classes[labels == k], minlength=len(names))
        lines.append(f"{own.max() / own.sum():.0%} {names[int(own.argmax())]}")
    return "\n".join(lines)
