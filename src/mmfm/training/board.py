"""Where a run can be watched besides its history: TensorBoard, or Weights and Biases.

Nothing here is state. TensorBoard's files are made again from the history when a run goes on, so that no step appears
twice; Weights and Biases passes over steps that it has seen.
"""

import logging
import os
import shutil
import socket
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)

LOGGERS = ("tensorboard", "wandb", "none")
_WANDB_HOST = ("api.wandb.ai", 443)


class Board(Protocol):
    """Takes the lines of a history as they are made."""

    def write(self, line: dict[str, Any]) -> None:
        """Show one line; ``step`` is its place."""

    def close(self) -> None:
        """Finish."""


class NoBoard:
    """Shows nothing."""

    def write(self, line: dict[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TensorBoard:
    """Event files in ``folder``, for ``tensorboard --logdir``.

    Args:
        lines: what the history holds already; written again in place of older files.
    """

    def __init__(self, folder: Path, lines: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

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
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(name if "/" in name else f"train/{name}", value, line["step"])


class Wandb:
    """A run of Weights and Biases, one for a state directory however often it is resumed.

    Without a network it is recorded offline, in ``folder/wandb``, for ``wandb sync``.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "train.logger is wandb, which is not installed: pip install wandb, or take tensorboard or none"
            ) from error
        mode = os.environ.get("WANDB_MODE")
        if mode is None and not _reachable(_WANDB_HOST):
            log.warning("no network to %s: wandb records offline, in %s (wandb sync sends it)", _WANDB_HOST[0], folder)
            mode = "offline"
        self._run = wandb.init(project="mmfm", name=stage, id=folder.name, dir=str(folder), resume="allow", mode=mode)

    def write(self, line: dict[str, Any]) -> None:
        """Send or record one line."""
        self._run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _reachable(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=3).close()
    except OSError:
        return False
    return True


def open_board(logger: str, state: Path, stage: str, lines: list[dict[str, Any]]) -> Board:
    """Open the board of a run whose checkpoints lie in ``state``.

    Args:
        logger: name in :data:`LOGGERS`.
        stage: name of the run.
        lines: of the history so far.

    Raises:
        ValueError: an unknown name, or a package that is not installed.
    """
    if logger == "tensorboard":
        return TensorBoard(state / "tensorboard", lines)
    if logger == "wandb":
        return Wandb(state, stage)
    if logger == "none":
        return NoBoard()
    raise ValueError(f"unknown logger '{logger}'; it must be one of {', '.join(LOGGERS)}")
