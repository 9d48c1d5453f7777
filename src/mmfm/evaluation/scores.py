"""The metrics by name, computed from statistics of generated and real images."""

from collections.abc import Iterable

import torch

from mmfm.evaluation.collected import Gaussian, Statistics
from mmfm.evaluation.frechet import frechet_distance
from mmfm.evaluation.kid import kernel_distance
from mmfm.evaluation.manifold import manifold

NEEDS = {
    "frechet": "gaussian",
    "sfid": "spatial",
    "inception_score": "logits",
    "precision": "bank",
    "recall": "bank",
    "density": "bank",
    "coverage": "bank",
    "kid": "bank",
}
"""Kind of statistics that each metric needs (:data:`mmfm.evaluation.collected.KINDS`)."""

_OF_MANIFOLD = frozenset({"precision", "recall", "density", "coverage"})
PUBLISHED_IMAGES = 50_000


def kinds(metrics: Iterable[str]) -> frozenset[str]:
    """Return the kinds of statistics that metrics need of the generated images.

    Raises:
        ValueError: an unknown metric.
    """
    wanted = list(metrics)
    for name in wanted:
        if name not in NEEDS:
            raise ValueError(f"unknown metric '{name}'; it must be one of {', '.join(NEEDS)}")
    return frozenset(NEEDS[name] for name in wanted)


def reference_kinds(metrics: Iterable[str]) -> frozenset[str]:
    """Return the kinds that metrics need of the reference; the Inception Score needs none."""
    return kinds(metrics) - {"logits"}


def scores(
    metrics: Iterable[str], generated: Statistics, reference: Statistics, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Compute metrics; those over splits or subsets also give their standard deviation, ``<name>_std``.

    Raises:
        ValueError: a metric is unknown, or its statistics are missing or don't fit each other.
    """
    wanted = list(dict.fromkeys(metrics))
    kinds(wanted)
    found: dict[str, float] = {}
    for name in wanted:
        if name == "frechet":
            found[name] = _frechet(name, generated.gaussian, reference.gaussian)
        elif name == "sfid":
            found[name] = _frechet(name, generated.spatial, reference.spatial)
        elif name == "inception_score":
            if generated.inception_score is None:
                raise ValueError("inception_score needs the logits of the generated images; collect `logits`")
            found[name], found[f"{name}_std"] = generated.inception_score
        elif generated.bank is None or reference.bank is None:
            raise ValueError(
                f"{name} compares features of single images, but the "
                f"{'reference' if reference.bank is None else 'generated set'} has only their moments; "
                "give a reference with images (arr_0), or leave the metric out"
            )
        elif name == "kid":
            found[name], found[f"{name}_std"] = kernel_distance(generated.bank, reference.bank, device=device)
        elif name not in found:
            of_manifold = vars(manifold(generated.bank, reference.bank, device=device))
            found.update({name: of_manifold[name] for name in wanted if name in _OF_MANIFOLD})
    return found


def cautions(metrics: Iterable[str], generated: Statistics) -> list[str]:
    """Return what a reader must know to judge the numbers: a sentence each."""
    wanted, lines = frozenset(metrics), []
    for name, moments in (("frechet", generated.gaussian), ("sfid", generated.spatial)):
        if name in wanted and moments is not None and generated.count is not None:
            dimension = len(moments.mean)
            if generated.count <= dimension:
                lines.append(
                    f"{name}: {generated.count:,} images are too few for {dimension:,} features: the covariance is "
                    "singular and the distance far too large. Score more images."
                )
    if generated.count is not None and generated.count < PUBLISHED_IMAGES:
        lines.append(
            f"Published numbers use {PUBLISHED_IMAGES:,} images; {generated.count:,} give larger Frechet distances and "
            "a smaller Inception Score."
        )
    return lines


def _frechet(name: str, generated: Gaussian | None, reference: Gaussian | None) -> float:
    if generated is None or reference is None:
        which = "reference" if reference is None else "generated set"
        raise ValueError(f"the {which} lacks the moments that {name} needs; use one that has them, or its images")
    return frechet_distance(*generated, *reference)
