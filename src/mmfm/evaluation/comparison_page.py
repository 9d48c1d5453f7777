"""Finished results side by side as one HTML page that needs no other file. Nothing here imports PyTorch.

The page can be read without JavaScript, in light and dark, on a phone and on paper.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from mmfm.config.choices import SETTINGS
from mmfm.evaluation.comparison import WORDS, Comparison, differs, distance_of, listed, mark_of, table
from mmfm.evaluation.comparison_figures import distance_curves, learning_curves, looks, mixtures, samples
from mmfm.evaluation.comparison_html import name_of, terms
from mmfm.infra.progress import duration

LARGEST = 1_500_000
"""Size of a page in bytes up to which `snakemake --report` can show it: browsers leave a frame empty whose data URI is
longer than 2 MiB."""

_SHRINK = (1.0, 0.7, 0.5, 0.35)
"""Factors on the pictures' sides, tried until the page is small enough."""

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
    "straightness": "how far paths are from their chords, in lengths of the chord: 0 is straight at constant speed",
    "range": "of the distances of several seeds, and their number",
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


def page(
    comparison: Comparison, curves: Sequence[dict[str, Any]], runs: Iterable[Run], versions: dict[str, str]
) -> str:
    """Return the page. Pictures are made smaller until it has at most ``LARGEST`` bytes, if that is possible.

    Args:
        curves: finished curves, as :func:`mmfm.workflow.compared.curves` finds them.
        runs: one for each results folder.
        versions: of the software, by name.

    Raises:
        ValueError: a picture or an ``images.npz`` is damaged.
    """
    runs = list(runs)
    for factor in _SHRINK:
        text = _page(comparison, curves, runs, versions, factor)
        if len(text.encode()) <= LARGEST:
            break
    return text


def _page(
    comparison: Comparison, curves: Sequence[dict[str, Any]], runs: list[Run], versions: dict[str, str], factor: float
) -> str:
    style = resources.files("mmfm.evaluation").joinpath("comparison_page.css").read_text()
    parts = [
        _question(comparison),
        _numbers(comparison),
        samples(comparison, factor),
        learning_curves(comparison),
        distance_curves(curves),
        mixtures(comparison, factor),
        looks(comparison, factor),
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
        f"{terms(lines)}"
    )


def _numbers(comparison: Comparison) -> str:
    rows, main = comparison.rows, comparison.main
    columns = table(rows)
    word = ' class="word"'
    heads = "".join(f'<th scope="col"{word * (title in WORDS)}>{escape(title)}</th>' for title in columns)
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
        f"{terms(facts)}{warnings}{notes}"
        f"<details><summary>What the columns say</summary>\n{terms(legend)}</details>\n"
    )


def _in_short(comparison: Comparison) -> str:
    """Return the main group's result in words, and how far to trust it."""
    rows = [row for row in comparison.rows if row["group"] == 0]
    if len(rows) == 1:
        return "There is one result, and nothing to compare it with yet."
    best, worst = [row for row in rows if row["best"]], max(rows, key=lambda row: row["distance"])
    names = listed([f"<strong>{escape(name_of(row, rows))}</strong>" for row in best])
    short = (
        f"Of {len(rows)} results that can be compared, {names} {'has' if len(best) == 1 else 'have'} the smallest "
        f"distance, {distance_of(best[0])}"
    )
    short += "." if worst["best"] else f", and {escape(name_of(worst, rows))} the largest, {distance_of(worst)}."
    if not differs(rows, "seed") and not any(row["seeds"] for row in rows):
        short += (
            " There is one seed: a difference of a few per cent may be chance. Targets with <code>.seed1</code> and "
            "<code>.seed2</code> in their names tell."
        )
    return short


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
        f"{escape(', '.join(devices))}.</p>\n{terms(versions.items())}{configurations}"
        f"<details><summary>Digests, to find the files again</summary>\n{terms(digests)}</details>\n"
    )
