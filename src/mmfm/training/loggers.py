"""Where a run can be watched besides its history: TensorBoard, or Weights and Biases.

Nothing here is state. What a logger keeps in files is made again from the history when a run goes on, so that no step
appears twice; a server of Weights and Biases is told what it has not seen.

A line is a dictionary of ``step`` and what belongs to it: numbers, or the path of a picture. A name without a slash is
shown below ``train/``.
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
    """Takes the lines of a history as they are made."""

    def write(self, line: dict[str, Any]) -> None:
        """Show one line; ``step`` is its place."""

    def close(self) -> None:
        """Finish."""


class NoLogger:
    """Shows nothing."""

    def __init__(self, state: Path | None = None, lines: list[dict[str, Any]] | None = None) -> None:
        pass

    def write(self, line: dict[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TensorBoard:
    """Event files in ``tensorboard/`` of a run's state, for ``tensorboard --logdir``.

    Args:
        lines: what the history holds already; written again in place of older files.
    """

    def __init__(self, state: Path, lines: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = state / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        for line in lines:
            self._add(line)

    def write(self, line: dict[str, Any]) -> None:
        """Write one line through to the file."""
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
    """A run of Weights and Biases, one for a state directory however often it is resumed.

    Where nothing can be sent (no network, no key, a wrong one) it is recorded offline, in ``folder/wandb``, for
    ``wandb sync``. A recording has the whole history, and takes the place of those of earlier, interrupted runs.

    The steps are an axis of their own, one for each kind of line: the steps that wandb counts by itself must rise, and
    a line that comes late, as a distance after a kill, would be dropped.

    Args:
        lines: what the history holds already; what the server has of it is not sent again.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, folder: Path, lines: list[dict[str, Any]]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "train.logger is wandb, which is not installed: pip install 'wandb>=0.31,<1', or take another"
            ) from error
        self._wandb = wandb
        earlier = list(folder.glob("wandb/offline-run-*"))
        self._run = self._online(folder) or self._start(folder)
        for left in [] if self._run.disabled else earlier:
            shutil.rmtree(left, ignore_errors=True)
        for metric in ("train/*", "preview/fid", "preview/images"):
            self._run.define_metric(metric, step_metric=_axis(metric))
        self._seen = {name: value for name, value in dict(self._run.summary).items() if name.endswith("/step")}
        for line in lines:
            self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        """Send or record one line, unless the server has it."""
        values = _named(line)
        axis = _axis(next(iter(values)))
        if line["step"] > self._seen.get(axis, -1):
            shown = {n: self._wandb.Image(str(v)) if isinstance(v, Path) else v for n, v in values.items()}
            self._run.log({axis: line["step"], **shown})

    def close(self) -> None:
        """Finish the run; where the network is gone, that is given up after a minute and left to ``wandb sync``."""
        self._run.finish()

    def _online(self, folder: Path) -> Any:
        """Return a run that is sent, or None where WANDB_MODE is another, or with a warning if that can't be."""
        if os.environ.get("WANDB_MODE", "online") != "online":
            return None
        try:
            # Without the question for a key on a terminal, which nobody may be there to answer.
            if self._wandb.login(prompt=False, verify=True):
                return self._start(folder, mode="online", resume="allow")
            problem = "no API key (wandb login)"
        except self._wandb.Error as error:
            problem = " ".join(str(error).split())
        log.warning("wandb records offline, in %s (wandb sync sends it): %s", folder / "wandb", problem)
        return self._start(folder, mode="offline")

    def _start(self, folder: Path, **options: Any) -> Any:
        return self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mmfm"), name=folder.parent.name, id=_run_id(folder),
            dir=str(folder), settings={"finish_timeout": _FINISH_SECONDS}, **options,
        )  # fmt: skip


def _run_id(folder: Path) -> str:
    """Return the id of a state's run, made once: training the same anew is another run."""
    path = folder / "wandb" / "id"
    if not path.is_file():
        with store.whole_file(path) as partial:
            partial.write_text(f"{folder.name}-{secrets.token_hex(4)}")
    return path.read_text()


def _named(line: dict[str, Any]) -> dict[str, Any]:
    return {name if "/" in name else f"train/{name}": value for name, value in line.items() if name != "step"}


def _axis(name: str) -> str:
    """Return the axis of the steps of what has this name."""
    return "train/step" if name.startswith("train/") else f"{name}/step"


def open_logger(logger: str, state: Path, lines: list[dict[str, Any]]) -> Logger:
    """Open the logger of a run whose checkpoints lie in ``state``.

    Args:
        logger: name in :data:`mmfm.config.choices.LOGGERS`.
        lines: of the history so far.

    Raises:
        ValueError: an unknown name, or a package that is not installed.
    """
    return LOGGERS[logger].load()(state, lines)
