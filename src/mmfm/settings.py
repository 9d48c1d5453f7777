"""The settings that targets and commands name: where paths start, and what the model sees."""

from dataclasses import dataclass


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
