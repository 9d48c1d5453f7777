"""The record of a training run: one JSON line per logged step, and its curve."""

import json
import os
from pathlib import Path
from typing import Any

from mmfm.infra import store


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Read the lines of a history; a last line that a kill cut short is left out."""
    path = Path(path)
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def write_history(path: str | Path, lines: list[dict[str, Any]]) -> None:
    """Write a whole history, one JSON object per line."""
    with store.whole_file(path) as partial:
        partial.write_text("".join(store.canonical_json(line) + "\n" for line in lines))


class History:
    """``history.jsonl``, appended to as training goes.

    Args:
        path: the file.
        step: the step that training goes on from; later lines, of steps that will be taken again, are removed.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.lines = [line for line in read_history(path) if line["step"] <= step]
        write_history(path, self.lines)

    def append(self, line: dict[str, Any]) -> None:
        """Add one line and hand it to the operating system at once, so that a kill loses none."""
        self.lines.append(line)
        with open(self.path, "a") as file:
            file.write(store.canonical_json(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def draw_curve(lines: list[dict[str, Any]], path: str | Path, title: str) -> None:
    """Draw loss and learning rate over the steps as a PNG; the loss with a running mean where it is noisy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=(3, 1), layout="constrained")
    window = max(1, len(lines) // 25)
    if window == 1:
        top.plot(steps, losses, color="tab:blue", linewidth=1.5, marker="." if len(lines) < 25 else "")
    else:
        top.plot(steps, losses, color="0.75", linewidth=1, label="logged")
        means = [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
        top.plot(steps, means, color="tab:blue", linewidth=1.5, label=f"mean of {window}")
        top.legend(frameon=False)
    if losses and min(losses) > 0 and max(losses) > 5 * min(losses):
        top.set_yscale("log")
    top.set_ylabel("loss")
    top.set_title(title)
    bottom.plot(steps, [line["lr"] for line in lines], color="tab:orange", linewidth=1.5)
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    with store.whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png", metadata={"Software": None})
    plt.close(figure)


def publish_history(state: Path, step: int, out_dir: Path, title: str) -> None:
    """Write ``history.jsonl`` and ``curve.png`` of a run that ends at ``step`` from the history in its state."""
    lines = [line for line in read_history(state / "history.jsonl") if line["step"] <= step]
    write_history(out_dir / "history.jsonl", lines)
    draw_curve(lines, out_dir / "curve.png", title)
