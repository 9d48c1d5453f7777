"""Compare a training that is killed ten times by SIGKILL with an undisturbed one.

python benchmarks/train_kill.py [--quick] [--seed 0]

Runs 300 steps with a checkpoint every 20, in one process and in two. Each attempt is killed, all processes at once,
after a random delay of up to a fifth of the undisturbed training time; the attempt after the last kill runs to the end.
The weights must be bit-equal with one process, and equal up to rounding with two. Writes
benchmarks/results/train_kill.json and .md; exits with 1 if the weights differ.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import runs
from mmfm.models.weights import load_ema

EVERY = 20
IMAGES, BATCH = 320, 32


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Return the published weights."""
    return load_ema(out / "ema.safetensors")[0].state_dict()


def reached(out: Path) -> int:
    """Return the step of the newest checkpoint."""
    return max((int(path.name[5:]) for path in out.glob("state-*/step-*")), default=0)


def attempt(line: list[str], out: Path, delay: float | None) -> dict[str, Any] | None:
    """Start the run and kill it ``delay`` seconds after training began; returns None if it ended earlier."""

    def begun() -> int:  # the history is rewritten when training begins
        return sum(path.stat().st_mtime_ns for path in out.glob("state-*/history.jsonl"))

    before, first = begun(), reached(out)
    process = subprocess.Popen(
        line, env=runs.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while delay is not None and process.poll() is None and begun() == before:
        time.sleep(0.005)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return {"from": first, "delay": delay, "checkpoint": reached(out)}
    if process.returncode:
        raise SystemExit(f"a run failed without being killed (status {process.returncode}): {' '.join(line)}")
    return None


def kill_series(files: list[str], folder: Path, processes: int, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """Compare an undisturbed run with one that is killed several times."""
    overrides = [
        *runs.SMALL, f"train.global_batch={BATCH}", f"train.epochs={steps * BATCH // IMAGES}", "train.log_every=1",
        f"train.checkpoint_every={EVERY}", "train.preview.every=0",
    ]  # fmt: skip
    lines = runs.train(files, folder / "undisturbed", overrides, processes)
    seconds = lines[-1]["seconds"]
    line, out = runs.command(files, folder / "killed", overrides, processes), folder / "killed"
    generator, done = random.Random(seed), []
    for number in range(kills):
        died = attempt(line, out, generator.uniform(0, seconds * min(2 / kills, 0.6)))
        if died is None:
            break
        done.append(died)
        print(f"{processes} process(es), kill {number + 1}: newest checkpoint {died['checkpoint']}", file=sys.stderr)
    if not (out / "ema.safetensors").exists():
        attempt(line, out, None)
    ours, theirs = weights(out), weights(folder / "undisturbed")
    largest = max(((ours[n] - t).abs().max() / t.abs().max().clamp(min=1e-12)).item() for n, t in theirs.items())
    return {
        "processes": processes, "steps": len(lines), "kills": done, "training_seconds": round(seconds, 2),
        "bit_equal": all(torch.equal(ours[n], t) for n, t in theirs.items()), "largest_relative_difference": largest,
    }  # fmt: skip


def passed(series: dict[str, Any]) -> bool:
    """Return whether the weights are bit-equal, or equal up to rounding with several processes."""
    return series["bit_equal"] or (series["processes"] > 1 and series["largest_relative_difference"] < 1e-5)


def report(found: list[dict[str, Any]]) -> str:
    """Return the Markdown table."""
    lines = ["# Training under SIGKILL", "", f"torch {torch.__version__}, CPU, one thread per process.", ""]
    lines += [
        "| processes | steps | kills | newest checkpoint at each kill | bit-equal | largest difference | passed |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for series in found:
        where = ", ".join(str(kill["checkpoint"]) for kill in series["kills"])
        lines.append(
            f"| {series['processes']} | {series['steps']} | {len(series['kills'])} | {where} "
            f"| {'yes' if series['bit_equal'] else 'no'} | {series['largest_relative_difference']:.1e} "
            f"| {'yes' if passed(series) else 'NO'} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 steps, two kills, one process")
    parser.add_argument("--seed", type=int, default=0, help="for the times of the kills")
    parser.add_argument("--out", type=Path, default=runs.RESULTS)
    options = parser.parse_args(arguments)
    kills, steps = (2, 60) if options.quick else (10, 300)
    with tempfile.TemporaryDirectory() as temporary:
        files = runs.prepare(Path(temporary), IMAGES)
        found = [
            kill_series(files, Path(temporary) / str(n), n, kills, steps, options.seed)
            for n in ((1,) if options.quick else (1, 2))
        ]
    runs.publish("train_kill", {"seed": options.seed, "series": found}, report(found), options.out)
    return 0 if all(map(passed, found)) else 1


if __name__ == "__main__":
    sys.exit(main())
