"""Measure training steps at full size on this machine: time, FLOP/s, memory, and writing and reading a checkpoint.

python benchmarks/full_size.py [--models S XL] [--batch 1] [--steps 2] [--threads 1] [--no-checkpoint]

Runs the trainer on DiTDH in float32, with random latents (768, 16, 16) and 8192 labels. Each model is trained in one
process and resumed in another, so that peak memory is measured separately. Models that don't fit into the free memory
are skipped and reported. Times are wall-clock: use an idle machine. Writes benchmarks/results/full_size.json and .md.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import runs
import train_speed
from mmfm import config
from mmfm.infra.distributed import Ranks, choose_device
from mmfm.models.dit import DIT_PRESETS
from mmfm.models.flops import dit_flops
from mmfm.training import trial
from mmfm.training.runlog import Clock
from mmfm.training.trainer import Trainer
from mmfm.workflow import costs

SHAPE, LABELS = (768, 16, 16), 8192
TEMPORARY = 1.4
"""Ratio of all activations, those that a block frees at once included, to those kept for the backward pass."""


def make_trainer(name: str, batch: int, state: Path) -> Trainer:
    """Return a float32 trainer with the ImageNet preset, but another model and batch size."""
    folder = runs.ROOT / "config"
    read = config.load([folder / "config.yaml", folder / "imagenet256.yaml"])
    task = trial.labelled(replace(read.train, precision="float32"), LABELS, SHAPE)
    state.mkdir(parents=True, exist_ok=True)
    return trial.trainer(task, read.models[name], SHAPE, batch, state, Ranks(0, 1, choose_device()))


def needed_gb(name: str, batch: int) -> float:
    """Estimate the float32 memory of a step: weights, gradients, moments, EMA and activations."""
    model, channels, tokens = config.Model(**DIT_PRESETS[name]), SHAPE[0], SHAPE[1] * SHAPE[2]
    activations = batch * TEMPORARY * costs.FLOAT32_ACTIVATIONS * costs.dit_activations(model, tokens, channels)
    parameters = costs.dit_parameters(model, channels, LABELS)
    return (parameters * (costs.TRAINED_BYTES + costs.EMA_BYTES) + activations) / 1e9 + 0.5


def free_gb() -> float:
    """Return the available memory."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 / 1e9


def peak_gb() -> float:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def train(name: str, batch: int, steps: int, state: Path, keep: bool) -> dict[str, Any]:
    """Take a warm-up step, ``steps`` timed ones, and one with its parts timed; write a checkpoint."""
    trainer = make_trainer(name, batch, state)
    feed, forward = trial.RandomLatents(trainer.plan, trainer.ranks.device, SHAPE), trainer.division.wrapped(False)
    batches, seconds = feed.batches(0, 10**9), []
    for _ in range(steps + 1):
        start = time.perf_counter()
        trainer._train_step(forward, batches)
        trainer.loss_sum.item()
        seconds.append(time.perf_counter() - start)
    first, *timed = seconds
    parts = train_speed.parts_of_steps(trainer, forward, batches, 1)
    trainer._check(feed)
    flops = 3 * batch * dit_flops(trainer.model.config, SHAPE[1] * SHAPE[2], SHAPE[0])
    step, passes = min(timed), sum(parts[name] for name in ("forward", "backward")) / sum(parts.values())
    found = {
        "parameters": sum(p.numel() for p in trainer.model.parameters()), "first_step_seconds": first,
        "seconds_per_step": step, "flops_per_step": flops, "gflops": flops / step / 1e9, "passes_share": passes,
        "gflops_of_passes": flops / (step * passes) / 1e9, "loss": trainer.loss_sum.item() / trainer.step,
        "peak_gb": peak_gb(), "parts": {part: parts[part] / sum(parts.values()) for part in train_speed.PARTS},
    }  # fmt: skip
    if keep:
        trainer._clock = Clock(0, 0.0)
        start = time.perf_counter()
        trainer._save(feed, milestone=True)
        size = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
        found |= {"save_seconds": time.perf_counter() - start, "checkpoint_gb": size / 1e9, "save_peak_gb": peak_gb()}
    return found


def resume(name: str, batch: int, steps: int, state: Path) -> dict[str, Any]:
    """Resume from the checkpoint, which verifies it."""
    trainer = make_trainer(name, batch, state)
    start = time.perf_counter()
    assert trainer.resume(steps + 2) and trainer.step == steps + 2
    return {"resume_seconds": time.perf_counter() - start, "resume_peak_gb": peak_gb()}


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Run both phases for a model, each in its own process."""
    found: dict[str, Any] = {"model": name, "batch": options.batch, "threads": options.threads}
    found |= {"needed_gb": needed_gb(name, options.batch), "free_gb": free_gb()}
    if found["needed_gb"] > found["free_gb"] - 1:
        return found
    variables = {**runs.environment(), **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        for phase in ("train", "resume") if options.checkpoint else ("train",):
            line = [sys.executable, __file__, "--models", name, "--batch", str(options.batch), "--phase", phase]
            line += ["--steps", str(options.steps), "--scratch", f"{folder}/state-x"]
            line += [] if options.checkpoint else ["--no-checkpoint"]
            done = subprocess.run(line, env=variables, check=True, stdout=subprocess.PIPE, text=True)
            found |= json.loads(done.stdout.splitlines()[-1])
    return found


def report(found: list[dict[str, Any]]) -> str:
    """Return the Markdown table."""
    lines = ["# Training steps at full size", "", f"torch {torch.__version__}, {cpu_name()}, float32.", ""]
    lines += ["| | threads | batch | s per step | GFLOP/s | in passes | peak memory | checkpoint | write | read |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for run in found:
        head = f"| DiTDH-{run['model']} | {run['threads']} | {run['batch']} "
        if "seconds_per_step" not in run:
            lines.append(f"{head}| does not fit: about {run['needed_gb']:.1f} GB, {run['free_gb']:.1f} free |")
            continue
        cells = [f"{run['seconds_per_step']:.1f}", f"{run['gflops']:.0f}", f"{run['gflops_of_passes']:.0f}"]
        cells.append(f"{run['peak_gb']:.1f} GB")
        if "checkpoint_gb" in run:
            cells += [f"{run['checkpoint_gb']:.1f} GB"]
            cells += [f"{run[key]:.0f} s" for key in ("save_seconds", "resume_seconds")]
        lines.append(f"{head}| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    """Return the model name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=DIT_PRESETS, default=["S", "XL"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-checkpoint", dest="checkpoint", action="store_false", help="don't write and read one")
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoint")
    parser.add_argument("--phase", choices=("train", "resume"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=runs.RESULTS)
    options = parser.parse_args(arguments)
    if options.phase:
        # If memory runs out after all, the kernel should kill this process first.
        Path(f"/proc/{os.getpid()}/oom_score_adj").write_text("1000")
        run = (*options.models, options.batch, options.steps, options.scratch)
        print(json.dumps(train(*run, options.checkpoint) if options.phase == "train" else resume(*run)))
        return 0
    found = [measure(options, name) for name in options.models]
    results = {"torch": torch.__version__, "cpu": cpu_name(), "runs": found}
    runs.publish("full_size", results, report(found), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
