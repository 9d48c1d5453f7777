"""From YAML files and ``section.key=value`` arguments to frozen dataclasses, strictly: whatever is wrong is named."""

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmfm.config.sections import (
    ADAPTIVE_SOLVERS,
    Config,
    Decoder,
    Gmm,
    Guidance,
    Guide,
    LossWeighting,
    Model,
    Sample,
    Sweep,
    Train,
)
from mmfm.config.spelling import nearest

_LARGEST_GAMMA = 20
"""The ratio of a label's loss to the mean reaches the number of labels; a power of it must stay below infinity."""


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
            raise ValueError(f"unknown configuration key '{prefix}{name}'{nearest(str(name), fields)}")
    for name in fields:
        if name not in values:
            raise ValueError(f"configuration key '{prefix}{name}' is missing; config/config.yaml has its usual value")
    built = {name: _value(hints[name], values[name], prefix + name, fields[name].metadata) for name in fields}
    result = kind(**built)
    _check_together(result, where)
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
            raise ValueError(f"'{where}' must be a list of numbers, got {value!r}")
        return tuple(_value(arguments[0], v, where, metadata) for v in value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise ValueError(f"'{where}' must be a list of {len(arguments)} numbers, got {value!r}")
        return tuple(_value(a, v, where, {}) for a, v in zip(arguments, value, strict=True))
    value = _scalar(hint, value, where)
    if metadata.get("choices") and value not in metadata["choices"]:
        choices = ", ".join(map(str, metadata["choices"]))
        raise ValueError(
            f"'{where}' is '{value}'{nearest(str(value), metadata['choices'])}; it must be one of {choices}"
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


def _check_together(section: Any, where: str) -> None:
    if isinstance(section, Train):
        if section.decay_end_epoch <= section.constant_epochs:
            raise ValueError(f"'{where}.decay_end_epoch' must be above '{where}.constant_epochs'")
        if not 0 <= section.ema_decay < 1:
            raise ValueError(f"'{where}.ema_decay' is {section.ema_decay}; it must be in [0, 1)")
        for name in ("label_dropout", "mode_dropout"):
            if getattr(section, name) >= 1:
                raise ValueError(f"'{where}.{name}' is {getattr(section, name)}; it must be in [0, 1)")
    if isinstance(section, LossWeighting):
        if not 0 <= section.decay < 1:
            raise ValueError(f"'{where}.decay' is {section.decay}; it must be in [0, 1)")
        if section.gamma > _LARGEST_GAMMA:
            raise ValueError(f"'{where}.gamma' is {section.gamma}; it must be at most {_LARGEST_GAMMA}")
        if not 0 < section.bounds[0] <= 1 <= section.bounds[1]:
            raise ValueError(f"'{where}.bounds' are {list(section.bounds)}; give 0 < smallest <= 1 <= largest")
    if isinstance(section, Guidance | Guide) and not 0 <= section.interval[0] <= section.interval[1] <= 1:
        raise ValueError(f"'{where}.interval' is {list(section.interval)}; give times 0 <= lowest <= highest <= 1")
    if isinstance(section, Sample) and section.solver in ADAPTIVE_SOLVERS:
        if section.precision == "reference":
            raise ValueError(
                f"'{where}.precision' reference has bf16 times, too coarse for {section.solver}: use euler"
            )
        if section.rtol + section.atol <= 0:
            raise ValueError(f"'{where}.rtol' and '{where}.atol' are both 0; {section.solver} needs one of them")
    if isinstance(section, Sweep) and not section.modes:
        raise ValueError(f"'{where}.modes' must be a list of at least one number, got an empty one")
    if isinstance(section, Model):
        for width, heads in zip(section.hidden_size, section.num_heads, strict=True):
            if width % heads or (width // heads) % 4:
                raise ValueError(f"'{where}': width {width} over {heads} heads must give a multiple of 4 per head")
    if isinstance(section, Gmm):
        if section.e_step == "truncated" and section.covariance_type in ("tied", "full"):
            raise ValueError(
                f"'{where}.e_step' truncated needs covariance_type diag or spherical, not {section.covariance_type}; "
                f"set '{where}.e_step' to exact"
            )
        if section.init_means and section.n_init > 1:
            raise ValueError(
                f"'{where}.n_init' is {section.n_init}, but '{where}.init_means' is one start; set it to 1"
            )
    if isinstance(section, Decoder) and section.hidden_size % section.num_heads:
        raise ValueError(f"'{where}.hidden_size' {section.hidden_size} is no multiple of num_heads {section.num_heads}")
