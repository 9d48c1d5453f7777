"""Where the stages' outputs lie below a results folder."""

import re
from pathlib import Path

OUTPUTS = {
    "list_images": "list_images/listing.train.safetensors",
    "extract": "cls_tokens/{encoder}/cls_tokens.zarr",
    "latent_stats": "latent_stats/{encoder}/stats.pt",
    "fit_gmm": "gmm/{encoder}/k{k}/gmm.safetensors",
    "spatial_gmm": "spatial_gmm/{encoder}/k{k}/spatial_gmm.zarr",
    "train_decoder": "decoder/{encoder}/history.jsonl",
    "train": "train/{trained}/{training}/ema.safetensors",
    "sample": "sample/{sampled}/{variant}/images.npz",
    "fid_reference": "fid_reference/**/reference.safetensors",
    "fid": "fid/{sampled}.{variant}.json",
    "reconstruction": "reconstruction/{encoder}.json",
    "mode_quality": "mode_quality/{sampled}.{variant}.json",
    "sweep": "gmm/{encoder}/sweep.json",
}
"""An output of every stage that is there if and only if the stage is finished.

``trained`` and ``sampled`` are encoder and setting, the latter with ``_ag``. A given decoder has no history.
"""

_BESIDES = re.compile(r"given|.*\.step\d+$|finished$")
"""Folders of files that no stage makes: weights that were given or copied from a checkpoint, and those in the state."""


def find(stage: str, results: Path, **names: object) -> list[Path]:
    """Return the outputs of a stage that are there, sorted.

    Args:
        names: values in :data:`OUTPUTS`; those left out can be anything.
    """
    values = {name: names.get(name, "*") for name in re.findall(r"{(\w+)}", OUTPUTS[stage])}
    found = sorted(results.glob(OUTPUTS[stage].format(**values)))
    return [path for path in found if not _BESIDES.match(path.parent.name)]


def job_name(stage: str, output: Path, results: Path) -> str:
    """Return the name of the log of the job that makes an output, without ending."""
    folders = output.relative_to(results).parts[1:-1]
    return ".".join([stage, *([output.stem] if stage in ("fid", "reconstruction", "mode_quality") else folders)])
