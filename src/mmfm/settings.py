"""The settings that targets and commands name: where paths start, and what the model sees."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmfm.config import FIXED_SOLVERS


@dataclass(frozen=True)
class Setting:
    """What distinguishes a training setting.

    Attributes:
        mixture: the source is the spatial mixture, not N(0, I).
        condition: what the model sees: ``mode`` (the index of the source's mode), ``class`` (the image's class), or
            None (no label term at all).
    """

    mixture: bool
    condition: str | None


SETTINGS: dict[str, Setting] = {
    "uncond": Setting(mixture=False, condition=None),
    "gmm": Setting(mixture=True, condition=None),
    "mode": Setting(mixture=True, condition="mode"),
    "class": Setting(mixture=False, condition="class"),
    "class_gmm": Setting(mixture=True, condition="class"),
}


def effective(setting: str, sections: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return sections' identity keys with those that change nothing in a setting at one value, whatever is configured.

    So a key that only another setting uses, or another choice within the section, makes nothing run again.
    """
    return {name: {**keys, **_without_effect(SETTINGS[setting], name, keys)} for name, keys in sections.items()}


def _without_effect(setting: Setting, section: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    idle: dict[str, Any] = {}
    if section == "train":
        if setting.condition != "class":
            idle["label_dropout"] = 0.0
        if setting.condition != "mode":
            idle["mode_dropout"] = 0.0
        if not setting.mixture:
            idle |= {"assignment": "soft", "means_precision": "auto"}
        if keys["loss_weighting"]["rule"] == "none":
            idle["loss_weighting"] = {
                "rule": "none", "by": "mode", "decay": 0.0, "gamma": 0.0, "warmup_epochs": 0, "bounds": [1.0, 1.0],
            }  # fmt: skip
    if section == "sample":
        if setting.condition != "class":
            idle["label_draw"] = "equal"
        if not setting.mixture:
            idle["mode_draw"] = "multinomial"
        if keys["solver"] in FIXED_SOLVERS:
            idle |= {"rtol": 0.0, "atol": 0.0}
    return idle
