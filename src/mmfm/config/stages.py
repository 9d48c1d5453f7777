"""What each stage reads of the configuration, and the version of its code: what makes it run again."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from mmfm.config.sections import Config

STAGES: dict[str, tuple[str, ...]] = {
    "list_images": ("data",),
    "extract": ("image", "encoder", "extract"),
    "latent_stats": (),
    "fit_gmm": ("gmm",),
    "spatial_gmm": ("image", "encoder", "spatial_gmm"),
    "train_decoder": ("image", "encoder", "decoder"),
    "train": ("image", "encoder", "model", "train"),
    "sample": ("image", "encoder", "sample"),
    "fid_reference": ("image", "fid"),
    "fid": ("fid",),
    "sweep": ("sweep",),
}
"""The sections that each stage reads, and so what makes it run again."""

VERSIONS: dict[str, int] = {
    "list_images": 1,
    "extract": 1,
    "latent_stats": 1,
    "fit_gmm": 3,
    "spatial_gmm": 1,
    "train_decoder": 1,
    "train": 2,
    "sample": 3,
    "fid_reference": 1,
    "fid": 1,
    "sweep": 1,
}
"""Raised whenever a stage's code changes its results. Part of the rule's parameter and of the state's fingerprint."""


def keys_of_kind(section: Any, *kinds: str) -> dict[str, Any]:
    """Return the keys of a section that are of the given kinds as plain JSON values, nested sections included."""
    result: dict[str, Any] = {}
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            if nested := keys_of_kind(value, *kinds):
                result[f.name] = nested
        elif f.metadata["kind"] in kinds:
            result[f.name] = list(value) if isinstance(value, tuple) else value
    return result


def stage_settings(config: Config, stage: str, encoder: str = "", model: str = "") -> dict[str, Any]:
    """Return what a stage's parameter holds: identity and budget keys of the sections it reads."""
    return {name: keys_of_kind(config.section(name, encoder, model), "identity", "budget") for name in STAGES[stage]}


def stage_operation(config: Config, stage: str) -> list[str]:
    """Return the operation keys of the sections that a stage reads as ``section.key=value``."""
    flags = []
    for name in STAGES[stage]:
        if name in ("encoder", "model"):
            continue
        for path, value in _flatten(keys_of_kind(config.section(name), "operation"), name):
            # No spaces: the flags go through a shell.
            shown = str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
            flags.append(f"{path}={shown}")
    return flags


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value


def identity(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity keys of built sections: what the fingerprint of a stage's state covers."""
    return {name: keys_of_kind(section, "identity") for name, section in sections.items()}
