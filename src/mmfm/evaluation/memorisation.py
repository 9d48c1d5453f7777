"""Are generated images copies of training images? Their distances from the nearest one, against those of real images.

A generator that learned the distribution is as far from its training images as real images that it never saw. Blurred
images are closer to everything, so that a warning asks for a look at the pairs, and is no proof.
"""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import mannwhitneyu, nhypergeom

from mmfm.evaluation.neighbours import Bank, Stored, check, nearest
from mmfm.infra import store
from mmfm.infra.pictures import image_grid

CLOSE = 0.01
"""Share of held-out images that count as close: a generated image is close if it is closer than the last of these."""

_DOUBT = 1e-3


@dataclass(frozen=True)
class Memorisation:
    """Distances in feature space from the nearest training image.

    Attributes:
        generated: (n,) float64, of generated images.
        nearest: (n,) int64, those training images.
        heldout: (m,) float64, of real images that are not among the training images.
        closer: probability that a generated image is closer than a held-out one; ties count half. 0.5 is expected.
        close: share of generated images closer than the closest :data:`CLOSE` of the held-out ones, which is expected.
        warnings: what is more than chance explains, a sentence each.
    """

    generated: np.ndarray
    nearest: np.ndarray
    heldout: np.ndarray
    closer: float
    close: float
    warnings: tuple[str, ...]

    def closest(self, number: int) -> np.ndarray:
        """Return the ``number`` generated images that are closest to a training image, closest first."""
        return np.argsort(self.generated, kind="stable")[:number]


def memorisation(
    generated: Bank,
    heldout: Bank,
    training: Bank | Stored,
    device: torch.device | str = "cpu",
    doubt: float = _DOUBT,
    advance: Callable[[int], None] | None = None,
) -> Memorisation:
    """Compare features of generated (n, D) and held-out real images (m, D) with those of all training images (N, D).

    The first two are in memory, the last may be in a file and is read a block at a time.

    Args:
        device: where distances are computed.
        doubt: probability below which chance does not explain a difference: of Mann and Whitney's test for all
            distances, and of the negative hypergeometric distribution for the close ones.
        advance: called with the number of pairs compared, of (n + m) N.

    Raises:
        ValueError: features of another shape, NaN, or all equal; no held-out images.
    """
    banks: dict[str, Bank | Stored] = {"generated": generated, "held-out": heldout, "training": training}
    for name, bank in banks.items():
        check(bank, f"features of the {name} images", 2)
    if not generated.shape[1] == heldout.shape[1] == training.shape[1]:
        raise ValueError(
            f"generated, held-out and training images have {generated.shape[1]}, {heldout.shape[1]} and "
            f"{training.shape[1]} features; use one detector"
        )
    device = torch.device(device)
    distances, indices = nearest(generated, training, device, advance=advance)
    real = nearest(heldout, training, device, advance=advance)[0].numpy()
    ours, n = distances.numpy(), len(distances)
    test = mannwhitneyu(real, ours, alternative="greater", method="asymptotic")
    closer = float(test.statistic) / (n * len(real))
    rank = math.ceil(CLOSE * len(real))
    close = int((ours < np.sort(real)[rank - 1]).sum())
    warnings = []
    if test.pvalue < doubt:
        warnings.append(
            f"generated images are closer to the training images than held-out real ones: in {closer:.0%} of pairs, "
            "50% are expected; look at the closest pairs"
        )
    # In a random order of all images, so many generated ones come before the held-out one of this rank.
    if nhypergeom.sf(close - 1, n + len(real), n, rank) < doubt:
        warnings.append(
            f"{close:,} of {n:,} generated images ({close / n:.1%}) are closer to a training image than "
            f"{1 - CLOSE:.0%} of the held-out real ones; look at the closest pairs"
        )
    return Memorisation(ours, indices.numpy(), real, closer, close / n, tuple(warnings))


def draw(path: str | Path, found: Memorisation, generated: np.ndarray, training: np.ndarray) -> None:
    """Draw the closest pairs, the histogram of distances and the warnings as PNG.

    Args:
        generated: (k, 3, S, S) uint8, the images ``found.closest(k)``.
        training: (k, 3, S, S) uint8, their nearest training images.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, gridspec_kw={"height_ratios": [1, 1.6]})
    sheet = np.asarray(image_grid(np.concatenate([generated, training]), len(generated)))
    above.imshow(sheet, interpolation="nearest")
    above.set_yticks([sheet.shape[0] / 4, 3 * sheet.shape[0] / 4], ["generated", "nearest training image"], fontsize=8)
    chosen = found.generated[found.closest(len(generated))]
    centres = (np.arange(len(generated)) + 0.5) * sheet.shape[1] / len(generated)
    digits = max(0, 2 - math.floor(math.log10(chosen.max() or 1)))
    above.set_xticks(centres, [f"{distance:.{digits}f}" for distance in chosen], fontsize=7)
    above.tick_params(length=0)
    above.spines[:].set_visible(False)
    above.set_title("closest pairs and their distances", loc="left", fontsize=9, fontweight="bold")
    edges = np.histogram_bin_edges(np.concatenate([found.generated, found.heldout]), 60)
    for name, distances in (("held-out real images", found.heldout), ("generated images", found.generated)):
        weights = np.full(len(distances), 1 / len(distances))
        below.hist(distances, edges, weights=weights, alpha=0.55, label=f"{len(distances):,} {name}")
    below.set_xlabel("distance from the nearest training image, in feature space")
    below.set_ylabel("share of images")
    below.set_title(f"a generated image is closer than a real one in {found.closer:.1%} of pairs", fontsize=9)
    below.spines[["top", "right"]].set_visible(False)
    below.legend(frameon=False, fontsize=8)
    if found.warnings:
        lines = [textwrap.fill(f"WARNING: {line}", 110) for line in found.warnings]
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=8, color="tab:red")
    with store.whole_file(path) as partial:
        figure.savefig(partial, format="png")
