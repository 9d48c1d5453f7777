"""A folder with the workflow in it, as a checkout has, and dry runs there."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from support.places import ROOT

TARGETS = [
    *(f"results/fid/dinov2_{name}.txt" for name in ("mode", "mode_ag", "class")),
    "results/gmm/dinov2/sweep.png",
    "results/reconstruction/dinov2.txt",
    *(f"results/mode_quality/dinov2_{name}.png" for name in ("mode_ag", "class_gmm")),
]
"""Targets that together need every stage."""

BASE = {
    "gpus": 0,
    "decoder": {"weights": "train"},
    "train": {
        "loss_weighting": {"rule": "sqrt"},
        "initial_phase": {"epochs": 1, "lr": 0.1, "ema_decay": 0.5},
    },
    "sample": {"solver": "dopri5"},
}
"""The decoder's keys count where it is trained, those of weights, phase and tolerances where there are any."""


def link_workflow(folder: Path, without: Iterable[str] = ()) -> Path:
    """Link the workflow's files into a folder, all but ``without``, and return the folder."""
    for name in ("Snakefile", "rules", "config", "profiles", "workflow", "envs", "resources"):
        if name not in without:
            (folder / name).symlink_to(ROOT / name)
    return folder


def dry_runs(folder: Path, calls: list[dict], source: Path = ROOT / "src") -> list:
    """Return what ``dry_runs.plan`` says of calls in a folder, with the package of ``source``."""
    line = [sys.executable, str(ROOT / "tests" / "support" / "dry_runs.py")]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    result = subprocess.run(
        line, cwd=folder, input=json.dumps(calls), capture_output=True, text=True, env=environment
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)
