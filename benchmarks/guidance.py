"""Measure the cost of autoguidance, compared with sampling from the model and from the guide alone.

python benchmarks/guidance.py                      the demo's models, on the GPU if there is one
python benchmarks/guidance.py --quick              the same in seconds
python benchmarks/guidance.py --model XL --guide S --latent 768 16 16 --batch 64 --labels 8192      on a GPU

The methods take turns, in another order each round, and are compared by medians. The weights are random, since they
don't affect the time. Writes benchmarks/results/guidance-{model}-{device}.json and .md.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfm import config
from mmfm.flow.guidance import autoguidance, classifier_free_guidance
from mmfm.flow.path import time_grid, time_shift
from mmfm.flow.solver import VelocityFn, euler
from mmfm.infra.distributed import choose_device
from mmfm.infra.precision import autocast, uses_bf16
from mmfm.models.dit import DiT, DiTConfig

ROOT = Path(__file__).parent.parent
LIMIT = 1.1
"""Largest accepted ratio of the time of autoguided sampling to the sum of the times of model and guide."""


def build(name: str, latent: tuple[int, int, int], labels: int, device: torch.device) -> DiT:
    """Return a model from the configuration with random weights."""
    sizes = config.load([ROOT / "config" / "config.yaml"]).section("model", model=name)
    dit = DiTConfig(
        input_size=latent[1], patch_size=1, in_channels=latent[0], hidden_size=sizes.hidden_size, depth=sizes.depth,
        num_heads=sizes.num_heads, num_classes=labels, label_dropout=0.1,
    )  # fmt: skip
    return DiT(dit, generator=torch.Generator().manual_seed(0)).to(device).eval().requires_grad_(False)


def fields_of(model: DiT, guide: DiT, labels: Tensor, precision: str) -> dict[str, VelocityFn]:
    """Return the velocity fields to time, by name."""

    def network(dit: DiT) -> Callable[..., Tensor]:
        def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            with autocast(precision, x.device):
                return dit(x, t, y)

        return velocity

    main, weak = network(model), network(guide)
    return {
        "model": partial(main, y=labels),
        "guide": partial(weak, y=labels),
        "autoguided": autoguidance(partial(main, y=labels), partial(weak, y=labels), 1.5),
        "classifier-free": classifier_free_guidance(main, labels, model.null_label, 1.5),
    }


@torch.inference_mode()
def measure(
    fields: dict[str, VelocityFn], x: Tensor, times: Tensor, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the seconds of every round by field, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in fields}
    order = list(fields)
    for number in range(rounds + 1):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            start = clock()
            euler(fields[name], x, times)
            if number:
                seconds[name].append(clock() - start)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return the medians, and the ratio of autoguided sampling to the sum of both networks."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["autoguided"] / (medians["model"] + medians["guide"])
    return {"median_seconds": medians, "ratio": ratio, "limit": LIMIT, "met": ratio <= LIMIT}


def table(found: dict[str, Any]) -> str:
    """Return the Markdown report."""
    lines = [
        "# Cost of autoguidance",
        "",
        f"{found['model']} guided by {found['guide']}, latents {found['latent']}, batch {found['batch']}, "
        f"{found['steps']} Euler steps, {found['precision']} on {found['device']}, torch {found['torch']}; "
        f"{found['rounds']} interleaved rounds.",
        "",
        "| sampling with | median s | images/s |",
        "|---|---|---|",
    ]
    for name, value in found["median_seconds"].items():
        lines.append(f"| {name} | {value:.4f} | {found['batch'] / value:.2f} |")
    verdict = "met" if found["met"] else "NOT met"
    lines += ["", f"autoguided / (model + guide) = **{found['ratio']:.3f}** (at most {found['limit']}: {verdict})"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="entry of `models` in config/config.yaml")
    parser.add_argument("--guide", default="tiny_guide", help="the same for the guide")
    parser.add_argument("--latent", type=int, nargs=3, default=(96, 4, 4), metavar=("C", "H", "W"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--labels", type=int, default=64)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bf16"))
    parser.add_argument("--quick", action="store_true", help="fewer images, steps and rounds")
    parser.add_argument("--out-dir", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    steps, rounds = options.steps, options.rounds
    if options.quick:
        steps, rounds, options.batch = 6, 7, min(options.batch, 16)
    device, latent = choose_device(), tuple(options.latent)

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    model, guide = (build(name, latent, options.labels, device) for name in (options.model, options.guide))
    labels = torch.arange(options.batch, device=device) % options.labels
    x = torch.randn(options.batch, *latent, generator=torch.Generator().manual_seed(0)).to(device)
    fields = fields_of(model, guide, labels, options.precision)
    seconds = measure(fields, x, time_grid(steps + 1, time_shift(latent)), rounds, clock)
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    found = {
        "model": options.model, "guide": options.guide, "latent": list(latent), "batch": options.batch,
        "steps": steps, "rounds": rounds, "device": f"{card} ({platform.machine()})", "torch": torch.__version__,
        "precision": "bf16" if uses_bf16(options.precision, device) else "float32", "seconds": seconds,
        **summary(seconds),
    }  # fmt: skip
    options.out_dir.mkdir(parents=True, exist_ok=True)
    path = options.out_dir / f"guidance-{options.model}-{device.type}"
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(found))
    print(table(found), end="")


if __name__ == "__main__":
    main()
