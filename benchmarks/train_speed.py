"""Measure the parts of a training step and the bare model.

python benchmarks/train_speed.py [--steps 12] [--overrides train.compile=true ...]

Starts `mmfm train` on some of the demo's images (setting `mode`, cached latents). Instead of training, it alternates
between whole steps and bare forward and backward passes of the same batch, and times the parts of a step. On a CPU,
process time is measured, to exclude other programs. On a GPU, training runs in bf16, with and without torch.compile.
Writes benchmarks/results/train_speed.json and .md.
"""

import argparse
import contextlib
import json
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import runs
from mmfm.cli import train as command
from mmfm.training import trainer as training

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PARTS = ("latents", "draws and coupling", "forward", "backward", "norm and clip", "optimiser", "average", "rest")


def now() -> float:
    """Return process time in seconds on a CPU, or wall-clock time after synchronizing a GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Parts:
    """Accumulates the time spent in functions, excluding other timed functions that they call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, with its time added to ``part``."""

        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            self._inner.append(0.0)
            start = now()
            try:
                return function(*arguments, **keywords)
            finally:
                passed, inner = now() - start, self._inner.pop()
                self.seconds[part] += passed - inner
                if self._inner:
                    self._inner[-1] += passed

        return wrapper


class Finished(Exception):
    """Ends the training after the measurements."""


def measure(trainer: training.Trainer, feed: Any, steps: int) -> dict[str, Any]:
    """Alternate between whole steps and bare passes, then time the parts of steps."""
    forward = trainer.division.wrapped(trainer.options.compile)
    batches = feed.batches(0, 10**9)
    bare, plan = bare_pass(trainer, forward, feed), trainer.plan
    times: dict[str, list[float]] = {"step": [], "bare": []}
    for turn in range(steps + 2):
        for name, run in (("step", lambda: trainer._train_step(forward, batches)), ("bare", bare)):
            start = now()
            run()
            if turn > 1:  # after warm-up
                times[name].append(now() - start)
    parts = parts_of_steps(trainer, forward, batches, steps)
    step, plain = statistics.median(times["step"]), statistics.median(times["bare"])
    if DEVICE.type == "cuda":
        memory, card = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.get_device_name()
    else:
        memory, card = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            f"CPU, {torch.get_num_threads()} thread",
        )
    return {
        "device": card, "batch": plan.global_batch, "compile": trainer.options.compile, "seconds_per_step": step,
        "images_per_second": plan.global_batch / step, "bare_share": plain / step, "peak_memory_gb": memory,
        "parts": {part: parts[part] / sum(parts.values()) for part in PARTS},
    }  # fmt: skip


def bare_pass(trainer: training.Trainer, forward: torch.nn.Module, feed: Any) -> Callable[[], None]:
    """Return a function that runs forward and backward passes over fixed micro batches with a trivial loss."""
    from mmfm.infra.precision import autocast

    micros = [inputs.latent for _, inputs in feed.batches(0, 1)]
    labels = trainer.model.config.num_classes

    def run() -> None:
        trainer.division.forget_gradients()
        for x in micros:
            t = torch.linspace(0, 1, len(x), device=DEVICE)
            y = torch.arange(len(x), device=DEVICE) % labels if labels else None
            with autocast("auto", DEVICE):
                velocity = forward(x, t, y)
            velocity.float().square().mean().backward()

    return run


def parts_of_steps(trainer: training.Trainer, forward: Any, batches: Iterator, steps: int) -> dict[str, float]:
    """Return the seconds of each part over ``steps`` steps."""
    parts, division = Parts(), trainer.division

    def latents() -> Iterator:
        while True:
            yield parts.timed("latents", next)(batches)

    patches = (
        (trainer, "losses", "draws and coupling"), (torch.Tensor, "backward", "backward"),
        (division, "gradients", "norm and clip"), (division, "norm", "norm and clip"),
        (torch.nn.utils, "clip_grads_with_norm_", "norm and clip"), (trainer.optimizer, "step", "optimiser"),
        (trainer.ema, "update", "average"),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        for owner, name, part in patches:
            stack.enter_context(mock.patch.object(owner, name, parts.timed(part, getattr(owner, name))))
        timed_forward, step = parts.timed("forward", forward), parts.timed("rest", trainer._train_step)
        inputs = latents()
        for _ in range(steps):
            step(timed_forward, inputs)
    return parts.seconds


def hijack(files: list[str], folder: Path, overrides: list[str], steps: int) -> dict[str, Any]:
    """Start ``mmfm train`` and measure instead of running its loop."""
    found: dict[str, Any] = {}

    def run(self: training.Trainer, target: int, feed: Any) -> None:
        found.update(measure(self, feed, steps))
        raise Finished

    arguments = [*files, "--setting", "mode", "--out-dir", str(folder), "train.logger=none", *overrides]
    with mock.patch.object(training.Trainer, "run", run), contextlib.suppress(Finished):
        command.main(arguments)
    return found


def report(found: dict[str, Any]) -> str:
    """Return the Markdown tables."""
    lines = ["# Speed of training", ""]
    for run in found["measured"]:
        lines += [
            f"{run['device']}, torch {found['torch']}, compile {'on' if run['compile'] else 'off'}:",
            f"{run['images_per_second']:,.0f} images/s, {run['seconds_per_step']:.3f} s per step of {run['batch']},",
            f"peak memory {run['peak_memory_gb']:.1f} GB.",
            f"Bare forward and backward pass: {run['bare_share']:.1%} of a step.",
            "",
            "| part | share of a step |",
            "|---|---|",
            *(f"| {part} | {share:.1%} |" for part, share in run["parts"].items()),
            "",
        ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--overrides", nargs="*", default=[], help="section.key=value for the training run")
    parser.add_argument("--out", type=Path, default=runs.RESULTS)
    options = parser.parse_args(arguments)
    variants = ([], ["train.compile=true"]) if DEVICE.type == "cuda" else ([],)
    with tempfile.TemporaryDirectory() as temporary:
        files = runs.prepare(Path(temporary), options.images)
        measured = [
            hijack(files, Path(temporary) / str(i), [*options.overrides, *variant], options.steps)
            for i, variant in enumerate(variants)
        ]
    found = {"torch": torch.__version__, "measured": measured}
    runs.publish("train_speed", json.loads(json.dumps(found)), report(found), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
