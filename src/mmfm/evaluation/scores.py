"""The metrics by name, computed from statistics of generated and real images."""

from collections.abc import Iterable
from typing import Any

import torch

from mmfm.config.choices import METRICS
from mmfm.evaluation.collected import Statistics
from mmfm.evaluation.frechet import frechet_distance
from mmfm.evaluation.inception_score import SPLIT_SIZE
from mmfm.evaluation.kid import SEED, SUBSET_SIZE, SUBSETS, kernel_distance
from mmfm.evaluation.manifold import DENSITY_NEIGHBOURS, NEIGHBOURS, manifold

PUBLISHED_IMAGES = 50_000
"""Number of generated images in published numbers."""

PUBLISHED_REFERENCE = 10_000
"""Number of real images in published precision and recall: those in ADM's file."""

SETTINGS: dict[str, dict[str, Any]] = {
    "inception_score": {"split_size": SPLIT_SIZE},
    "precision and recall": {"neighbours": NEIGHBOURS},
    "density and coverage": {"neighbours": DENSITY_NEIGHBOURS},
    "kid": {"subsets": SUBSETS, "subset_size": SUBSET_SIZE, "seed": SEED},
}
"""What the numbers depend on, for records of results."""


def kinds(metrics: Iterable[str]) -> frozenset[str]:
    """Return the kinds of statistics that metrics need of the generated images.

    Raises:
        ValueError: an unknown metric.
    """
    return frozenset(METRICS[name].needs for name in metrics)


def reference_kinds(metrics: Iterable[str]) -> frozenset[str]:
    """Return the kinds that metrics need of the reference; the Inception Score needs none."""
    return kinds(metrics) - {"logits"}


def require(metrics: Iterable[str], found: Statistics, noun: str) -> None:
    """Raise ValueError unless a reference, or a generated set, has what metrics need of it."""
    for name in metrics:
        need = METRICS[name].needs
        if need == "bank" and found.bank is None:
            raise ValueError(
                f"{name} compares features of single images, but the {noun} has only their moments; give a reference "
                "with images (arr_0), or leave the metric out"
            )
        if need in ("gaussian", "spatial") and getattr(found, need) is None:
            raise ValueError(f"the {noun} lacks the moments that {name} needs; use one that has them, or its images")


def scores(
    metrics: Iterable[str], generated: Statistics, reference: Statistics, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Compute metrics; those over splits or subsets also give their standard deviation, ``<name>_std``.

    Raises:
        ValueError: a metric is unknown, or its statistics are missing or don't fit each other.
    """
    wanted = list(dict.fromkeys(metrics))
    require(wanted, reference, "reference")
    require(wanted, generated, "generated set")
    computed: dict[str, dict[str, float]] = {}
    found: dict[str, float] = {}
    for name in wanted:
        metric = METRICS[name]
        if metric.implementation not in computed:
            computed[metric.implementation] = metric.load()(generated, reference, device)
        values = computed[metric.implementation]
        found |= {key: values[key] for key in (name, f"{name}_std") if key in values}
    return found


def frechet(generated: Statistics, reference: Statistics, device: torch.device | str) -> dict[str, float]:
    """Return the Fréchet distance of the features."""
    assert generated.gaussian is not None and reference.gaussian is not None  # see require
    return {"frechet": frechet_distance(*generated.gaussian, *reference.gaussian)}


def sfid(generated: Statistics, reference: Statistics, device: torch.device | str) -> dict[str, float]:
    """Return the Fréchet distance of the spatial features."""
    assert generated.spatial is not None and reference.spatial is not None  # see require
    return {"sfid": frechet_distance(*generated.spatial, *reference.spatial)}


def inception_score(generated: Statistics, reference: Statistics, device: torch.device | str) -> dict[str, float]:
    """Return the Inception Score; it needs no reference."""
    if generated.inception_score is None:
        raise ValueError("inception_score needs the logits of the generated images; collect `logits`")
    mean, deviation = generated.inception_score
    return {"inception_score": mean, "inception_score_std": deviation}


def manifold_scores(generated: Statistics, reference: Statistics, device: torch.device | str) -> dict[str, float]:
    """Return precision, recall, density and coverage, which share their distances."""
    assert generated.bank is not None and reference.bank is not None  # see require
    return dict(vars(manifold(generated.bank, reference.bank, device=device)))


def kid(generated: Statistics, reference: Statistics, device: torch.device | str) -> dict[str, float]:
    """Return the kernel distance."""
    assert generated.bank is not None and reference.bank is not None  # see require
    mean, deviation = kernel_distance(generated.bank, reference.bank, device=device)
    return {"kid": mean, "kid_std": deviation}


def cautions(
    metrics: Iterable[str],
    generated: Statistics,
    reference: Statistics,
    remedy: str = "Score more images (sample.n_images).",
    published: bool = True,
) -> list[str]:
    """Return what a reader must know to judge the numbers: a sentence each.

    Args:
        remedy: how to get more generated images.
        published: whether the detector is one of published numbers, which readers may compare these with.
    """
    wanted, lines, count = frozenset(metrics), [], generated.count
    for name, moments in (("frechet", generated.gaussian), ("sfid", generated.spatial)):
        if name in wanted and moments is not None and count is not None:
            dimension = len(moments.mean)
            if count <= dimension:
                lines.append(
                    f"{name}: {count:,} images are too few for {dimension:,} features: the covariance is singular and "
                    f"the distance far too large. {remedy}"
                )
    if published and count is not None and count < PUBLISHED_IMAGES:
        score = " and a smaller Inception Score" if "inception_score" in wanted else ""
        lines.append(
            f"Published numbers use {PUBLISHED_IMAGES:,} images; {count:,} give larger Frechet distances{score}, so "
            "compare only results of equally many."
        )
    return lines + _cautions_of_reference(wanted, reference, published)


def _cautions_of_reference(wanted: frozenset[str], reference: Statistics, published: bool) -> list[str]:
    """Return the sentences on a small reference; a file of moments alone does not say of how many images they are."""
    lines, count = [], reference.count
    for name, moments in (("frechet", reference.gaussian), ("sfid", reference.spatial)):
        if name in wanted and moments is not None and count is not None and count <= len(moments.mean):
            lines.append(
                f"{name}: the reference's {count:,} images are too few for {len(moments.mean):,} features: its "
                "covariance is singular and the distance far too large. Compare with more real images."
            )
    if published and count is not None and count < PUBLISHED_IMAGES and wanted & {"frechet", "sfid"}:
        lines.append(
            f"The reference is of {count:,} real images; fewer give larger Frechet distances, so compare only results "
            "with the same reference."
        )
    single = [name for name in METRICS if name in wanted and METRICS[name].needs == "bank"]
    if single and reference.bank is not None and len(reference.bank) < PUBLISHED_REFERENCE:
        lines.append(
            f"{', '.join(single)}: of {len(reference.bank):,} real images; published numbers use "
            f"{PUBLISHED_REFERENCE:,}, and the number changes the result."
        )
    return lines
