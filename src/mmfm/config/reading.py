"""From YAML files and ``section.key=value`` arguments to frozen dataclasses, strictly: whatever is wrong is named."""

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmfm.config.choices import did_you_mean
from mmfm.config.sections import NEVER, Config


def load(files: Iterable[str | Path], overrides: Iterable[str] = ()) -> Config:
    """Read YAML files, later ones over earlier ones, then ``section.key=value`` overrides.

    Raises:
        ValueError: see :func:`build`; also for a missing file or unreadable YAML.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        loaded = [(file, OmegaConf.load(file)) for file in files]
        for file, content in loaded:
            if not isinstance(content, DictConfig):
                raise ValueError(f"the configuration file '{file}' holds no sections with keys")
        merged = OmegaConf.merge(*(content for _, content in loaded), parse_overrides(overrides))
        values = OmegaConf.to_container(merged, resolve=True)
    except (OSError, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"cannot read the configuration: {error}") from error
    return build(Config, values)


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Return ``section.key=value`` arguments as nested mappings.

    Raises:
        ValueError: a value that is no YAML.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    overrides = list(overrides)
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"cannot read the settings {' '.join(overrides)}: {error}") from error


def build(kind: type, values: Any, where: str = "") -> Any:
    """Build a frozen dataclass from plain values, strictly.

    Args:
        kind: a section's dataclass.
        values: a mapping of every key to its value.
        where: dotted name of the section for messages.

    Raises:
        ValueError: an unknown, missing, mistyped or out-of-range key; the message names it and the remedy.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"'{where}' must be a section with keys, got {values!r}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in fields:
            raise ValueError(f"unknown configuration key '{prefix}{name}'{did_you_mean(str(name), fields)}")
    built = {}
    for name, f in fields.items():
        value = values.get(name, f.metadata["as_before"])
        if value is NEVER:
            raise ValueError(f"configuration key '{prefix}{name}' is missing; config/config.yaml has its usual value")
        built[name] = _value(hints[name], value, prefix + name, f.metadata)
    result = kind(**built)
    if hasattr(result, "check"):
        result.check(where)
    return result


def _value(hint: Any, value: Any, where: str, metadata: Mapping[str, Any]) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        if not isinstance(value, Mapping) or not value:
            raise ValueError(f"'{where}' must map at least one name to its keys, got {value!r}")
        return {str(k): build(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is tuple and arguments[-1] is ...:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"'{where}' must be a list, got {value!r}")
        return tuple(_value(arguments[0], v, where, metadata) for v in value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise ValueError(f"'{where}' must be a list of {len(arguments)} numbers, got {value!r}")
        return tuple(_value(a, v, where, {}) for a, v in zip(arguments, value, strict=True))
    value = _scalar(hint, value, where)
    if metadata.get("choices") and value not in metadata["choices"]:
        choices = ", ".join(map(str, metadata["choices"]))
        raise ValueError(
            f"'{where}' is '{value}'{did_you_mean(str(value), metadata['choices'])}; it must be one of {choices}"
        )
    if metadata.get("minimum") is not None and value < metadata["minimum"]:
        raise ValueError(f"'{where}' is {value}; it must be at least {metadata['minimum']}")
    return value


def _scalar(hint: Any, value: Any, where: str) -> Any:
    kinds = typing.get_args(hint) or (hint,)
    for kind in kinds:
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ValueError(f"'{where}' is {value}; it must be a finite number")
            return float(value)
        if type(value) is kind:
            return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    wanted = " or ".join(names[kind] for kind in kinds)
    hint_text = ""
    if isinstance(value, str) and any(kind in (int, float) for kind in kinds):
        hint_text = " (YAML reads 1e-3 as text: write 1.0e-3; on the command line use --configfile, not --config)"
    raise ValueError(f"'{where}' must be {wanted}, got {value!r}{hint_text}")
