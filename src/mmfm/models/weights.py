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
    """Write EMA weights as safetensors, with sizes and provenance as JSON metadata.

    Args:
        model: the averaged model.
        metadata: provenance; ``model`` (the sizes) and ``digest`` are added.

    Returns:
        the digest of the weights.
    """
    arrays = {name: tensor.detach().cpu().float().numpy() for name, tensor in model.state_dict().items()}
    return store.write_arrays(path, arrays, {**metadata, "model": asdict(model.config)})


def weights_metadata(path: str | Path) -> dict[str, Any]:
    """Read the metadata of a weights file; errors as for :func:`load_ema`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at '{path}'; run train, or import the published ones")
    metadata = store.map_arrays(path)[1]
    if not {"model", "digest"} <= set(metadata):
        raise ValueError(f"'{path}' has no metadata of a DiT; run train again, or import the published weights")
    return metadata


def load_ema(path: str | Path, device: torch.device | str = "cpu") -> tuple[DiT, dict[str, Any]]:
    """Load weights written by :func:`save_ema`.

    Returns:
        the model (evaluation mode, float32, no gradients) and its metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, was not written by `save_ema`, or its tensors don't match its metadata.
    """
    metadata = weights_metadata(path)
    arrays, _ = store.map_arrays(path)
    try:
        with torch.device("meta"):
            model = DiT(DiTConfig(**metadata["model"]))
        model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, assign=True)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"the tensors in '{path}' don't match its metadata ({error}); run train again") from error
    return model.to(device).eval().requires_grad_(False), metadata
