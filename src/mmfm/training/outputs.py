"""The outputs of a finished training run: put in place once, and found there when the run is called again."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from mmfm.infra import memory, store
from mmfm.pictures import save_picture
from mmfm.training.checkpoint import save_ema
from mmfm.training.history import DISTANCES, HISTORY, publish_history, read_history

log = logging.getLogger(__name__)

_WEIGHTS, _PREVIEW = "ema.safetensors", "preview.png"
_NAMES = (_WEIGHTS, HISTORY, "curve.png", DISTANCES, _PREVIEW)
_RECORD = "published.json"


def publish(
    out_dir: Path, state: Path, average: nn.Module, provenance: dict[str, Any], preview: Callable[..., Any] | None
) -> None:
    """Write the outputs of a finished run. The weights do not wait for a picture that may not fit into memory."""
    publish_history(state, provenance["step"], out_dir, f"train {provenance['setting']}")
    (out_dir / _PREVIEW).unlink(missing_ok=True)  # one of other weights must not lie beside these
    save_ema(out_dir / _WEIGHTS, average, provenance)
    if preview is not None:
        try:
            with memory.explained("Lower train.preview.n_images"):
                save_picture(preview(average), out_dir / _PREVIEW)
        except (ValueError, OSError, RuntimeError) as error:
            log.warning("the weights are published, but without %s: %s", _PREVIEW, error)
    files = {name: store.file_digest(out_dir / name) for name in _NAMES if (out_dir / name).is_file()}
    store.write_json(state / _RECORD, {"step": provenance["step"], "files": files})


def in_place(out_dir: Path, state: Path, step: int, preview: bool, distance: bool) -> bool:
    """Whether the outputs of a run to ``step`` lie there as they were published; they get a new time of change.

    Snakemake takes results older than their inputs for outdated.

    Args:
        preview: whether the picture must be among them.
        distance: whether ``step`` must have been measured.
    """
    try:
        record = store.read_json(state / _RECORD)
        files = record["files"] if record["step"] == step else {}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    measured = not distance or any(line["step"] == step for line in read_history(state / DISTANCES))
    if not files or not measured or (preview and _PREVIEW not in files):
        return False
    if any(not (out_dir / n).is_file() or store.file_digest(out_dir / n) != d for n, d in files.items()):
        return False
    for name in files:
        os.utime(out_dir / name)
    return True
