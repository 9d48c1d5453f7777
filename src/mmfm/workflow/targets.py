"""Targets: what their names say, and what they leave to the configuration."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mmfm import config
from mmfm.config.choices import SETTINGS

_GUIDANCE = r"\.g\d+(\.\d+)?"


@dataclass(frozen=True)
class Variant:
    """The values that a target's name may carry: ``dinov2_mode.seed1.tiny.k512.t10`` or ``dinov2_mode_ag.t10.g1.5``.

    Attributes:
        seed: of training and sampling.
        model: entry of `models`.
        k: number of modes; None for settings without a mixture.
        t: time points of the solver; None where sampling is not concerned.
        g: guidance scale; None without guidance.
    """

    seed: int
    model: str
    k: int | None
    t: int | None
    g: float | None = None

    def __str__(self) -> str:
        parts = [f"seed{self.seed}", self.model]
        if self.k is not None:
            parts.append(f"k{self.k}")
        if self.t is not None:
            parts.append(f"t{self.t}")
        if self.g is not None:
            parts.append(f"g{_decimal(self.g)}")
        return ".".join(parts)


def _decimal(value: float) -> str:
    """Write a scale without exponent or needless zeros: 1.5, 2, 0.00001."""
    text = f"{value:.6f}".rstrip("0").rstrip(".")
    return text or "0"


def has_null_label(setting: str, settings: config.Config) -> bool:
    """Whether a setting's model can do without a label, so that classifier-free guidance is possible."""
    dropout = {"class": settings.train.label_dropout, "mode": settings.train.mode_dropout, None: 0.0}
    return dropout[SETTINGS[setting].condition] > 0


def any_of(names: Iterable[str]) -> str:
    """Return the regular expression of any of the names."""
    return f"({'|'.join(map(re.escape, names))})"


def variant_pattern(models: Iterable[str]) -> str:
    """Return the regular expression of any variant, the empty one included, each part led by a dot."""
    return rf"(\.seed\d+)?(\.{any_of(models)})?(\.k\d+)?(\.t\d+)?({_GUIDANCE})?"


def complete_pattern(settings: config.Config) -> str:
    """Return the regular expression of ``SETTING[_ag].VARIANT`` whose variant leaves nothing to the configuration."""
    whole = []
    for name, setting in SETTINGS.items():
        modes = r"\.k\d+" if setting.mixture else ""
        for guide in ("", "_ag"):
            scale = _GUIDANCE if guide or has_null_label(name, settings) else ""
            whole.append(rf"{name}{guide}\.seed\d+\.{any_of(settings.models)}{modes}\.t\d+{scale}")
    return f"({'|'.join(whole)})"


def parse_variant(text: str, setting: str, settings: config.Config, guided: bool = False) -> Variant:
    """Complete a variant such as ``.k512.t10`` with the configured values.

    Args:
        guided: whether the target is one of autoguidance (``_ag``).

    Raises:
        ValueError: it names a number of modes for a setting without a mixture, or a guidance scale where there is no
            guidance.
    """
    match = re.fullmatch(variant_pattern(settings.models), text)
    if match is None:
        raise ValueError(f"'{text}' is no variant such as .seed1.{settings.train.model}.k512.t10.g1.5")
    seed, model, k, t, g = (match.group(i) for i in (1, 3, 4, 5, 6))
    has_mixture, has_scale = SETTINGS[setting].mixture, guided or has_null_label(setting, settings)
    if k and not has_mixture:
        raise ValueError(f"the setting '{setting}' has no mixture, so '{k}' means nothing; leave it out")
    if g and not has_scale:
        raise ValueError(
            f"the setting '{setting}' is trained without label dropout, so '{g}' can't be a scale of classifier-free "
            f"guidance; leave it out, or take '{setting}_ag' for autoguidance"
        )
    scale = settings.guide.scale if guided else settings.sample.guidance.scale
    return Variant(
        seed=int(seed[5:]) if seed else settings.train.seed,
        model=model or settings.train.model,
        k=(int(k[2:]) if k else settings.gmm.n_components) if has_mixture else None,
        t=int(t[2:]) if t else settings.sample.time_points,
        g=(float(g[2:]) if g else scale) if has_scale else None,
    )


def guidance_of(scale: float | None, guided: bool, settings: config.Config) -> config.Guidance:
    """Return the section ``sample.guidance`` of a job.

    Args:
        scale: that of the target's name; None without guidance.
        guided: whether it is autoguidance.
    """
    if scale is None:
        return config.Guidance(1.0, (0.0, 1.0))
    return config.Guidance(scale, settings.guide.interval if guided else settings.sample.guidance.interval)
