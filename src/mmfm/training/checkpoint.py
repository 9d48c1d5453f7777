"""Atomic checkpoints of a training run.

A checkpoint is a directory ``step-00000500/`` with one file per part and a ``manifest.json`` with the run, the step
and the SHA-256 of every file. It is written under a temporary name and renamed.
"""

import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmfm.infra import disk, store

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose digests were verified.

    Attributes:
        path: its directory.
        step: optimiser steps taken.
        values: the run's small state, JSON values.
    """

    path: Path
    step: int
    values: dict[str, Any]

    def tensors(self, part: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Load a state dict: ``model`` or ``ema``."""
        return load_file(self.path / f"{part}.safetensors", device=str(device))

    def optimizer(self) -> dict[str, Any]:
        """Memory-map the optimiser's state dict: eight processes with 7 GB each would not fit on many nodes."""
        return torch.load(self.path / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)


def save(
    state: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    optimizer: Mapping[str, Any],
    values: Mapping[str, Any],
    *,
    milestone: bool,
    keep: int,
) -> Path:
    """Write the checkpoint of ``step`` to ``state``, then remove old ones.

    Args:
        tensors: state dicts by part.
        optimizer: the optimiser's state dict.
        values: JSON-serialisable state.
        milestone: keep this checkpoint for good, because a run ends or may end here.
        keep: how many of the newest other checkpoints to keep.

    Returns:
        The checkpoint's directory.
    """
    final = state / f"step-{step:08d}"
    partial = state / f".partial-{os.getpid()}-{final.name}"
    _remove_leftovers(state)  # makes room first
    partial.mkdir(parents=True)
    for part, tensor in tensors.items():
        with store.whole_file(partial / f"{part}.safetensors") as file:
            save_file({name: t.detach().contiguous() for name, t in tensor.items()}, file)
    with store.whole_file(partial / "optimizer.pt") as file:
        torch.save(optimizer, file)
    digests = {file.name: store.file_digest(file) for file in sorted(partial.iterdir())}
    manifest = {"run": state.name, "step": step, "milestone": milestone, "values": dict(values), "files": digests}
    store.write_json(partial / "manifest.json", manifest)
    store.publish_directory(partial, final)
    _prune(state, keep, step)
    return final


def _prune(state: Path, keep: int, saved: int) -> None:
    """Remove broken checkpoints, and all but the milestones and the newest ``keep`` others up to step ``saved``.

    Checkpoints of later steps do not count: they could not be read when this run started.
    """
    found = {path: _is_milestone(path) for step, path in _candidates(state) if step <= saved}
    ordinary = [path for path, milestone in found.items() if milestone is False]
    broken = [path for path, milestone in found.items() if milestone is None]
    for path in ordinary[keep:] + broken:
        _set_aside(path)
    _remove_leftovers(state)


def _is_milestone(path: Path) -> bool | None:
    """Whether a checkpoint is kept for good; None if its manifest is broken."""
    try:
        return bool(store.read_json(path / "manifest.json")["milestone"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def replaceable(state: Path) -> int:
    """Return the bytes that later checkpoints will free: those of leftovers and of all checkpoints but milestones."""
    pruned = [path for _, path in _candidates(state) if not _is_milestone(path)]
    return sum(map(disk.used, [*pruned, *_leftovers(state)]))


def _set_aside(path: Path) -> None:
    """Rename a checkpoint before it is removed, so that a kill in between leaves no damaged one under its name."""
    doomed = path.with_name(f".partial-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)


def _leftovers(state: Path) -> list[Path]:
    """Return unfinished and renamed checkpoints; ``.step-*.old`` comes from a kill in ``publish_directory``."""
    return [*state.glob(".partial-*"), *state.glob(".step-*.old")]


def _remove_leftovers(state: Path) -> None:
    for left in _leftovers(state):
        shutil.rmtree(left, ignore_errors=True)


def _candidates(state: Path) -> list[tuple[int, Path]]:
    """Return step and path of every directory named like a checkpoint, newest first."""
    named = [(_NAME.fullmatch(path.name), path) for path in state.iterdir() if path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)


def read(path: Path) -> Checkpoint:
    """Open a checkpoint and verify every file.

    Raises:
        ValueError: a file is missing or was changed, or the checkpoint belongs to another run.
    """
    if not (path / "manifest.json").is_file():
        raise ValueError("it has no manifest.json")
    manifest = store.read_json(path / "manifest.json")
    try:
        run, step, files = manifest["run"], manifest["step"], manifest["files"]
        found = Checkpoint(path, step, manifest["values"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"its manifest lacks {error}") from error
    if run != path.parent.name or path.name != f"step-{step:08d}":
        raise ValueError(f"it belongs to step {step} of {run}")
    for name, digest in files.items():
        if not (path / name).is_file() or store.file_digest(path / name) != digest:
            raise ValueError(f"{name} is missing, truncated or changed")
    return found


def find(state: Path, target: int) -> Checkpoint | None:
    """Find the checkpoint from which a run to step ``target`` continues: that of this step, or else the newest.

    Damaged checkpoints are skipped with a warning. The next :func:`save` removes them, so that they do not count
    towards the number to keep.

    Returns:
        None if there is none.

    Raises:
        ValueError: training is already past ``target`` and no checkpoint of that step was kept.
    """
    for _, path in sorted(_candidates(state), key=lambda candidate: (candidate[0] != target, -candidate[0])):
        try:
            found = read(path)
        except (ValueError, OSError) as error:
            log.warning("skipping checkpoint %s: %s", path, error)
            if isinstance(error, ValueError):  # an OSError may be temporary
                _set_aside(path)
            continue
        if found.step > target:
            kept = ", ".join(str(step) for step, _ in reversed(_candidates(state)))
            raise ValueError(
                f"training in {state} is already at step {found.step}, and step {target} was not kept (there are: "
                f"{kept}); train to one of these or further, or remove the directory to start over"
            )
        return found
    return None
