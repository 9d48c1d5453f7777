"""What the demo's training tools share: the splits of Fashion-MNIST, measures, checkpoints and weights files."""

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

from mmfm.data.fashion_mnist import pad_to_rgb, read_idx, sha256

DEMO = Path(__file__).resolve().parent.parent / "resources" / "demo"


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's lines and shows every default."""


@dataclass(frozen=True)
class Split:
    """Images of one split as uint8 (N, 3, 32, 32), labels as int64 (N,), and the SHA-256 of the images' file."""

    images: Tensor
    labels: Tensor
    digest: str


def add_common_arguments(parser: argparse.ArgumentParser, steps: int) -> None:
    """The options that both tools take; ``steps`` is the default number of optimiser steps."""
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of the original train-*.gz and t10k-*.gz (the Debian package dataset-fashion-mnist puts them at "
        "the default); with resources/demo/fashion-mnist, which holds the test images only, the first 8,000 of "
        "them train and the rest test: enough to try the tool, not to make weights",
    )
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps; the learning rate ends with them")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights, the batches and augmentations")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; set OMP_NUM_THREADS to the same")
    parser.add_argument(
        "--evaluate-every", type=int, default=500, metavar="STEPS", help="measure on the test images every so often"
    )
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        default=100,
        metavar="STEPS",
        help="the same command started again goes on from the last checkpoint and ends with the same weights",
    )


def load_splits(folder: Path) -> tuple[Split, Split]:
    """The training and the test split found in a folder.

    Where the folder lacks the training files, the test images' first 8,000 train and the last 2,000 test.

    Raises:
        FileNotFoundError: the folder holds neither.
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
    return Split(torch.from_numpy(pad_to_rgb(images)), torch.from_numpy(labels).long(), sha256(path))


def batch_indices(step: int, batch: int, total: int, seed: int) -> Tensor:
    """Indices of a step's batch: epochs of whole batches, each epoch its own permutation.

    A function of the step alone, so that a resumed run sees what an undisturbed one does.
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
    """Accuracy of a majority vote among the k nearest references; float32 (N, C) and (M, C)."""
    if metric == "cosine":
        references, queries = (torch.nn.functional.normalize(x, dim=1) for x in (references, queries))
    nearest = torch.cdist(queries, references).topk(k, dim=1, largest=False).indices
    votes = torch.nn.functional.one_hot(reference_labels[nearest], int(reference_labels.max()) + 1).sum(1)
    return (votes.argmax(1) == query_labels).float().mean().item()


def mixture_purity(features: Tensor, labels: Tensor, components: int = 10) -> float:
    """Share of the samples that have the commonest label of their component of a diagonal Gaussian mixture."""
    mixture = GaussianMixture(components, covariance_type="diag", reg_covar=1e-4, n_init=3, random_state=0)
    assigned = mixture.fit_predict(features.double().numpy())
    table = np.zeros((components, int(labels.max()) + 1), np.int64)
    np.add.at(table, (assigned, labels.numpy()), 1)
    return float(table.max(1).sum() / len(assigned))


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    os.replace(partial, path)


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, object]) -> None:
    """Write safetensors, floats as float16, whole or not at all; metadata that is not a string is written as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in metadata.items()}
    halves = {name: (x.half() if x.is_floating_point() else x).contiguous() for name, x in tensors.items()}
    partial = path.with_name(path.name + ".part")
    save_file(halves, partial, {"format": "pt", **text})
    partial.chmod(0o644)
    os.replace(partial, path)


def describe_settings(options: argparse.Namespace, digest: str) -> dict[str, object]:
    """What determines the weights: the options that change them, the seed, the steps and the data's SHA-256.

    Two runs of equal descriptions are the same run, so that one may continue the other.
    """
    elsewhere = {"data", "out", "grow", "seed", "steps", "threads", "evaluate_every", "checkpoint_every"}
    settings = {name: value for name, value in vars(options).items() if name not in elsewhere}
    return {"settings": settings, "seed": options.seed, "steps": options.steps, "data_sha256": digest}


def save_checkpoint(path: Path, settings: dict[str, object], done: int, seconds: float, **parts: Stateful) -> None:
    """Write the parts' states whole or not at all, with the steps done and the seconds they took."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"settings": settings, "done": done, "seconds": seconds, "states": states}, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path, settings: dict[str, object], **parts: Stateful) -> tuple[int, float]:
    """Load the parts' states if a checkpoint is there; returns the steps done and the seconds they took.

    Raises:
        ValueError: the checkpoint is of other settings.
    """
    if not path.exists():
        return 0, 0.0
    checkpoint = torch.load(path, weights_only=True)
    if checkpoint["settings"] != settings:
        other = checkpoint["settings"]
        raise ValueError(f"{path} is of a run with other settings, {other}: finish that run, or delete the file")
    for name, part in parts.items():
        part.load_state_dict(checkpoint["states"][name])
    print(f"resumed from {path} at step {checkpoint['done']}", flush=True)
    return checkpoint["done"], checkpoint["seconds"]


class ProgressLine:
    """Prints step, measures, rate and the time left; counts the time of interrupted runs too."""

    def __init__(self, steps: int, start: int, seconds: float) -> None:
        self.steps, self.start, self.before, self.began = steps, start, seconds, time.monotonic()

    def seconds(self) -> float:
        """Seconds since the first step, those of earlier starts included."""
        return self.before + time.monotonic() - self.began

    def print(self, step: int, **measures: float) -> None:
        """Print one line; ``step`` is the number of steps done."""
        rate = (step - self.start) / (time.monotonic() - self.began)
        left = (self.steps - step) / rate
        shown = "  ".join(f"{name} {value:.4f}" for name, value in measures.items())
        print(f"step {step}/{self.steps}  {shown}  {rate:.2f} steps/s  {left / 60:.1f} min left", flush=True)
