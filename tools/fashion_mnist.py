"""Shared by the tools that train the demo's networks: Fashion-MNIST splits, measures, checkpoints, weights files."""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from mmfm.data.fashion_mnist import pad_to_rgb, read_idx
from mmfm.infra.store import file_digest

DEMO = Path(__file__).resolve().parent.parent / "resources" / "demo"


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the description and shows all defaults."""


@dataclass(frozen=True)
class Split:
    """Images (N, 3, 32, 32) uint8, labels (N,) int64, and the SHA-256 of the image file."""

    images: Tensor
    labels: Tensor
    digest: str


def add_common_arguments(parser: argparse.ArgumentParser, steps: int) -> None:
    """Add the options of both tools; ``steps`` is the default number of optimiser steps."""
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder with the original train-*.gz and t10k-*.gz files (the default is where the Debian package "
        "dataset-fashion-mnist installs them); resources/demo/fashion-mnist has only the test images, of which 8,000 "
        "are then used for training and 2,000 for testing: enough to try the tool",
    )
    parser.add_argument(
        "--steps", type=int, default=steps, help="optimiser steps; also sets the learning-rate schedule"
    )
    parser.add_argument("--seed", type=int, default=0, help="for initial weights, batches and augmentations")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; set OMP_NUM_THREADS to the same number")
    parser.add_argument("--evaluate-every", type=int, default=500, metavar="STEPS", help="interval between evaluations")
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        default=100,
        metavar="STEPS",
        help="interval between checkpoints; the same command resumes from the last one and ends with the same weights",
    )


def load_splits(folder: Path) -> tuple[Split, Split]:
    """Load the training and test splits from a folder.

    Without training files, the first 8,000 test images are used for training and the last 2,000 for testing.

    Raises:
        FileNotFoundError: there are no test files.
        ValueError: a file is malformed, or images and labels differ in number.
    """
    test = _load(folder, "t10k")
    if (folder / "train-images-idx3-ubyte.gz").exists():
        return _load(folder, "train"), test
    return (
        Split(test.images[:8000], test.labels[:8000], test.digest),
        Split(test.images[8000:], test.labels[8000:], test.digest),
    )


def _load(folder: Path, prefix: str) -> Split:
    path = folder / f"{prefix}-images-idx3-ubyte.gz"
    images, labels = read_idx(path), read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} images but {len(labels)} labels in the {prefix} files")
    return Split(torch.from_numpy(pad_to_rgb(images)), torch.from_numpy(labels).long(), file_digest(path))


def batch_indices(step: int, batch: int, total: int, seed: int) -> Tensor:
    """Return the indices of a step's batch. Each epoch is a permutation, cut into whole batches.

    They depend on the step alone, so a resumed run uses the same batches.
    """
    epoch, position = divmod(step, total // batch)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[position * batch : (position + 1) * batch]


def nearest_neighbour_accuracy(
    references: Tensor,
    reference_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    metric: Literal["cosine", "euclidean"] = "cosine",
    k: int = 20,
) -> float:
    """Return the accuracy of a majority vote among the k nearest references (N, C), for queries (M, C), float32."""
    if metric == "cosine":
        references, queries = (torch.nn.functional.normalize(x, dim=1) for x in (references, queries))
    nearest = torch.cdist(queries, references).topk(k, dim=1, largest=False).indices
    votes = torch.nn.functional.one_hot(reference_labels[nearest], int(reference_labels.max()) + 1).sum(1)
    return (votes.argmax(1) == query_labels).float().mean().item()


def mixture_purity(features: Tensor, labels: Tensor, components: int = 10) -> float:
    """Return the share of samples that have the majority label of their component in a diagonal Gaussian mixture."""
    mixture = GaussianMixture(components, covariance_type="diag", reg_covar=1e-4, n_init=3, random_state=0)
    assigned = mixture.fit_predict(features.double().numpy())
    table = np.zeros((components, int(labels.max()) + 1), np.int64)
    np.add.at(table, (assigned, labels.numpy()), 1)
    return float(table.max(1).sum() / len(assigned))


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write a JSON file atomically."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    os.replace(partial, path)


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, object]) -> None:
    """Write safetensors atomically, floats as float16; metadata that is not a string is written as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in metadata.items()}
    halves = {name: (x.half() if x.is_floating_point() else x).contiguous() for name, x in tensors.items()}
    partial = path.with_name(path.name + ".part")
    save_file(halves, partial, {"format": "pt", **text})
    partial.chmod(0o644)
    os.replace(partial, path)


def describe_run(options: argparse.Namespace, digest: str) -> dict[str, object]:
    """Return everything that determines the weights: options, seed, number of steps and SHA-256 of the data.

    A run can be resumed only by one with the same description.
    """
    elsewhere = {"data", "out", "grow", "seed", "steps", "threads", "evaluate_every", "checkpoint_every"}
    relevant = {name: value for name, value in vars(options).items() if name not in elsewhere}
    return {"settings": relevant, "seed": options.seed, "steps": options.steps, "data_sha256": digest}


def save_checkpoint(path: Path, run: dict[str, object], done: int, seconds: float, **parts: Stateful) -> None:
    """Write a checkpoint atomically: the states of the parts, the steps done, and the seconds they took."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"run": run, "done": done, "seconds": seconds, "states": states}, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path, run: dict[str, object], **parts: Stateful) -> tuple[int, float]:
    """Restore the parts from a checkpoint, if there is one; returns the steps done and the seconds they took.

    Raises:
        ValueError: the checkpoint belongs to a run with other options or data.
    """
    if not path.exists():
        return 0, 0.0
    checkpoint = torch.load(path, weights_only=True)
    if checkpoint["run"] != run:
        raise ValueError(f"{path} belongs to another run ({checkpoint['run']}); finish that run, or delete the file")
    for name, part in parts.items():
        part.load_state_dict(checkpoint["states"][name])
    print(f"resumed from {path} at step {checkpoint['done']}", flush=True)
    return checkpoint["done"], checkpoint["seconds"]


class ProgressLine:
    """Prints the step, measures, rate and time left; includes the time of interrupted runs."""

    def __init__(self, steps: int, start: int, seconds: float) -> None:
        self.steps, self.start, self.before, self.began = steps, start, seconds, time.monotonic()

    def seconds(self) -> float:
        """Return the training time in seconds, including interrupted runs."""
        return self.before + time.monotonic() - self.began

    def print(self, step: int, **measures: float) -> None:
        """Print one line; ``step`` is the number of steps done."""
        rate = (step - self.start) / (time.monotonic() - self.began)
        left = (self.steps - step) / rate
        shown = "  ".join(f"{name} {value:.4f}" for name, value in measures.items())
        print(f"step {step}/{self.steps}  {shown}  {rate:.2f} steps/s  {left / 60:.1f} min left", flush=True)
