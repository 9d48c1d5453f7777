"""What to do about a result that is not there: the command that makes it, or what is wrong with its name.

Nothing here imports PyTorch.
"""

import contextlib
import itertools
import re
import shlex
from collections.abc import Sequence
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
    root, below = _parted(path)
    file = shlex.quote(str(Path(root, *below, _contents(below))))
    command = f"snakemake {file} --cores all{f' -R {rerun}' if rerun else ''}"
    if run := "/".join(itertools.takewhile(lambda part: part not in _FOLDERS, below[:-1])):
        return f"{command} --configfile YAML, the file with `run: {run}`"
    return command


def _parted(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the path to give for the folder of the results, and the parts below it; none without such a folder."""
    parts = path.absolute().parts
    start = max((i for i, part in enumerate(parts) if part == "results"), default=0)
    return (Path("results"), parts[start + 1 :]) if start else (path.absolute(), ())


def _contents(below: Sequence[str]) -> str:
    """Return the file that a folder of samples or of trained weights is opened for; empty for other paths."""
    return _CONTENTS.get(below[-3], "") if len(below) > 2 and below[-2] not in _FOLDERS else ""


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
                return f"{error}, in the configuration of the last run"
        elif not re.fullmatch(rf".+_{targets.any_of(SETTINGS)}(_ag)?(\..+)?\.(txt|json)", path.name):
            return f"results are {path.parent}/ENCODER_SETTING.txt, with a setting of {', '.join(SETTINGS)}"
    elif not path.suffix and not _contents(_parted(path)[1]):
        return "give results/fid/NAME.txt, or a folder of a training or of samples"
    return f"make it: {snakemake_command(path)}"
