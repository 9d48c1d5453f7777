"""What to do about a result that is not there: the command that makes it, or what is wrong with its name.

Nothing here imports PyTorch.
"""

import contextlib
import re
from pathlib import Path

from mmfm.config.choices import SETTINGS
from mmfm.workflow import last_run, outputs, targets

_FOLDERS = {
    *(template.partition("/")[0] for template in outputs.OUTPUTS.values()),
    *targets.ENDINGS,
    "processor",
}
"""Folders of a run's files; another one in ``results`` is a run's own."""

_CONTENTS = {"sample": "images.npz", "train": "ema.safetensors"}
"""What the folders STAGE/NAME/VARIANT are opened for; Snakemake makes files."""


def snakemake_command(path: Path, rerun: str = "") -> str:
    """Return the command that makes a file; Snakemake expects its path from the folder that holds ``results``.

    Which file configures a run is recorded nowhere, so the user has to put it in.

    Args:
        path: the file, or a folder of samples or of trained weights.
        rerun: rule to run again.
    """
    parts = path.absolute().parts
    start = max((i for i, part in enumerate(parts) if part == "results"), default=0)
    below = parts[start + 1 :] if start else ()
    file = _CONTENTS.get(path.absolute().parent.parent.name, "")
    command = f"snakemake {Path(*parts[start:], file)} --cores all{f' -R {rerun}' if rerun else ''}"
    if len(below) > 1 and below[0] not in _FOLDERS:
        return f"{command} --configfile YAML, the file with `run: {below[0]}`"
    return command


def advice(path: Path) -> str:
    """Return what to do about a missing target: ``make it: COMMAND``, or why there can't be such a one."""
    if path.parent.name == "fid":
        recorded = None
        with contextlib.suppress(ValueError):  # a damaged record says nothing of names
            recorded = last_run.configuration(path.parents[1])
        if recorded is not None:
            try:
                targets.parse_targets(path.name, recorded)
            except ValueError as error:
                return str(error)
        elif not re.fullmatch(rf".+_{targets.any_of(SETTINGS)}(_ag)?(\..+)?\.(txt|json)", path.name):
            return f"results are {path.parent}/ENCODER_SETTING.txt, with a setting of {', '.join(SETTINGS)}"
    elif not path.suffix and path.absolute().parent.parent.name not in _CONTENTS:
        return "give results/fid/NAME.txt, or a folder of a training or of samples"
    return f"make it: {snakemake_command(path)}"
