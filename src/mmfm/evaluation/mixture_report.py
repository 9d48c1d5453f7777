"""Report on a fitted mixture: the numbers in report.json and two plots."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfm.infra import store
from mmfm.mixture.gaussian import Mixture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def entropy(shares: np.ndarray) -> float:
    """Return the entropy, in nats, of non-negative shares (K,): log K if they are equal, 0 if only one is positive."""
    p = shares[shares > 0] / shares.sum()
    return float(-(p * np.log(p)).sum())


def effective_number(shares: np.ndarray) -> float:
    """Return exp(entropy) of non-negative shares (K,): K if they are equal, 1 if only one is positive."""
    return float(np.exp(entropy(shares)))


def agreement_with_classes(labels: np.ndarray, classes: np.ndarray) -> tuple[float, float]:
    """Compare components (N,) with class labels (N,), both non-negative integers.

    Returns:
        purity (share of images in the majority class of their component) and normalised mutual information (divided by
        the mean of the two entropies). Both are 1 if components and classes coincide.
    """
    width = int(classes.max()) + 1
    counts = np.bincount(labels.astype(np.int64) * width + classes, minlength=(int(labels.max()) + 1) * width)
    joint = counts.reshape(-1, width) / len(labels)
    p_mode, p_class = joint.sum(1), joint.sum(0)
    entropies = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in (p_mode, p_class, joint)]
    mutual = entropies[0] + entropies[1] - entropies[2]
    mean = (entropies[0] + entropies[1]) / 2
    return float(joint.max(1).sum()), float(np.clip(mutual / mean, 0, 1)) if mean > 0 else 1.0


def summarise(
    mixture: Mixture, labels: np.ndarray, counts: np.ndarray, log_likelihood: float, classes: np.ndarray
) -> dict[str, Any]:
    """Return the statistics of a fit as JSON values.

    Args:
        labels: (N,) component of each image.
        counts: (K,) number of images per component.
        log_likelihood: mean over the images under the final parameters, nats.
        classes: (N,) class labels; with a single class the agreement is left out.
    """
    n, p = len(labels), mixture.n_parameters
    weights = mixture.weights.cpu().numpy()
    active = counts[counts > 0]
    report = {
        "n_images": n,
        "n_components": mixture.n_components,
        "active_components": len(active),
        "empty_components": int((counts == 0).sum()),
        "images_per_active_component": {
            "min": int(active.min()),
            "median": float(np.median(active)),
            "max": int(active.max()),
        },
        "entropy_of_weights": entropy(weights),
        "entropy_of_counts": entropy(counts),
        "effective_number_by_weights": effective_number(weights),
        "effective_number_by_counts": effective_number(counts),
        "log_likelihood": log_likelihood,
        "parameters": p,
        "bic": -2 * log_likelihood * n + p * float(np.log(n)),
        "aic": -2 * log_likelihood * n + 2 * p,
    }
    if len(np.unique(classes)) > 1:
        report["class_purity"], report["class_nmi"] = agreement_with_classes(labels, classes)
    return report


def plot_likelihood(path: Path, lower_bounds: tuple[float, ...], converged: bool) -> None:
    """Plot the mean log-likelihood by iteration.

    With a start from single images the first value is millions of nats below the rest; it goes into the title instead.
    """
    axes, save = _figure(path)
    title = "converged" if converged else "stopped at gmm.max_iter"
    if len(lower_bounds) > 2:
        low, high = min(lower_bounds[1:]), max(lower_bounds[1:])
        if lower_bounds[0] < low - 10 * (high - low):
            margin = 0.05 * (high - low) or 1.0
            axes.set_ylim(low - margin, high + margin)
            title += f"; iteration 1 (off scale): {lower_bounds[0]:,.0f}"
    axes.plot(range(1, len(lower_bounds) + 1), lower_bounds, marker="o", markersize=3, linewidth=1.5)
    axes.set_xlabel("EM iteration")
    axes.set_ylabel("mean log-likelihood (nats per image)")
    axes.set_title(title, fontsize=10)
    axes.locator_params(axis="x", integer=True)
    save()


def plot_weights(path: Path, weights: np.ndarray, counts: np.ndarray) -> None:
    """Plot the weights (K,) and image counts (K,) of the components, each in descending order."""
    axes, save = _figure(path)
    rank = np.arange(1, len(weights) + 1)
    shares = np.sort(counts)[::-1] / counts.sum()
    axes.plot(rank, np.sort(weights)[::-1], label="mixture weight")
    axes.plot(rank[shares > 0], shares[shares > 0], label="share of images (largest posterior)", linestyle="--")
    axes.axhline(1 / len(weights), color="0.6", linewidth=1, label="1 / K")
    axes.set_yscale("log")
    axes.set_ylim(bottom=min(shares[shares > 0].min(), 1 / len(weights)) / 2)  # empty components lie far below
    axes.set_xlabel("component, largest first")
    axes.set_ylabel("share")
    axes.set_title(
        f"{(counts > 0).sum():,} of {len(counts):,} components have images\n"
        f"effective number {effective_number(weights):,.1f} (weights), {effective_number(counts):,.1f} (images)",
        fontsize=8.5,
    )
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False)
    save()


def _figure(path: Path) -> tuple["Axes", Callable[[], None]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)

    def save() -> None:
        with store.whole_file(path) as partial:
            figure.savefig(partial)

    return axes, save
