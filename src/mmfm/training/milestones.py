"""The weights of an earlier step of a finished training."""

from pathlib import Path

import numpy as np

from mmfm.infra import store
from mmfm.models.weights import weights_metadata
from mmfm.training import checkpoint
from mmfm.training.latents import epochs_after


def publish(ema: Path, step: int, out: Path) -> None:
    """Write the EMA weights of a kept checkpoint as ``train`` would have published them at that step.

    Args:
        ema: the weights that ``train`` published, with its state directory beside them.
        step: optimiser steps taken; the last one's are the published weights themselves.

    Raises:
        FileNotFoundError: there are no published weights.
        ValueError: the training ends before that step, or its checkpoint was not kept or is damaged.
    """
    about = weights_metadata(ema)
    arrays, last = store.map_arrays(ema)[0], about["step"]
    if step > last:
        raise ValueError(
            f"'{ema.parent}' has no step {step}: its training ends at step {last}; raise train.steps or train.epochs, "
            "or name an earlier step"
        )
    if step < last:
        arrays = _kept_arrays(ema, about["digest"], step)
    steps_per_epoch = round(last / about["epochs"])
    there = {
        "step": step,
        "epochs": epochs_after(step, steps_per_epoch),
        "images_seen": about["images_seen"] // last * step,
    }
    store.write_arrays(out, arrays, {**about, **there})


def _kept_arrays(ema: Path, digest: str, step: int) -> dict[str, np.ndarray]:
    """Return the averaged weights in the checkpoint of a step, from the state in which ``ema`` was finished."""
    states = [path.parents[1] for path in ema.parent.glob(f"state-*/finished/{ema.name}") if _digest(path) == digest]
    kept = sorted({int(path.name[5:]) for state in states for path in state.glob("step-*")})
    found = [path for state in states for path in state.glob(f"step-{step:08d}")]
    if not found:
        raise ValueError(
            f"the checkpoint of step {step} in '{ema.parent}' was not kept (there are: "
            f"{', '.join(map(str, kept)) or 'none'}); add {step} to train.milestone_steps before the training passes "
            "it. To train once more, remove the state directory there and run Snakemake with -R train"
        )
    try:
        return store.map_arrays(checkpoint.read(found[0]).path / "ema.safetensors")[0]
    except ValueError as error:
        raise ValueError(f"the checkpoint '{found[0]}' is damaged ({error}); name another step") from error


def _digest(path: Path) -> str | None:
    """Return the digest that a weights file records; None if it can't be read."""
    try:
        return weights_metadata(path)["digest"]
    except (OSError, ValueError):
        return None
