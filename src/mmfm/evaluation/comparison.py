"""Finished Frechet distances side by side: as rows of numbers, and as text. Nothing here imports PyTorch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfm.config.choices import METRICS, SETTINGS
from mmfm.evaluation.curve import number
from mmfm.infra.progress import duration

Row = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """The records of a training up to the step whose weights were sampled.

    Attributes:
        folder: the training's folder.
        history: logged steps, at least one; the last is that of the weights.
        distances: distances measured during the training, if any were.
    """

    folder: Path
    history: list[dict[str, Any]]
    distances: list[dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """A finished Frechet distance, and what lies beside it in the results folder.

    Attributes:
        path: the JSON file of the stage `fid`.
        folder: the results folder.
        encoder: name in `encoders`.
        guided: whether it uses autoguidance.
        model: entry of `models`; None if the file's name does not tell.
        record: contents of the file.
        training: records of the training; None if there are none.
        mixture: folder with the fit of its mixture, its report and its pictures; None if there is none.
        coupling_cost: expected squared distance of paired source and data, per dimension; None if unknown.
        seeds: the result of `seeds` of which it is one; None if there is none.
        pictures: pictures of its images by the stages `mode_quality` and `memorisation`, as far as there are any.
        images: ``images.npz``, (n, S, S, 3) uint8; None if these images no longer exist.
    """

    path: Path
    folder: Path
    encoder: str
    guided: bool
    model: str | None
    record: dict[str, Any]
    training: Training | None
    mixture: Path | None
    coupling_cost: float | None
    seeds: dict[str, Any] | None
    pictures: dict[str, Path]
    images: Path | None


@dataclass(frozen=True)
class Comparison:
    """Results in the order in which they are shown.

    Attributes:
        results: the results, ordered by results folder and encoder (as given), setting, and the rest of their names.
        rows: a row of JSON values for each; docs/results-format.md lists them.
        warnings: warnings of the results, each once.
        notes: what can't be compared and why, and in what else the rows differ.
    """

    results: list[Result]
    rows: list[Row]
    warnings: list[str]
    notes: list[str]

    @property
    def main(self) -> Row:
        """The first row of group 0."""
        return next(row for row in self.rows if row["group"] == 0)

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {"rows": self.rows, "warnings": self.warnings, "notes": self.notes}


def compare(results: Sequence[Result]) -> Comparison:
    """Compare results.

    Distances are comparable if detector, reference, number and size of images are the same. Each comparable group has
    its own best, the smallest distance. Group 0 is the largest; the notes say what sets the others apart.

    Args:
        results: at least one.

    Raises:
        ValueError: a record lacks a value, so it is not one of the stage `fid`.
    """
    pairs = [(result, _row(result)) for result in results]
    places = list(dict.fromkeys(place_of(row) for _, row in pairs))
    pairs.sort(key=lambda pair: (places.index(place_of(pair[1])), *_order(pair[1])))
    by_circumstances: dict[tuple, list[Row]] = {}
    for _, row in pairs:
        by_circumstances.setdefault(tuple(row[name] for name in _CIRCUMSTANCES), []).append(row)
    groups = sorted(by_circumstances.values(), key=len, reverse=True)
    notes = []
    for i, group in enumerate(groups):
        smallest = distance_of(min(group, key=lambda row: row["distance"]))  # what looks equal is equally good
        for row in group:
            row["group"], row["best"] = i, distance_of(row) == smallest and len(group) > 1
        if i:
            notes.append(_why_apart(group, groups[0][0]))
        if differing := _differences(group):
            whose = f"The rows with {mark_of(group[0])}" if i else "The rows"
            notes.append(f"{whose} also differ in {listed(differing)}, so not only the settings are compared.")
    warnings = list(dict.fromkeys(line for result, _ in pairs for line in result.record["warnings"]))
    return Comparison([result for result, _ in pairs], [row for _, row in pairs], warnings, notes)


_CIRCUMSTANCES = {
    "detector_digest": lambda row: f"another detector, {row['detector']}",
    "reference_digest": lambda row: f"another reference, {row['reference']}",
    "n_images": lambda row: f"another number of images, {row['n_images']:,}",
    "image_size": lambda row: f"another size of images, {row['image_size']} pixels",
}
"""Distances are comparable only if these are equal; and how a row is described in which one is not."""

_DIFFERENCES: dict[str, Callable[[Row], Any]] = {
    "seed": lambda row: row["seed"],
    "model": lambda row: row["model"],
    "images seen in training": lambda row: row["images_seen"],
    "number of modes": lambda row: row["n_modes"] or None,
    "solver": lambda row: row["solver"],
    "time points": lambda row: row["time_points"],
    "guidance": lambda row: row["guidance"] or "none",
}
"""What a comparison of settings should hold constant; None where a row does not say."""


def _row(result: Result) -> Row:
    record = result.record
    try:
        samples = record["samples"]
        weights, guidance = samples["weights"], samples["guidance"]
        return {
            "name": result.path.stem,
            "results": str(result.folder),
            "encoder": result.encoder,
            "setting": samples["setting"],
            "autoguidance": result.guided,
            "distance": float(record["frechet_distance"]),
            "metrics": {name: float(value) for name, value in record.get("metrics", {}).items() if name in METRICS},
            "measure": record["measure"],
            "floor": record["floor"],
            "floor_n_images": record["floor_n_images"],
            "detector": record["detector"]["name"],
            "detector_digest": record["detector"]["digest"],
            "reference": record["reference"]["source"],
            "reference_digest": record["reference"]["digest"],
            "n_images": record["n_images"],
            "image_size": samples["image_size"],
            "seed": samples["seed"],
            "model": result.model,
            "step": weights["step"],
            "epochs": weights["epochs"],
            "images_seen": weights["images_seen"],
            "training_seconds": result.training.history[-1].get("seconds") if result.training else None,
            "solver": samples["solver"],
            "time_points": samples["time_points"],
            "function_evaluations": samples["function_evaluations"],
            "sampling_seconds": samples.get("seconds"),
            "guidance": guidance and {"kind": guidance["kind"], "scale": guidance["scale"]},
            "n_modes": samples["n_modes"],
            "coupling_cost": result.coupling_cost,
            "straightness": (samples.get("straightness") or {}).get("deviation"),
            "seeds": result.seeds and _range(result.seeds),
            "images_digest": samples["images_digest"],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{result.path}' is not a result of fid ({error!r}); make it again") from error


def _range(seeds: dict[str, Any]) -> dict[str, Any]:
    """Return number, mean and range of the distances of several seeds."""
    distance = seeds["metrics"]["frechet"]
    return {"n": len(seeds["seeds"]), **{name: float(distance[name]) for name in ("mean", "min", "max")}}


def _order(row: Row) -> tuple:
    """Return the place of a row among those of its encoder."""
    scale = row["guidance"]["scale"] if row["guidance"] else 0.0
    setting = list(SETTINGS).index(row["setting"]), row["autoguidance"]
    return (*setting, row["model"] or "", row["n_modes"], row["time_points"], scale, row["seed"], row["name"])


def _why_apart(group: list[Row], main: Row) -> str:
    """Say why a group can't be compared with the main one, a row of which is given."""
    reasons = [describe(group[0]) for name, describe in _CIRCUMSTANCES.items() if group[0][name] != main[name]]
    what = "Compare these rows only with one another" if len(group) > 1 else "Don't compare this row with the others"
    return f"{mark_of(group[0])} {what}: {'; '.join(reasons)}."


def mark_of(row: Row) -> str:
    """Return the mark of rows that can't be compared with those of the main group."""
    return f"[{row['group']}]" if row["group"] else ""


def _differences(group: list[Row]) -> list[str]:
    found = []
    for name, value in _DIFFERENCES.items():
        if len({str(value(row)) for row in group if value(row) is not None}) > 1:
            found.append(name)
    return found


def listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _number(value: float | None) -> str:
    return "" if value is None else number(value)


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)


def _spread(seeds: dict[str, Any] | None) -> str:
    return f"{seeds['min']:.4g} to {seeds['max']:.4g} ({seeds['n']})" if seeds else ""


def _metric(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row['metrics'][name]:.4f}" if name in row["metrics"] else ""


def differs(rows: list[Row], name: str) -> bool:
    """Whether a value is not the same in all rows."""
    return len({row[name] for row in rows}) > 1


_TABLE: dict[str, tuple[Callable[[Row], str], str]] = {
    "results": (lambda row: row["results"], "results"),
    "encoder": (lambda row: row["encoder"], ""),
    "setting": (lambda row: setting_of(row), ""),
    "distance": (lambda row: distance_of(row), ""),
    "range": (lambda row: _spread(row["seeds"]), ""),
    **{about.title: (_metric(name), "") for name, about in METRICS.items() if name != "frechet"},
    "detector": (lambda row: row["detector"].partition(" (")[0], "detector"),
    "images": (lambda row: f"{row['n_images']:,}", ""),
    "seed": (lambda row: str(row["seed"]), ""),
    "model": (lambda row: row["model"] or "", "model"),
    "steps": (lambda row: _number(row["step"]), ""),
    "images seen": (lambda row: "" if row["images_seen"] is None else f"{row['images_seen']:,}", ""),
    "training": (lambda row: _duration(row["training_seconds"]), ""),
    "evaluations": (lambda row: _number(row["function_evaluations"]), ""),
    "sampling": (lambda row: _duration(row["sampling_seconds"]), ""),
    "guidance": (lambda row: f"{row['guidance']['scale']:g}" if row["guidance"] else "", ""),
    "modes": (lambda row: f"{row['n_modes']:,}" if row["n_modes"] else "", ""),
    "coupling cost": (lambda row: "" if row["coupling_cost"] is None else f"{row['coupling_cost']:.3f}", ""),
    "straightness": (lambda row: "" if row["straightness"] is None else f"{row['straightness']:.3f}", ""),
}
"""Columns of the text by title: a row's cell, and the value that must differ for the column to be shown, if any."""

WORDS = ("results", "encoder", "setting", "detector", "model")
"""Columns of words; the others hold numbers and are aligned to the right."""


def place_of(row: Row) -> tuple[str, str]:
    """Return results folder and encoder."""
    return row["results"], row["encoder"]


def distance_of(row: Row) -> str:
    """Return the distance as every table, text and picture shows it."""
    return f"{row['distance']:.4f}"


def setting_of(row: Row) -> str:
    """Return the setting as targets spell it."""
    return row["setting"] + "_ag" * row["autoguidance"]


def table(rows: list[Row]) -> dict[str, list[str]]:
    """Return the columns that say something about these rows by title: a cell per row, empty if unknown."""
    columns = {}
    for title, (cell, differing) in _TABLE.items():
        cells = [cell(row) for row in rows]
        if any(cells) and (not differing or differs(rows, differing)):
            columns[title] = cells
    return columns


def render(comparison: Comparison) -> str:
    """Return a comparison as text: a table, warnings, notes."""
    rows, main = comparison.rows, comparison.main
    head = [
        f"{main['measure']}: smaller is better, * is the best",
        f"detector:  {main['detector']}",
        f"reference: {main['reference']}",
    ]
    if main["floor"] is not None:
        head.append(f"floor:     {main['floor']:.4f} (distance of {main['floor_n_images']:,} held-out real images)")
    columns = [[" ", *(" *"[row["best"]] for row in rows)]]
    for title, known in table(rows).items():
        cells = [title, *(text or "-" for text in known)]
        width = max(map(len, cells))
        columns.append([text.ljust(width) if title in WORDS else text.rjust(width) for text in cells])
    columns.append(["", *map(mark_of, rows)])
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    warnings = [f"WARNING: {warning}" for warning in comparison.warnings]
    parts = [head, lines, warnings, comparison.notes]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"
