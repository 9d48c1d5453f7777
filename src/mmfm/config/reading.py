"""Read YAML files and ``section.key=value`` arguments into frozen dataclasses; errors name the key at fault."""

import dataclasses
import functools
import math
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmfm.config.choices import did_you_mean
from mmfm.config.keys import NEVER
from mmfm.config.whole import Config

RETIRED = dict.fromkeys(
    ("decoder.latent_cache_gb", "train.latent_cache_gb"), "latents.cache says whether latents are kept, now on disk"
)
"""Keys that are gone, with what to know instead. They are accepted and have no effect."""


def demo_layer(values: Mapping[str, Any], defaults: str | Path) -> list[Path]:
    """Return the file that goes between the defaults and the user's own values: the demo's, or none.

    Args:
        values: the whole configuration, merged without it. The demo's values apply exactly when ``data.root`` is
            ``demo``, so that other images inherit none of them.
        defaults: config.yaml; demo.yaml lies beside it.
    """
    data, layer = values.get("data"), Path(defaults).with_name("demo.yaml")
    return [layer] if isinstance(data, Mapping) and data.get("root") == "demo" and layer.exists() else []


def imported(values: Mapping[str, Any], defaults: Path, demo: Path, root: Path) -> dict[str, Any]:
    """Return the whole configuration of a workflow that imports this one as a module.

    Args:
        values: what it gives: its own keys, or an edited copy of config.yaml. With the demo's images, a value that
            equals the default counts as not given, so that such a copy does not hide demo.yaml.
        defaults: this workflow's config.yaml.
        demo: this workflow's demo.yaml, laid between the two where it applies; see :func:`demo_layer`.
        root: this workflow's folder, where the demo's files lie.
    """
    import yaml

    below = yaml.safe_load(defaults.read_text())
    if _laid_over(below, values)["data"].get("root") != "demo":
        return _laid_over(below, values)
    layer = _laid_over({}, yaml.safe_load(demo.read_text()), root)
    return _laid_over(_laid_over(below, layer), _differing(values, below))


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any], root: Path | None = None) -> dict[str, Any]:
    """Return nested mappings merged; with ``root``, the demo's files among the upper values are found there."""
    result = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping):
            under = below.get(key)
            result[key] = _laid_over(under if isinstance(under, Mapping) else {}, value, root)
        elif root and isinstance(value, str) and value.startswith("resources/demo/"):
            result[key] = str(root / value)
        else:
            result[key] = value
    return result


def _differing(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that differ from the defaults, nested as before."""
    found = {}
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            found[key] = _differing(value, default)
        elif key not in defaults or value != default:
            found[key] = value
    return found


def load(files: Iterable[str | Path], overrides: Iterable[str] = ()) -> Config:
    """Read YAML files, later ones overriding earlier ones, then ``section.key=value`` overrides.

    Args:
        files: the defaults first, over which the demo's values are laid where they apply; see :func:`demo_layer`.

    Raises:
        ValueError: a file is missing or not valid YAML; also see :func:`build`.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        files, over = list(files), parse_overrides(overrides)
        if absent := [file for file in files if not Path(file).exists()]:
            raise ValueError(
                f"there is no configuration file '{absent[0]}'; correct the path, or let `mmfm init FOLDER` write one"
            )

        def merge(layers: list[str | Path]) -> Any:
            loaded = [(file, OmegaConf.load(file)) for file in layers]
            for file, content in loaded:
                if not isinstance(content, DictConfig):
                    raise ValueError(f"the configuration file '{file}' must contain sections with keys")
            return OmegaConf.to_container(OmegaConf.merge(*(content for _, content in loaded), over), resolve=True)

        values = merge(files)
        if layer := demo_layer(values, files[0]):
            values = merge([files[0], *layer, *files[1:]])
    except (OSError, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"cannot read the configuration: {error}") from error
    return build(Config, values)


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Return ``section.key=value`` arguments as nested mappings.

    Raises:
        ValueError: a value is not valid YAML.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    overrides = list(overrides)
    try:
        nested: Any = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"cannot read the keys {' '.join(overrides)}: {error}") from error
    return nested


def build(kind: type, values: Any, where: str = "") -> Any:
    """Build a section's dataclass from plain values, with strict checks.

    Args:
        kind: the dataclass.
        values: a mapping of every key to its value.
        where: dotted name of the section, for messages.

    Raises:
        ValueError: a key is unknown, missing, of the wrong type, or out of range; the message names it.
    """
    _require_known(kind, values, where)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    if missing := list(_missing(kind, values, prefix)):
        names = ", ".join(f"'{name}'" for name in missing)
        verb, have = ("is", "has") if len(missing) == 1 else ("are", "have")
        raise ValueError(
            f"{names} {verb} not set and {have} no default; `mmfm init FOLDER` looks at your images and writes a "
            "configuration for them"
        )
    built = {}
    for name, f in fields.items():
        value = values.get(name, f.metadata["as_before"])
        built[name] = _value(hints[name], value, prefix + name, f.metadata)
    result = kind(**built)
    if hasattr(result, "check"):
        result.check(where)
    return result


def _require_known(kind: type, values: Any, where: str) -> None:
    """Raise ValueError at what is not a section, and at a key that does not exist, in nested sections too."""
    if not isinstance(values, Mapping):
        raise ValueError(f"'{where}' must be a section with keys, got {values!r}")
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        path = f"{where}.{name}" if where else name
        if path in RETIRED:
            _say_retired(path)
            continue
        if name not in hints:
            raise ValueError(f"unknown configuration key '{path}'{did_you_mean(str(name), hints)}")
        if dataclasses.is_dataclass(hints[name]):
            _require_known(hints[name], value, path)


@functools.cache
def _say_retired(path: str) -> None:
    """Print a hint, once in a process."""
    print(f"the key {path} has no effect any more and can be removed: {RETIRED[path]}", file=sys.stderr)


def _missing(kind: type, values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Yield the dotted names of keys without a value; of a section that is not there those of its keys."""
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        name, given = prefix + f.name, values.get(f.name, f.metadata["as_before"])
        if dataclasses.is_dataclass(hints[f.name]) and (given is NEVER or isinstance(given, Mapping)):
            yield from _missing(hints[f.name], given if isinstance(given, Mapping) else {}, f"{name}.")
        elif given is NEVER:
            yield name


def _part(kind: type, values: Any, where: str) -> dict[str, Any]:
    """Return some keys of a section with values as :func:`build` takes them; errors as there."""
    _require_known(kind, values, where)
    hints, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    return {
        name: _part(hints[name], value, f"{where}.{name}")
        if dataclasses.is_dataclass(hints[name])
        else _value(hints[name], value, f"{where}.{name}", fields[name].metadata)
        for name, value in values.items()
    }


def _value(hint: Any, value: Any, where: str, metadata: Mapping[str, Any]) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, {} if value is NEVER else value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if part_of := metadata.get("part_of"):
        return _part(part_of, value, where)
    if origin is dict:
        if not isinstance(value, Mapping) or (not value and metadata["as_before"] is NEVER):
            raise ValueError(f"'{where}' must map names to sections, at least one, got {value!r}")
        return {str(k): build(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is tuple and arguments[-1] is ...:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"'{where}' must be a list, got {value!r}")
        return tuple(_value(arguments[0], v, where, metadata) for v in value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise ValueError(f"'{where}' must be a list of {len(arguments)} numbers, got {value!r}")
        return tuple(_value(a, v, where, {}) for a, v in zip(arguments, value, strict=True))
    if isinstance(value, bool) and "off" in (metadata.get("choices") or ()):
        value = "on" if value else "off"  # as YAML reads these words
    value = _scalar(hint, value, where)
    if metadata.get("path"):
        value = str(Path(value).expanduser()) if value.startswith("~") else value
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
    if isinstance(value, str) and any(kind in (int, float) for kind in kinds) and _is_number(value):
        hint_text = " (YAML reads 1e-3 as text: write 1.0e-3; on the command line use --configfile, not --config)"
    raise ValueError(f"'{where}' must be {wanted}, got {value!r}{hint_text}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
