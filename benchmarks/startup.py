"""Measure what a start of the workflow costs: a dry run with nothing to do, and one of 200 results.

python benchmarks/startup.py [--rounds 9]

The first is compared with a dry run of an empty Snakefile, in turns, each in a process of its own. Nothing but empty
outputs is made, in a temporary folder. Writes benchmarks/results/startup.json and .md; fails above the limits.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from runs import RESULTS, publish

ROOT = Path(__file__).resolve().parent.parent
RATIO, SECONDS = 1.3, 10.0
"""Limits: of the dry run with nothing to do, compared with the empty Snakefile's, and of the dry run of 200 results."""

ONE = "results/fid/dinov2_mode.txt"
MANY = [
    f"results/fid/dinov2_{setting}.seed{seed}.t{points}.txt"
    for setting in ("uncond", "gmm", "mode", "class")
    for seed in range(10)
    for points in (2, 4, 8, 16, 25)
]


def snakemake(folder: Path, *arguments: str) -> tuple[float, str]:
    """Return the seconds that a call takes, and what it printed."""
    line = [sys.executable, "-m", "snakemake", "--cores", "2", "--workflow-profile", "none", *arguments]
    begin = time.perf_counter()
    result = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if result.returncode:
        raise SystemExit(result.stdout + result.stderr)
    return seconds, result.stdout + result.stderr


def finish(folder: Path) -> None:
    """Make the outputs of one result, empty, and record them as up to date."""
    said = snakemake(folder, "-n", "-s", str(ROOT / "Snakefile"), "--", ONE)[1]
    outputs = [line.split(": ", 1)[1].split(", ") for line in said.splitlines() if line.startswith("    output: ")]
    for path in (folder / name for names in outputs for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch() if path.suffix not in ("", ".zarr") else path.mkdir()
    snakemake(folder, "-s", str(ROOT / "Snakefile"), "--touch", "--forceall", "--", ONE)


def measure(rounds: int, targets: list[str]) -> dict[str, Any]:
    """Return the seconds of all dry runs by name."""
    found: dict[str, Any] = {"empty": [], "nothing to do": [], "many": [], "targets": len(targets)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "Empty").write_text("rule all:\n    default_target: True\n")
        finish(folder)
        for _ in range(rounds):
            found["empty"].append(snakemake(folder, "-n", "-s", "Empty")[0])
            seconds, said = snakemake(folder, "-n", "-s", str(ROOT / "Snakefile"), "--", ONE)
            assert "Nothing to be done" in said
            found["nothing to do"].append(seconds)
        for _ in range(min(rounds, 3)):
            found["many"].append(snakemake(folder, "-n", "-s", str(ROOT / "Snakefile"), "--", *targets)[0])
    return found


def summary(found: dict[str, Any]) -> dict[str, float]:
    """Return medians, and the ratio of the first two."""
    empty, nothing, many = (statistics.median(found[name]) for name in ("empty", "nothing to do", "many"))
    return {"empty": empty, "nothing_to_do": nothing, "ratio": nothing / empty, "many": many}


def report(found: dict[str, Any]) -> str:
    """Return a Markdown table."""
    values = summary(found)
    return "\n".join(
        [
            "| dry run | median seconds | limit |",
            "|---|---|---|",
            f"| an empty Snakefile | {values['empty']:.2f} | |",
            f"| nothing to do | {values['nothing_to_do']:.2f} ({values['ratio']:.2f} times) | {RATIO} times |",
            f"| {found['targets']} results | {values['many']:.2f} | {SECONDS:.0f} |",
        ]
    )


def passed(found: dict[str, Any]) -> bool:
    """Return whether the limits are kept."""
    values = summary(found)
    return values["ratio"] <= RATIO and values["many"] <= SECONDS


def main(arguments: list[str] | None = None) -> int:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--targets", type=int, default=len(MANY), help="results of the second dry run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found = measure(options.rounds, MANY[: options.targets])
    publish("startup", found, report(found), options.out)
    return 0 if passed(found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
