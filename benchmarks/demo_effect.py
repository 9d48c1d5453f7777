"""Reproduce the paper's effect on the demo: distances by setting, seed, time points and training steps.

python benchmarks/demo_effect.py --cores 2

Runs the workflow in results/demo_effect/: all settings with three seeds and several numbers of time points at the
demo's budget, and the first seed at other budgets. Each budget is one Snakemake call, with one core per training run.
An interrupted benchmark keeps its measurements and can be continued. Writes benchmarks/results/demo_effect.json and
.md, and the pictures learning-curve.png and demo.png in docs/images/.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
RUN = "demo_effect"
SETTINGS = ("uncond", "gmm", "mode")
SEEDS = (0, 1, 2)
TIME_POINTS = (1, 4, 25)
BUDGETS = dict.fromkeys(SETTINGS, (1, 2, 3, 5, 10, 20))
"""Epochs at which the first seed's distance is measured."""


def snakemake(targets: list[str], cores: int, epochs: int) -> None:
    """Make the targets with a budget of ``epochs`` training epochs."""
    overlay = ROOT / "results" / RUN / f"epochs{epochs}.yaml"
    overlay.parent.mkdir(parents=True, exist_ok=True)
    overlay.write_text(yaml.safe_dump({"run": RUN, "train": {"epochs": epochs}}))
    line = [sys.executable, "-m", "snakemake", *targets, "--cores", str(cores), "--set-threads", "train=1", "sample=1"]
    line += ["--rerun-triggers", "params", "input", "mtime", "--quiet", "rules", "--configfile", str(overlay)]
    subprocess.run(line, cwd=ROOT, check=True)


def name(setting: str, seed: int, t: int) -> str:
    """Return the target for one measurement."""
    return f"results/{RUN}/fid/dinov2_{setting}.seed{seed}.t{t}.json"


def collect(path: Path) -> dict[str, Any]:
    """Return the measurements so far: ``{setting/seed/epochs/t: distance}`` and the floor."""
    return json.loads(path.read_text()) if path.exists() else {"distances": {}, "floor": None}


def measure(found: dict[str, Any], path: Path, wanted: list[tuple[str, int, int]], epochs: int, cores: int) -> bool:
    """Make the missing measurements of ``wanted`` (setting, seed, time points); return whether there were any."""
    missing = [w for w in wanted if "/".join(map(str, (w[0], w[1], epochs, w[2]))) not in found["distances"]]
    if not missing:
        return False
    snakemake([name(*w) for w in missing], cores, epochs)
    for setting, seed, t in missing:
        result = json.loads((ROOT / name(setting, seed, t)).read_text())
        found["distances"][f"{setting}/{seed}/{epochs}/{t}"] = result["frechet_distance"]
        found["floor"], found["detector"] = result["floor"], result["detector"]["name"]
        found["steps_per_epoch"] = result["samples"]["weights"]["step"] // epochs
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    return True


def table(found: dict[str, Any], budget: int) -> list[str]:
    """Return a Markdown table of the median and range over seeds at the demo's budget."""
    lines = ["| setting | source only | 4 time points | 25 time points | ratio 4 / 25 |", "|---|---|---|---|---|"]
    for setting in SETTINGS:
        cells, medians = [], {}
        for t in TIME_POINTS:
            values = [found["distances"].get(f"{setting}/{seed}/{budget}/{t}") for seed in SEEDS]
            values = [v for v in values if v is not None]
            medians[t] = statistics.median(values)
            cells.append(f"{medians[t]:.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append(f"| `{setting}` | {' | '.join(cells)} | {medians[4] / medians[25]:.3f} |")
    return lines


def curve(found: dict[str, Any], t: int) -> dict[str, list[tuple[int, float]]]:
    """Return (step, distance) of the first seed by setting, in order of steps."""
    points: dict[str, list[tuple[int, float]]] = {setting: [] for setting in SETTINGS}
    for label, distance in found["distances"].items():
        setting, seed, epochs, points_used = label.split("/")
        if (int(seed), int(points_used)) == (SEEDS[0], t):
            points[setting].append((int(epochs) * found["steps_per_epoch"], distance))
    return {setting: sorted(values) for setting, values in points.items()}


def draw(found: dict[str, Any], path: Path, budget: int) -> None:
    """Plot the distance by training step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for setting, values in curve(found, TIME_POINTS[-1]).items():
        axes.plot(*zip(*values, strict=True), marker="o", label=setting)
    source = found["distances"][f"gmm/{SEEDS[0]}/{budget}/1"]
    axes.axhline(source, color="grey", linestyle="--", linewidth=1, label="mixture source only, decoded")
    axes.axhline(found["floor"], color="black", linestyle=":", linewidth=1, label="held-out real images")
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="training step (batch of 128)", ylabel="Fréchet distance, demo detector")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_samples(path: Path) -> None:
    """Draw images of the first seed by setting, next to decoded samples of the mixture source."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from mmfm.infra import npz
    from mmfm.infra.pictures import image_grid

    panels = {
        "Gaussian source": ("uncond", TIME_POINTS[-1]),
        "mixture source": ("gmm", TIME_POINTS[-1]),
        "mixture source, conditioned on mode": ("mode", TIME_POINTS[-1]),
        "mixture source only, decoded": ("mode", 1),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.35), constrained_layout=True)
    for axis, (title, (setting, t)) in zip(axes, panels.items(), strict=True):
        folder = next((ROOT / "results" / RUN / "sample").glob(f"dinov2_{setting}/seed{SEEDS[0]}.*.t{t}"))
        axis.imshow(np.asarray(image_grid(npz.map_array(folder / "images.npz")[:36].transpose(0, 3, 1, 2), 6)))
        axis.set_title(title, fontsize=11)
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, and write JSON, Markdown and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--budget", type=int, default=2, help="the demo's budget, in epochs")
    parser.add_argument("--longest", type=int, default=100, help="largest budget, in epochs")
    options = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / "demo_effect.json"
    found = collect(path)
    budgets = sorted({e for epochs in BUDGETS.values() for e in epochs if e <= options.longest} | {options.budget})
    for epochs in budgets:
        wanted = [(setting, SEEDS[0], TIME_POINTS[-1]) for setting in SETTINGS if epochs in BUDGETS[setting]]
        if epochs == options.budget:
            wanted = [(setting, seed, t) for t in TIME_POINTS for seed in SEEDS for setting in SETTINGS]
        fresh = measure(found, path, wanted, epochs, options.cores)
        if fresh and epochs == options.budget:  # larger budgets overwrite these images
            draw_samples(ROOT / "docs" / "images" / "demo.png")
    lines = [
        "# The effect on the demo",
        "",
        f"Detector: {found['detector']}. Held-out real images: {found['floor']:.2f}.",
        "",
        f"Median (range) over {len(SEEDS)} seeds after {options.budget} epochs:",
        "",
        *table(found, options.budget),
        "",
        "First seed, 25 time points, distance by training step:",
        "",
        "| setting | step: distance |",
        "|---|---|",
    ]
    for setting, values in curve(found, TIME_POINTS[-1]).items():
        lines.append(f"| `{setting}` | {', '.join(f'{step:,}: {distance:.2f}' for step, distance in values)} |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    draw(found, ROOT / "docs" / "images" / "learning-curve.png", options.budget)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
