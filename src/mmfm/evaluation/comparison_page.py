"""Finished results side by side as one HTML page that needs no other file. Nothing here imports PyTorch.

The page can be read without JavaScript, in light and dark, on a phone and on paper.
"""

import base64
import io
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from mmfm.config.choices import SETTINGS
from mmfm.evaluation.comparison import (
    WORDS,
    Comparison,
    Result,
    Row,
    differs,
    mark_of,
    place_of,
    setting_of,
    table,
)
from mmfm.evaluation.comparison_curves import Curve, draw_curves
from mmfm.evaluation.comparison_picture import caption, grid
from mmfm.infra import store
from mmfm.infra.progress import duration

LARGEST = 1_500_000
"""Size of a page in bytes up to which `snakemake --report` can show it: browsers leave a frame empty whose data URI is
longer than 2 MiB."""

_SHRINK = (1.0, 0.7, 0.5, 0.35)
"""Factors on the pictures' sides, tried until the page is small enough."""

_COLOURS = {"uncond": "#d1661f", "gmm": "#3b82c4", "mode": "#2f9e6e", "class": "#9a63c4", "class_gmm": "#b08a1e"}
_MEANINGS = {
    None: "",
    "mode": "; the model is told which mode the noise came from",
    "class": "; the model is told the image's class",
}
_LEGEND = {
    "images": "generated images that were measured",
    "training": "time of the training, in h:mm:ss",
    "evaluations": "evaluations of the network for one image; half as many are half the price",
    "sampling": "time of generating all images",
    "modes": "components of the mixture that is the source",
    "coupling cost": "mean squared length of the paths that the model has to learn, per dimension",
}


@dataclass(frozen=True)
class Jobs:
    """The finished jobs of one rule.

    Attributes:
        rule: its name.
        count: number of jobs.
        seconds: time of all of them.
        peak_mb: largest resident memory of one; None if it was not measured.
    """

    rule: str
    count: int
    seconds: float
    peak_mb: float | None


@dataclass(frozen=True)
class Run:
    """What a results folder says of how its results were made.

    Attributes:
        folder: the results folder.
        jobs: by rule, in the order of the workflow.
        configuration: of the last run, as YAML; empty if not recorded.
    """

    folder: Path
    jobs: list[Jobs]
    configuration: str


def page(comparison: Comparison, runs: Iterable[Run], versions: dict[str, str]) -> str:
    """Return the page. Pictures are made smaller until it has at most ``LARGEST`` bytes, if that is possible.

    Args:
        runs: one for each results folder.
        versions: of the software, by name.

    Raises:
        ValueError: a picture or an ``images.npz`` is damaged.
    """
    runs = list(runs)
    for factor in _SHRINK:
        text = _page(comparison, runs, versions, factor)
        if len(text.encode()) <= LARGEST:
            break
    return text


def _page(comparison: Comparison, runs: list[Run], versions: dict[str, str], factor: float) -> str:
    style = resources.files("mmfm.evaluation").joinpath("comparison_page.css").read_text()
    parts = [
        _question(comparison),
        _numbers(comparison),
        _samples(comparison, factor),
        _curves(comparison),
        _mixtures(comparison, factor),
        *map(_costs, runs),
        _circumstances(comparison, runs, versions),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>MM-FM: settings side by side</title>\n<link rel="icon" href="data:,">\n<style>\n{style}</style>\n'
        f"</head>\n<body>\n<main>\n{''.join(part for part in parts if part)}</main>\n</body>\n</html>\n"
    )


def _question(comparison: Comparison) -> str:
    newest = max(result.path.stat().st_mtime for result in comparison.results)
    settings = dict.fromkeys(row["setting"] for row in comparison.rows)
    lines = []
    for name in settings:
        setting = SETTINGS[name]
        source = (
            "a Gaussian mixture with one mode for each group of similar images" if setting.mixture else "Gaussian noise"
        )
        lines.append((name, f"starts from {source}{_MEANINGS[setting.condition]}"))
    if any(row["autoguidance"] for row in comparison.rows):
        lines.append(("…_ag", "the same, guided away from what a weaker model would do (autoguidance)"))
    return (
        "<h1>Settings side by side</h1>\n"
        f'<p class="quiet">MM-FM, newest result of {time.strftime("%Y-%m-%d", time.localtime(newest))}</p>\n'
        '<p class="lead">Flow matching turns noise into images along paths that a network learns. Usually the noise is '
        "Gaussian, far from every image. The question here is whether it pays to start nearer: from a mixture that was "
        "fitted to the images, each image paired with noise of its own mode. Everything else should be the same; "
        "the notes below the table say where it is not.</p>\n"
        f"{_terms(lines)}"
    )


def _numbers(comparison: Comparison) -> str:
    rows, main = comparison.rows, comparison.main
    columns = table(rows)
    heads = "".join(f'<th scope="col"{_kind(title)}>{escape(title)}</th>' for title in columns)
    largest = {row["group"]: max(r["distance"] for r in rows if r["group"] == row["group"]) for row in rows}
    apart = differs(rows, "group")
    body = []
    for i, row in enumerate(rows):
        cells = []
        for title, texts in columns.items():
            text, bar = escape(texts[i] or "-"), ""
            if title == "distance":
                width = 100 * row["distance"] / (largest[row["group"]] or 1)
                bar = f'<span class="bar" style="width:{width:.1f}%"></span>'
                text += " *" * row["best"]
            cells.append(f'<td class="{"word" if title in WORDS else title.split()[0]}">{text}{bar}</td>')
        note = f'<td class="word">{escape(mark_of(row))}</td>' if apart else ""
        body.append(f"<tr{' class=best' * row['best']}>{''.join(cells)}{note}</tr>\n")
    facts = [("measure", main["measure"]), ("detector", main["detector"]), ("reference", main["reference"])]
    if main["floor"] is not None:
        facts.append(("floor", f"{main['floor']:.4f}, the distance of {main['floor_n_images']:,} held-out real images"))
    warnings = "".join(f'<p class="warning">{escape(text)}</p>\n' for text in comparison.warnings)
    notes = "".join(f"<p>{escape(note)}</p>\n" for note in comparison.notes)
    legend = [(title, meaning) for title, meaning in _LEGEND.items() if title in columns]
    return (
        f"<h2>Distances</h2>\n<p>{_in_short(comparison)}</p>\n"
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table of all results"><table>\n'
        f"<thead><tr>{heads}{'<td></td>' * apart}</tr></thead>\n"
        f"<tbody>\n{''.join(body)}</tbody></table></div>\n"
        '<p class="quiet">Smaller is better; * is the best of those that can be compared.</p>\n'
        f"{_terms(facts)}{warnings}{notes}"
        f"<details><summary>What the columns say</summary>\n{_terms(legend)}</details>\n"
    )


def _in_short(comparison: Comparison) -> str:
    """Return the main group's result in words, and how far to trust it."""
    rows = [row for row in comparison.rows if row["group"] == 0]
    if len(rows) == 1:
        return "There is one result, and nothing to compare it with yet."
    best, worst = (pick(rows, key=lambda row: row["distance"]) for pick in (min, max))
    short = (
        f"Of {len(rows)} results that can be compared, <strong>{escape(_name(best, rows))}</strong> has the smallest "
        f"distance, {best['distance']:.4g}, and {escape(_name(worst, rows))} the largest, {worst['distance']:.4g}."
    )
    if not differs(rows, "seed"):
        short += (
            " There is one seed: a difference of a few per cent may be chance. Targets with <code>.seed1</code> and "
            "<code>.seed2</code> in their names tell."
        )
    return short


def _samples(comparison: Comparison, factor: float) -> str:
    sections = []
    for place in dict.fromkeys(map(place_of, comparison.rows)):
        figures = []
        for result, row in zip(comparison.results, comparison.rows, strict=True):
            if place_of(row) != place:
                continue
            name = escape(_name(row, comparison.rows))
            text = f"<strong>{name}</strong>, {row['distance']:.4g}{' (not comparable)' * (row['group'] > 0)}"
            if result.images:
                picture = _picture(grid(result.images), f"Images generated with {_name(row, comparison.rows)}", factor)
                figures.append(_figure(picture, text))
            else:
                figures.append(f'<p class="quiet">{text}: its images no longer exist.</p>\n')
        sections.append(f'{_place(place, comparison)}<div class="grids">\n{"".join(figures)}</div>\n')
    return (
        f"<h2>Samples</h2>\n<p>{escape(caption(comparison))}</p>\n{''.join(sections)}"
        "<p><strong>Look for</strong> whole, sharp objects, and for variety. Images in the same place need not show "
        "the same object: another source makes other noise of the same random numbers.</p>\n"
        "<p><strong>Bad signs:</strong> the same image again and again (too few modes, or a weak guide), grain or "
        "mottled patches (too little training or too few evaluations), images between two objects, and a blur that "
        "all images share (look at the decoder's reconstructions: no setting can be sharper than these).</p>\n"
    )


def _curves(comparison: Comparison) -> str:
    losses: dict[Path, Curve] = {}
    distances: dict[Path, Curve] = {}
    for result, row in zip(comparison.results, comparison.rows, strict=True):
        training = result.training
        if training is None:
            continue
        # Results that differ only in how they were sampled share a training.
        label = _name(row, comparison.rows, sampling=False)
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
    figures = "".join(_figure(draw_curves(list(curves.values()), name), about, "plot") for name, curves, about in drawn)
    return (
        f'<h2>Learning curves</h2>\n<div class="wide">\n{figures}</div>\n'
        "<p><strong>Look for</strong> a steep start that flattens. If a curve still falls at its end, more epochs "
        "will help. <strong>The height tells nothing about the images</strong>: a nearer source has shorter paths, "
        "and so a smaller loss from the first step on.</p>\n"
        "<p><strong>Bad signs:</strong> a loss that rises, or jumps and does not come back (the learning rate is too "
        "high), or is flat from the start (too low, or the images are all alike).</p>\n"
    )


def _mixtures(comparison: Comparison, factor: float) -> str:
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
            _figure(_picture(_opened(folder / name), alt, factor), text, "plot")
            for name, alt, text in pictures
            if (folder / name).is_file()
        ]
        sweep = folder.parent / "sweep.png"
        if sweep.is_file():
            text = "The same numbers of several K. The BIC has its minimum where more modes no longer pay."
            figures.append(_figure(_picture(_opened(sweep), "Fits by number of modes", factor, 1400), text, "whole"))
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
    return f"<h3>{escape(result.encoder)}, {report['n_components']:,} modes</h3>\n{_terms(facts)}"


def _costs(run: Run) -> str:
    if not run.jobs:
        return ""
    rows = "".join(
        f'<tr><td class="word">{escape(jobs.rule)}</td><td>{jobs.count}</td><td>{duration(jobs.seconds)}</td>'
        f"<td>{'-' if jobs.peak_mb is None else f'{jobs.peak_mb / 1000:.1f} GB'}</td></tr>\n"
        for jobs in run.jobs
    )
    total = duration(sum(jobs.seconds for jobs in run.jobs))
    return (
        f"<h2>What it cost</h2>\n<p>All jobs in <code>{escape(str(run.folder))}</code>: {total} of computing. Jobs may "
        "have run side by side, and a job that was resumed counts from its last start.</p>\n"
        '<div class="scroll" tabindex="0" role="region" aria-label="Time and memory by stage"><table>\n'
        '<thead><tr><th scope="col" class="word">stage</th><th scope="col">jobs</th><th scope="col">time</th>'
        f'<th scope="col">peak memory</th></tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n'
        '<p class="quiet">Memory is the main memory of one job with its processes, not that of a GPU.</p>\n'
    )


def _circumstances(comparison: Comparison, runs: list[Run], versions: dict[str, str]) -> str:
    devices = dict.fromkeys(
        f"{record['samples'].get('device', 'unknown')} ({record['samples'].get('precision', 'unknown precision')})"
        for record in (result.record for result in comparison.results)
    )
    configurations = "".join(
        f"<details><summary>Configuration of the last run in <code>{escape(str(run.folder))}</code></summary>\n"
        f"<pre>{escape(run.configuration)}</pre></details>\n"
        for run in runs
        if run.configuration
    )
    named = {"images": "images_digest", "detector": "detector_digest", "reference": "reference_digest"}
    digests = [
        (row["name"], ", ".join(f"{what} {row[key][:16]}" for what, key in named.items())) for row in comparison.rows
    ]
    return (
        "<h2>Software and configuration</h2>\n<p>Versions that were installed when this page was made; sampled on "
        f"{escape(', '.join(devices))}.</p>\n{_terms(versions.items())}{configurations}"
        f"<details><summary>Digests, to find the files again</summary>\n{_terms(digests)}</details>\n"
    )


def _name(row: Row, rows: list[Row], sampling: bool = True) -> str:
    """Return what tells a row from the others: encoder and setting, and whatever else differs."""
    words = [row["encoder"]] if differs(rows, "encoder") else []
    words.append(setting_of(row))
    shown: dict[str, Callable[[Row], str]] = {
        "results": lambda r: f"of {r['results']}",
        "model": lambda r: f"{r['model']}" if r["model"] else "",
        "seed": lambda r: f"seed {r['seed']}",
    }
    if len({r["n_modes"] for r in rows} - {0}) > 1 and row["n_modes"]:
        words.append(f"K = {row['n_modes']:,}")
    words += [show(row) for name, show in shown.items() if differs(rows, name)]
    if sampling and differs(rows, "step"):
        words.append(f"step {row['step']:,}" if row["step"] is not None else "")
    if sampling and differs(rows, "time_points"):
        words.append(f"{row['time_points']} time points")
    if sampling and row["guidance"] and len({str(r["guidance"]) for r in rows if r["guidance"]}) > 1:
        words.append(f"guidance {row['guidance']['scale']:g}")
    return ", ".join(word for word in words if word)


def _place(place: tuple[str, str], comparison: Comparison) -> str:
    several = len(set(map(place_of, comparison.rows))) > 1
    return f"<h3>{escape(place[1])}, {escape(place[0])}</h3>\n" if several else ""


def _kind(title: str) -> str:
    return ' class="word"' if title in WORDS else ""


def _terms(pairs: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>\n" for term, text in pairs)
    return f"<dl>\n{items}</dl>\n" if items else ""


def _figure(picture: str, text: str, kind: str = "") -> str:
    """Return a picture with a caption, which may hold markup."""
    return f'<figure class="{kind.strip()}">{picture}<figcaption>{text}</figcaption></figure>\n'.replace(
        ' class=""', ""
    )


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _picture(picture: Image.Image, alt: str, factor: float, widest: int = 1000) -> str:
    """Embed a picture, at most ``factor`` times ``widest`` pixels wide."""
    width = min(picture.width, int(factor * widest), int(factor * picture.width))
    if width < picture.width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=82, method=6)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img src="data:image/webp;base64,{data}" alt="{escape(alt)}" {size}>'
