"""The published EMA weights of a DiTDH."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfm.infra import store
from mmfm.models.dit import DiT, DiTConfig


def save_ema(path: str | Path, model: DiT, metadata: Mapping[str, Any]) -> str:
    """Publish EMA weights: safetensors in the published names, sizes and provenance as JSON metadata.

    Args:
        model: the averaged model.
        metadata: provenance; ``model`` (the sizes) and ``digest`` are added.

    Returns:
        The digest of the weights.
    """
    arrays = {name: tensor.detach().cpu().float().numpy() for name, tensor in model.state_dict().items()}
    return store.write_arrays(path, arrays, {**metadata, "model": asdict(model.config)})


def weights_metadata(path: str | Path) -> dict[str, Any]:
    """Read what weights say of themselves; see :func:`load_ema` for errors."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at '{path}'; run train, or import the published ones")
    metadata = store.map_arrays(path)[1]
    if not {"model", "digest"} <= set(metadata):
        raise ValueError(f"'{path}' holds no DiT that fits its own metadata (it has none); make it again")
    return metadata


def load_ema(path: str | Path, device: torch.device | str = "cpu") -> tuple[DiT, dict[str, Any]]:
    """Read what :func:`save_ema` wrote: the model in evaluation mode, float32, without gradients, and its metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, no file of ours, or its tensors do not fit its own sizes.
    """
    metadata = weights_metadata(path)
    arrays, _ = store.map_arrays(path)
    try:
        with torch.device("meta"):
            model = DiT(DiTConfig(**metadata["model"]))
        model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, assign=True)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"'{path}' holds no DiT that fits its own metadata ({error}); make it again") from error
    return model.to(device).eval().requires_grad_(False), metadata
