"""Sections of image generation: sampling and guidance."""

# ruff: noqa: RUF009 - `nested` returns a field

from dataclasses import dataclass, replace
from typing import Any

from mmfm.config import choices
from mmfm.config.keys import budget, key, nested, operation, times


@dataclass(frozen=True)
class Guidance:
    """Guidance during sampling: classifier-free, or autoguidance if there is a guide."""

    scale: float = key("guidance scale; 1 for none (targets with `_ag` take `guide.scale`)", minimum=0)
    interval: tuple[float, float] = key("lowest and highest time at which guidance applies")

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
        times(self.interval, where)


@dataclass(frozen=True)
class Sample:
    """Generation of images."""

    n_images: int = key("images to generate", unit="images", minimum=1)
    time_points: int = key("points of the time grid, one more than steps; 1 decodes the source itself", minimum=1)
    solver: str = key(
        "ODE solver; those from `dopri5` on are adaptive and use only the first and the last time point",
        choices=choices.SOLVERS,
    )
    precision: str = key(
        "`auto`: bf16 autocast on a GPU, float32 on a CPU; `reference`: bf16 autocast for the decoder too, and noise, "
        "source, state, time and guidance in bf16, as published",
        choices=choices.SAMPLING_PRECISIONS,
    )
    shard_size: int = key("images per shard, the unit of resumption", unit="images", minimum=1)
    batch_size: int = operation("images per model call", unit="images", minimum=1)
    guidance: Guidance = nested()
    rtol: float = key("relative tolerance of the adaptive solvers", minimum=0)
    atol: float = key("absolute tolerance of the adaptive solvers", minimum=0)
    mode_draw: str = key("how modes are drawn from the mixture's weights", choices=choices.MODE_DRAWS)
    label_draw: str = key("class labels: equally often each, or drawn at random", choices=choices.LABEL_DRAWS)
    features: bool = operation("also write the features of `fid.detector`, which `fid` then uses")
    means_device: str = operation("as `train.means_device`", choices=choices.MEANS_DEVICES)
    compile: bool = operation("as `train.compile`", as_before=False)

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
        if not choices.SOLVERS[self.solver].adaptive:
            return
        if self.precision == "reference":
            raise ValueError(f"'{where}.precision' reference has bf16 times, too coarse for {self.solver}; use euler")
        if self.rtol + self.atol <= 0:
            raise ValueError(f"'{where}.rtol' and '{where}.atol' are both 0; {self.solver} needs a positive one")

    def effective(self, setting: choices.Setting) -> "Sample":
        """Return the section with every key that the setting ignores at a fixed value."""
        idle: dict[str, Any] = {}
        if setting.condition != "class":
            idle["label_draw"] = "equal"
        if not setting.mixture:
            idle["mode_draw"] = "multinomial"
        if not choices.SOLVERS[self.solver].adaptive:
            idle |= {"rtol": 0.0, "atol": 0.0}
        return replace(self, **idle)


@dataclass(frozen=True)
class Guide:
    """The weaker model of autoguidance, for targets with `_ag` only."""

    weights: str = key(
        "`train`; or `published`, or a weights file of yours, in which `{encoder}` and `{setting}` stand for the names",
        path=True,
    )
    model: str = key("name of an entry of `models`")
    epochs: int = budget("passes over the training images", unit="epochs", minimum=1)
    scale: float = key("guidance scale: v_guide + scale (v - v_guide)", minimum=0)
    interval: tuple[float, float] = key("lowest and highest time at which guidance applies")
    steps: int = budget(
        "optimiser steps, instead of `epochs`; 0: `epochs` counts", unit="steps", minimum=0, as_before=0
    )

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
        times(self.interval, where)
