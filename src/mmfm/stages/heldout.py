"""Held-out likelihood of mixtures, beside that of the images that they were fitted to."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfm import data
from mmfm.data.tokens import TokenStore
from mmfm.evaluation.heldout import gap_warnings, mean_likelihood
from mmfm.infra import store
from mmfm.mixture.gaussian import Mixture
from mmfm.stages import provenance

_ROWS = 4096


def heldout(
    gmms: Sequence[Path], train: Path, tokens: Path, device: torch.device | str = "cpu"
) -> list[dict[str, Any]]:
    """Return the mean likelihoods of training and held-out images under mixtures, by number of modes, as JSON values.

    Args:
        gmms: mixtures of the same encoder's tokens.
        train: tokens of the training images.
        tokens: tokens of the held-out images.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a mixture was fitted to other tokens, or the two sets of tokens were extracted differently.
    """
    stores = (TokenStore.open(train), TokenStore.open(tokens))
    provenance.extracted_alike(*stores)
    rows = []
    for path in gmms:
        mixture = Mixture.load(path, device)
        provenance.belong_together(provenance.tokens(stores[0]), provenance.mixture(path, mixture))
        seen, unseen = (mean_likelihood(mixture, _batches(each)) for each in stores)
        rows.append(
            {
                "n_components": mixture.n_components,
                "covariance_type": mixture.covariance_type,
                "train": vars(seen),
                "heldout": vars(unseen),
                "gap": seen.mean - unseen.mean,
                "images_per_mode": seen.count / mixture.n_components,
                "warnings": gap_warnings(mixture, seen, unseen),
                "gmm_digest": mixture.metadata["digest"],
                "heldout_listing_digest": stores[1].listing_digest,
            }
        )
    return sorted(rows, key=lambda row: row["n_components"])


def _batches(tokens: TokenStore) -> Iterator[Tensor]:
    for rows in data.ranges(0, len(tokens), _ROWS):
        yield torch.from_numpy(tokens.read(rows.start, rows.stop))


def plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw both likelihoods against the number of modes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    modes = [row["n_components"] for row in rows]
    for name, label in (("train", "training images"), ("heldout", "held-out images")):
        means, errors = ([row[name][value] for row in rows] for value in ("mean", "standard_error"))
        axes.errorbar(modes, means, errors, marker="o", label=label)
    best = max(rows, key=lambda row: row["heldout"]["mean"])
    axes.axvline(best["n_components"], color="0.7", linestyle="--", label=f"best: {best['n_components']:,} modes")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(modes, [f"{k:,}" for k in modes])
    axes.set(xlabel="modes K", ylabel="mean log-likelihood (nats per image)")
    axes.legend()
    with store.whole_file(path) as partial:
        figure.savefig(partial, format="png")


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a table, and the warnings below it."""
    lines = [f"{'modes':>7}{'training':>12}{'held-out':>12}{'+-':>8}{'gap':>10}  nats per image"]
    for row in rows:
        train, held = row["train"], row["heldout"]
        lines.append(
            f"{row['n_components']:>7,}{train['mean']:>12.2f}{held['mean']:>12.2f}{held['standard_error']:>8.2f}"
            f"{row['gap']:>10.2f}"
        )
    for row in rows:
        lines += [f"WARNING (K = {row['n_components']:,}): {line}" for line in row["warnings"]]
    return "\n".join(lines) + "\n"
