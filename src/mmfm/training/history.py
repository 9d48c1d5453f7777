"""The records of a training run, one JSON object per line for a logged step or measured distance, and its curve."""

import json
import os
from pathlib import Path
from typing import Any

from mmfm.infra import store

HISTORY, DISTANCES = "history.jsonl", "fid.jsonl"
"""File names of the logged steps and of the measured distances."""

_CIRCUMSTANCES = ("measure", "n_images", "time_points", "detector_digest", "reference_digest")
"""Distances are comparable only if all of these are equal."""


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Read the lines of a record; none if there is no file. A last line cut short by a kill is dropped."""
    path = Path(path)
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def write_history(path: str | Path, lines: list[dict[str, Any]]) -> None:
    """Write a whole record, one JSON object per line."""
    with store.whole_file(path) as partial:
        partial.write_text("".join(store.canonical_json(line) + "\n" for line in lines))


def keep_until(path: Path, step: int | None) -> None:
    """Remove the lines of steps after ``step`` (None keeps all), and a line cut short by a kill."""
    if path.is_file():
        write_history(path, [line for line in read_history(path) if step is None or line["step"] <= step])


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a line and sync it to disk at once, so that a kill loses none."""
    with open(path, "a") as file:
        file.write(store.canonical_json(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def preview_file(state: Path, step: int) -> Path:
    """Return the path of the preview of ``step``."""
    return state / f"preview-{step:08d}.png"


def previews(state: Path) -> dict[int, Path]:
    """Return the paths of the existing previews by step."""
    return {int(path.stem.removeprefix("preview-")): path for path in sorted(state.glob("preview-*.png"))}


def draw_curve(
    lines: list[dict[str, Any]], path: str | Path, title: str, distances: list[dict[str, Any]] | None = None
) -> None:
    """Plot loss, learning rate and distances, if any were measured, over the steps as a PNG.

    Args:
        lines: of the history. A long history's loss gets a running mean.
        distances: lines of the other record. Only comparable ones are joined.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ratios = (3, 2, 1) if distances else (3, 1)
    figure, axes = plt.subplots(
        len(ratios), 1, figsize=(7, 1 + sum(ratios)), sharex=True, height_ratios=ratios, layout="constrained"
    )
    top, bottom = axes[0], axes[-1]
    _draw_loss(top, lines)
    top.set_title(title)
    if distances:
        _draw_distances(axes[1], distances)
    bottom.plot([line["step"] for line in lines], [line["lr"] for line in lines], color="tab:orange", linewidth=1.5)
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.locator_params(axis="x", integer=True)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    with store.whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png", metadata={"Software": None})
    plt.close(figure)


def _draw_loss(axis: Any, lines: list[dict[str, Any]]) -> None:
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    window = max(1, len(lines) // 25)
    if window == 1:
        axis.plot(steps, losses, color="tab:blue", linewidth=1.5, marker="." if len(lines) < 25 else "")
    else:
        axis.plot(steps, losses, color="0.75", linewidth=1, label="logged")
        means = [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
        axis.plot(steps, means, color="tab:blue", linewidth=1.5, label=f"mean of {window}")
        axis.legend(frameon=False)
    if losses and min(losses) > 0 and max(losses) > 5 * min(losses):
        axis.set_yscale("log")
    axis.set_ylabel("loss")


def _draw_distances(axis: Any, distances: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import LogFormatter

    comparable: dict[tuple, list[dict[str, Any]]] = {}
    for line in distances:
        comparable.setdefault(tuple(line[name] for name in _CIRCUMSTANCES), []).append(line)
    for lines in comparable.values():
        values = [line["distance"] for line in lines]
        about = f"{lines[0]['n_images']:,} images, {lines[0]['time_points']} time points; last {values[-1]:.4g}"
        axis.plot([line["step"] for line in lines], values, marker=".", linewidth=1.5, label=about)
    found = [line["distance"] for line in distances]
    if min(found) > 0 and max(found) > 5 * min(found):
        axis.set_yscale("log")
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(LogFormatter(minor_thresholds=(2, 0.5)))  # label 20 and 200, not only powers of ten
    else:
        axis.set_ylim(0, 1.1 * max(found) or 1)
    axis.set_ylabel(" / ".join(dict.fromkeys(line["measure"] for line in distances)))
    axis.legend(frameon=False)


def draw_curve_of(state: Path, step: int, path: Path, title: str) -> None:
    """Plot the records in a run's state up to ``step``."""
    draw_curve(_until(state / HISTORY, step), path, title, _until(state / DISTANCES, step))


def publish_history(state: Path, step: int, out_dir: Path, title: str) -> None:
    """Write ``history.jsonl``, ``curve.png`` and, if distances were measured, ``fid.jsonl`` of a run up to ``step``.

    Args:
        out_dir: an empty folder.
    """
    write_history(out_dir / HISTORY, _until(state / HISTORY, step))
    distances = _until(state / DISTANCES, step)
    if distances:
        write_history(out_dir / DISTANCES, distances)
    draw_curve_of(state, step, out_dir / "curve.png", title)


def _until(path: Path, step: int) -> list[dict[str, Any]]:
    lines = [line for line in read_history(path) if line["step"] <= step]
    return sorted(lines, key=lambda line: line["step"])
