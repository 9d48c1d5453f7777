"""Loggers that show a run as it trains: TensorBoard, or Weights and Biases.

Loggers hold no state. When a run resumes, their files are written again from the history, so that no step appears
twice; a Weights and Biases server is sent only the steps that it lacks.

A line is a dictionary with ``step`` and its values: numbers, or the path of a picture. A name without a slash is shown
as ``train/NAME``.
"""

import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mmfm.config.choices import LOGGERS
from mmfm.infra import store

log = logging.getLogger(__name__)

_FINISH_SECONDS = 60


class Logger(Protocol):
    """Shows the lines of a history as they are written."""

    def write(self, line: dict[str, Any]) -> None:
        """Show one line at its ``step``."""

    def close(self) -> None:
        """Finish; no line follows."""


class NoLogger:
    """Shows nothing."""

    def __init__(self, state: Path | None = None, lines: list[dict[str, Any]] | None = None) -> None:
        pass

    def write(self, line: dict[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TensorBoard:
    """Writes event files to ``tensorboard/`` in the run's state, for ``tensorboard --logdir``.

    Args:
        lines: the history so far, written again in place of older files.
    """

    def __init__(self, state: Path, lines: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = state / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        for line in lines:
            self._add(line)

    def write(self, line: dict[str, Any]) -> None:
        """Write one line and flush the file."""
        self._add(line)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _add(self, line: dict[str, Any]) -> None:
        for name, value in _named(line).items():
            if isinstance(value, Path):
                with Image.open(value) as picture:
                    self._writer.add_image(name, np.asarray(picture.convert("RGB")), line["step"], dataformats="HWC")
            else:
                self._writer.add_scalar(name, value, line["step"])


class Wandb:
    """Sends a run to Weights and Biases: one run there per state directory, however often it is resumed.

    Without network or a valid key the run is recorded offline in ``folder/wandb``, for ``wandb sync``. A recording
    holds the whole history and replaces those of earlier, interrupted runs.

    Each kind of line has a step axis of its own: wandb's own step must increase, and a late line, such as a distance
    measured after a kill, would be dropped.

    Args:
        folder: the run's state.
        lines: the history so far; lines that the server already has are not sent again.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, folder: Path, lines: list[dict[str, Any]]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "train.logger is wandb, which is not installed: pip install 'wandb>=0.31,<1', or set another logger"
            ) from error
        self._wandb = wandb
        earlier = list(folder.glob("wandb/offline-run-*"))
        self._run = self._online(folder) or self._start(folder)
        for recording in [] if self._run.disabled else earlier:
            shutil.rmtree(recording, ignore_errors=True)
        for metric in ("train/*", "preview/fid", "preview/images"):
            self._run.define_metric(metric, step_metric=_axis(metric))
        self._seen = {name: value for name, value in dict(self._run.summary).items() if name.endswith("/step")}
        for line in lines:
            self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        """Send or record one line, unless the server already has it."""
        values = _named(line)
        axis = _axis(next(iter(values)))
        if line["step"] > self._seen.get(axis, -1):
            shown = {n: self._wandb.Image(str(v)) if isinstance(v, Path) else v for n, v in values.items()}
            self._run.log({axis: line["step"], **shown})

    def close(self) -> None:
        """Finish the run. Without network this gives up after a minute and leaves the rest to ``wandb sync``."""
        self._run.finish()

    def _online(self, folder: Path) -> Any:
        """Return an online run, or None if WANDB_MODE is not ``online``; warn and return an offline run on failure."""
        if os.environ.get("WANDB_MODE", "online") != "online":
            return None
        try:
            # Do not prompt for a key: nobody may be at the terminal.
            if self._wandb.login(prompt=False, verify=True):
                return self._start(folder, mode="online", resume="allow")
            problem = "no API key (wandb login)"
        except self._wandb.Error as error:
            problem = " ".join(str(error).split())
        log.warning("wandb records offline, in %s (wandb sync sends it): %s", folder / "wandb", problem)
        return self._start(folder, mode="offline")

    def _start(self, folder: Path, **options: Any) -> Any:
        return self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mmfm"),
            name=folder.parent.name,
            id=_run_id(folder),
            dir=str(folder),
            settings={"finish_timeout": _FINISH_SECONDS},
            **options,
        )


def _run_id(folder: Path) -> str:
    """Return the id of a state's run. A state that is made again gets another id."""
    path = folder / "wandb" / "id"
    if not path.is_file():
        with store.whole_file(path) as partial:
            partial.write_text(f"{folder.name}-{secrets.token_hex(4)}")
    return path.read_text()


def _named(line: dict[str, Any]) -> dict[str, Any]:
    return {name if "/" in name else f"train/{name}": value for name, value in line.items() if name != "step"}


def _axis(name: str) -> str:
    """Return the name of a value's step axis."""
    return "train/step" if name.startswith("train/") else f"{name}/step"


def open_logger(logger: str, state: Path, lines: list[dict[str, Any]]) -> Logger:
    """Open the logger of a run.

    Args:
        logger: name in :data:`mmfm.config.choices.LOGGERS`.
        state: directory of the run.
        lines: the history so far.

    Raises:
        ValueError: the name is unknown, or its package is not installed.
    """
    return LOGGERS[logger].load()(state, lines)
