"""The part of the configuration that one stage reads."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from mmfm.config import reading, sampling, sections, training
from mmfm.config.choices import SETTINGS, did_you_mean
from mmfm.config.keys import keys_of_kind
from mmfm.config.registry import STAGES
from mmfm.config.whole import Config

_UNREAD: Any = None


@dataclass(frozen=True)
class StageConfig:
    """The sections that a stage reads, built and checked; all others are None.

    Attributes:
        stage: name in :data:`mmfm.config.registry.STAGES`.
        setting: name in :data:`mmfm.config.choices.SETTINGS`; None for stages without one.
    """

    stage: str
    setting: str | None = None
    data: sections.Data = _UNREAD
    image: sections.Image = _UNREAD
    encoder: sections.Encoder = _UNREAD
    latents: sections.Latents = _UNREAD
    extract: sections.Extract = _UNREAD
    latent_stats: sections.LatentStats = _UNREAD
    gmm: sections.Gmm = _UNREAD
    spatial_gmm: sections.SpatialGmm = _UNREAD
    decoder: sections.Decoder = _UNREAD
    model: training.Model = _UNREAD
    train: training.Train = _UNREAD
    sample: sampling.Sample = _UNREAD
    fid: sections.Fid = _UNREAD
    sweep: sections.Sweep = _UNREAD

    @classmethod
    def of(
        cls,
        config: Config,
        stage: str,
        *,
        encoder: str = "",
        model: str = "",
        setting: str | None = None,
        guide: bool = False,
    ) -> "StageConfig":
        """Take a stage's sections from the whole configuration; `train` with the recipe of the setting and model.

        Args:
            encoder, model: entries of ``encoders`` and ``models``; an empty model means ``train.model``.
            guide: whether a guide is trained, which has its own budget.
        """
        read = {name: config.section(name, encoder, model) for name in STAGES[stage].sections}
        if "train" in read and setting:
            config.check_training(setting, model, guide=guide)
            read["train"] = config.train_of(setting, model, guide=guide)
        return cls(stage, setting, **read)

    @classmethod
    def build(cls, stage: str, values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> "StageConfig":
        """Build a stage's sections from plain values, such as a rule's parameter, with overrides for single keys.

        Raises:
            ValueError: the stage does not read a section; also see :func:`mmfm.config.reading.build`.
        """
        names = STAGES[stage].sections
        for name in overrides or {}:
            if name not in names:
                raise ValueError(f"{stage} does not read the section '{name}'{did_you_mean(name, names)}")
        merged = {name: _merge(values.get(name, {}), (overrides or {}).get(name, {})) for name in names}
        return cls(stage, **{name: reading.build(SECTIONS[name], merged[name], name) for name in names})

    def with_keys(self, **keys: Mapping[str, Any]) -> "StageConfig":
        """Return a copy with other values for some keys, given by section."""
        return dataclasses.replace(
            self, **{name: dataclasses.replace(getattr(self, name), **values) for name, values in keys.items()}
        )

    def values(self, *kinds: str) -> dict[str, Any]:
        """Return the keys of the given kinds by section, as plain JSON values.

        Keys that the setting or the stage ignores have a fixed value, so changing them reruns nothing. Sections without
        such keys are left out.
        """
        read = {name: effective(getattr(self, name), self.setting) for name in STAGES[self.stage].sections}
        found = {
            name: keys_of_kind(section.read_by(self.stage) if hasattr(section, "read_by") else section, *kinds)
            for name, section in read.items()
        }
        return {name: keys for name, keys in found.items() if keys}

    def identity(self) -> dict[str, Any]:
        """Return the identity keys, which the fingerprint of the stage's state covers."""
        return self.values("identity")

    def parameter(self) -> dict[str, Any]:
        """Return what Snakemake compares between runs: identity and budget keys, and the stage's version."""
        return {**self.values("identity", "budget"), "version": STAGES[self.stage].version}

    def operation(self) -> list[str]:
        """Return the operation keys as ``section.key=value``, without spaces, so they need no quoting in a shell."""
        flags = []
        for name in STAGES[self.stage].sections:
            for path, value in _flatten(keys_of_kind(getattr(self, name), "operation"), name):
                text = str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
                flags.append(f"{path}={text}")
        return flags


SECTIONS: dict[str, type] = {
    name: hint for name, hint in get_type_hints(StageConfig).items() if name not in ("stage", "setting")
}
"""The sections that stages read, by name."""


def effective(section: Any, setting: str | None) -> Any:
    """Return a section with the keys that a setting ignores at fixed values; unchanged without a setting."""
    return section.effective(SETTINGS[setting]) if setting and hasattr(section, "effective") else section


def _merge(base: Mapping[str, Any], over: Any) -> Any:
    if not isinstance(over, Mapping):
        return over
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value
