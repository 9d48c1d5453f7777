"""The pictures on the page of a comparison: samples, curves, mixtures."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmfm.evaluation.comparison import Comparison, Result, distance_of, place_of
from mmfm.evaluation.comparison_curves import Curve, draw_curves
from mmfm.evaluation.comparison_html import embed, figure, heading, name_of, opened, terms
from mmfm.evaluation.comparison_picture import caption, grid
from mmfm.evaluation.curve import AXES, number
from mmfm.infra import store

_COLOURS = {"uncond": "#d1661f", "gmm": "#3b82c4", "mode": "#2f9e6e", "class": "#9a63c4", "class_gmm": "#b08a1e"}


_LOOKS = {
    "mode_quality": (
        "Good and bad modes",
        "Training images of a mode on the left, images generated from its noise on the right: of the worst modes, and "
        "of some good ones.",
    ),
    "memorisation": (
        "Nearest training images",
        "Generated images that are closest to a training image, and how close all of them are beside held-out real "
        "ones. Closer than these, the model repeats its training images.",
    ),
}
"""Titles and texts of the pictures of two stages."""


def samples(comparison: Comparison, factor: float) -> str:
    """Return the section of generated images."""
    sections = []
    for place in dict.fromkeys(map(place_of, comparison.rows)):
        figures = []
        for result, row in zip(comparison.results, comparison.rows, strict=True):
            if place_of(row) != place:
                continue
            name = escape(name_of(row, comparison.rows))
            text = f"<strong>{name}</strong>, {distance_of(row)}{' (not comparable)' * (row['group'] > 0)}"
            if result.images:
                picture = embed(grid(result.images), f"Images generated with {name_of(row, comparison.rows)}", factor)
                figures.append(figure(picture, text))
            else:
                figures.append(f'<p class="quiet">{text}: its images no longer exist.</p>\n')
        sections.append(f'{heading(place, comparison)}<div class="grids">\n{"".join(figures)}</div>\n')
    return (
        f"<h2>Samples</h2>\n<p>{escape(caption(comparison))}</p>\n{''.join(sections)}"
        "<p><strong>Look for</strong> whole, sharp objects, and for variety. Images in the same place need not show "
        "the same object: another source makes other noise of the same random numbers.</p>\n"
        "<p><strong>Bad signs:</strong> the same image again and again (too few modes, or a weak guide), grain or "
        "mottled patches (too little training or too few evaluations), images between two objects, and a blur that "
        "all images share (look at the decoder's reconstructions: no setting can be sharper than these).</p>\n"
    )


def learning_curves(comparison: Comparison) -> str:
    """Return the section of the trainings' losses and distances."""
    losses: dict[Path, Curve] = {}
    distances: dict[Path, Curve] = {}
    for result, row in zip(comparison.results, comparison.rows, strict=True):
        training = result.training
        if training is None:
            continue
        # Results that differ only in how they were sampled share a training.
        label = name_of(row, comparison.rows, sampling=False)
        for curves, lines, value in (
            (losses, training.history, "loss"),
            (distances, training.distances, "distance"),
        ):
            points = [(line["step"], line[value]) for line in lines if value in line]
            known = curves.get(training.folder)
            if points and (known is None or len(known.points) < len(points)):
                curves[training.folder] = Curve(label, _COLOURS[row["setting"]], points)
    if not losses:
        return ""
    drawn = [("loss", losses, "Training loss by step")]
    if distances:
        drawn.append(("distance", distances, "Frechet distance during training by step"))
    figures = "".join(figure(draw_curves(list(curves.values()), name), about, "plot") for name, curves, about in drawn)
    return (
        f'<h2>Learning curves</h2>\n<div class="wide">\n{figures}</div>\n'
        "<p><strong>Look for</strong> a steep start that flattens. If a curve still falls at its end, more epochs "
        "will help. <strong>The height tells nothing about the images</strong>: a nearer source has shorter paths, "
        "and so a smaller loss from the first step on.</p>\n"
        "<p><strong>Bad signs:</strong> a loss that rises, or jumps and does not come back (the learning rate is too "
        "high), or is flat from the start (too low, or the images are all alike).</p>\n"
    )


def distance_curves(found: Sequence[dict[str, Any]]) -> str:
    """Return the section of the distances of finished curves, see :mod:`mmfm.evaluation.curve`."""
    folders = {curve["folder"] for curve in found}
    figures = []
    for part, axis in AXES.items():
        comparable: dict[tuple, list[dict[str, Any]]] = {}
        for curve in found:
            if curve["varies"] == part:
                detector, reference = curve["detector"], curve["reference"]
                key = detector["digest"], reference["digest"], curve["n_images"], curve["image_size"]
                comparable.setdefault(key, []).append(curve)
        for shown in comparable.values():
            names = [curve["name"] + f" of {curve['folder']}" * (len(folders) > 1) for curve in shown]
            lines = [
                Curve(name, _COLOURS[curve["setting"]], _points(curve, "frechet"))
                for name, curve in zip(names, shown, strict=True)
            ]
            best = ", ".join(
                f"{name} at {number(curve['best']['frechet'])}" for name, curve in zip(names, shown, strict=True)
            )
            text = (
                f"Distance of {shown[0]['n_images']:,} images, {shown[0]['detector']['name']}, by {axis.title}. The "
                f"smallest: {best}."
            )
            figures.append(figure(draw_curves(lines, "distance", axis.title), escape(text), "plot"))
    if not figures:
        return ""
    return (
        f'<h2>Distance by evaluations, steps, guidance and modes</h2>\n<div class="wide">\n{"".join(figures)}</div>\n'
        "<p><strong>Look for</strong> where a curve becomes flat: beyond that, more buys nothing. A source that is "
        "nearer to the images should be flat at fewer evaluations.</p>\n"
        "<p><strong>Bad signs:</strong> the smallest distance at either end, beyond which there may be a smaller one; "
        "differences that are no larger than those between seeds.</p>\n"
    )


def _points(curve: dict[str, Any], metric: str) -> list[tuple[float, float]]:
    return list(zip(curve["values"], curve["metrics"][metric], strict=True))


def looks(comparison: Comparison, factor: float) -> str:
    """Return the sections of the pictures of `mode_quality` and `memorisation`."""
    sections = []
    for stage, (title, text) in _LOOKS.items():
        figures = []
        for result, row in zip(comparison.results, comparison.rows, strict=True):
            if stage in result.pictures:
                name = name_of(row, comparison.rows)
                picture = embed(opened(result.pictures[stage]), f"{title}: {name}", factor, 1400)
                figures.append(figure(picture, escape(name), "whole"))
        if figures:
            sections.append(f"<h2>{title}</h2>\n<p>{text}</p>\n{''.join(figures)}")
    return "".join(sections)


def mixtures(comparison: Comparison, factor: float) -> str:
    """Return the section of the fitted mixtures: their numbers and pictures."""
    fits: dict[Path, Result] = {}
    for result in comparison.results:
        if result.mixture:
            fits.setdefault(result.mixture, result)
    sections = []
    for folder, result in fits.items():
        report = store.read_json(folder / "report.json")
        pictures = [
            (
                "modes.png",
                "Images of some modes",
                "The images that are likeliest under some modes: the largest, of median size, the smallest. A good "
                "mode's images look alike; a bad one is a mixed bag.",
            ),
            (
                "likelihood.png",
                "Likelihood by iteration",
                "Mean log-likelihood by iteration of EM. It must rise and become flat; if it was cut off while "
                "rising, raise gmm.max_iter.",
            ),
        ]
        figures = [
            figure(embed(opened(folder / name), alt, factor), text, "plot")
            for name, alt, text in pictures
            if (folder / name).is_file()
        ]
        sweep = folder.parent / "sweep.png"
        if sweep.is_file():
            text = "The same numbers of several K. The BIC has its minimum where more modes no longer pay."
            figures.append(figure(embed(opened(sweep), "Fits by number of modes", factor, 1400), text, "whole"))
        sections.append(f'{_about_fit(result, report)}<div class="wide">\n{"".join(figures)}</div>\n')
    if not sections:
        return ""
    return (
        "<h2>The mixture</h2>\n<p>The source is as good as its modes: a mode should hold images that look alike, and "
        f"enough of them for its mean and variance.</p>\n{''.join(sections)}"
        "<p><strong>Bad signs:</strong> many empty modes (K is too large, or the start was bad), modes of one or two "
        "images, a coupling cost near 2 (the modes do not bring noise nearer to its images).</p>\n"
    )


def _about_fit(result: Result, report: dict[str, Any]) -> str:
    """Return a fit's title and numbers; a report of an older version may lack some."""
    sizes = report.get("images_per_active_component")
    facts = [
        ("images", f"{report['n_images']:,}"),
        (
            "EM",
            f"{report['n_iter']} iterations, {'converged' if report['converged'] else 'stopped before it converged'}",
        ),
        ("modes with images", f"{report['active_components']:,} of {report['n_components']:,}"),
    ]
    if sizes:
        facts.append(("images in a mode", f"{sizes['min']:,.0f} to {sizes['max']:,.0f}, median {sizes['median']:,.0f}"))
    facts.append(("BIC", f"{report['bic']:,.0f}"))
    if report.get("class_nmi") is not None:
        facts.append(("agreement with classes", f"{report['class_nmi']:.2f} (0: none, 1: modes are classes)"))
    if result.coupling_cost is not None:
        facts.append(("coupling cost", f"{result.coupling_cost:.3f} (a Gaussian source has 2)"))
    return f"<h3>{escape(result.encoder)}, {report['n_components']:,} modes</h3>\n{terms(facts)}"
