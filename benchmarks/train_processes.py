"""Compare the losses of the same training with 1 to 4 processes, with micro-batches and with sharding.

python benchmarks/train_processes.py [--steps 100]

Writes benchmarks/results/train_processes.json and .md; exits with 1 if the relative difference of a loss exceeds 1e-4.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import runs

IMAGES, BATCH = 240, 24
BAR = 1e-4
VARIANTS: dict[str, tuple[int, list[str]]] = {
    "1 process": (1, []),
    "1 process, micro-batches of 8": (1, ["train.micro_batch=8"]),
    "1 process, micro-batches of 5": (1, ["train.micro_batch=5"]),
    "1 process, activations recomputed": (1, ["train.checkpoint_activations=true"]),
    "2 processes": (2, []),
    "2 processes, shards (FSDP2)": (2, ["train.sharding=fsdp"]),
    "3 processes": (3, []),
    "4 processes": (4, []),
}


def largest_difference(lines: list[dict[str, Any]], reference: list[dict[str, Any]], column: str) -> float:
    """Return the largest relative difference of a column over all steps."""
    return max(abs(a[column] / b[column] - 1) for a, b in zip(lines, reference, strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Run and compare all variants, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=runs.RESULTS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args(arguments)
    epochs = -(-options.steps * BATCH // IMAGES)
    common = [*runs.SMALL, f"train.global_batch={BATCH}", f"train.epochs={epochs}", "train.log_every=1"]
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        files = runs.prepare(Path(temporary), IMAGES)
        histories = {
            name: runs.train(files, Path(temporary) / str(i), [*common, *VARIANTS[name][1]], VARIANTS[name][0])
            for i, name in enumerate(options.variants)
        }
    reference = histories[options.variants[0]]
    for name, lines in histories.items():
        found[name] = {c: largest_difference(lines, reference, c) for c in ("loss", "grad_norm")}
    text = ["# Training divided in different ways", ""]
    text += [f"{len(reference)} steps, each logged; CPU, setting `mode`. Largest relative differences:", ""]
    text += ["| run | loss | gradient norm |", "|---|---|---|"]
    text += [f"| {name} | {values['loss']:.1e} | {values['grad_norm']:.1e} |" for name, values in found.items()]
    runs.publish("train_processes", {"steps": len(reference), "variants": found}, "\n".join(text) + "\n", options.out)
    return 0 if all(values["loss"] <= BAR for values in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
