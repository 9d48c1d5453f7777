"""How configuration keys are declared, and what can be asked of a section's keys.

A key's kind (see :mod:`mmfm.config`) decides what happens to existing results when the key changes.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, is_dataclass, replace
from typing import Any, get_type_hints

NEVER = object()
"""``as_before`` of a key that its section has had from the start."""


def key(
    help: str,
    *,
    kind: str = "identity",
    unit: str = "",
    choices: Mapping[str, Any] | None = None,
    minimum: float | None = None,
    path: bool = False,
    as_before: Any = NEVER,
    part_of: type | None = None,
) -> Any:
    """Declare a configuration key, with the metadata for documentation, schema and validation.

    Args:
        kind: ``identity``, ``budget`` or ``operation``; see :mod:`mmfm.config`.
        choices: table of the accepted values, in :mod:`mmfm.config.choices`.
        path: whether the value names a file or folder; a leading ``~`` is the home directory.
        as_before: for a key that is added to an existing section: the value that preserves the old behaviour. It is
            the key's default, and parameters and fingerprints omit it, so adding the key reruns nothing.
        part_of: for a mapping of some of a section's keys to values: the section.
    """
    about = {"help": help, "kind": kind, "unit": unit, "choices": choices, "minimum": minimum, "path": path}
    return field(metadata=about | {"as_before": as_before, "part_of": part_of})


operation = functools.partial(key, kind="operation")
budget = functools.partial(key, kind="budget")


def nested(*, as_before: Any = NEVER) -> Any:
    """Declare a section, or a mapping of names to sections; ``as_before`` as for :func:`key`."""
    return field(metadata={"kind": "section", "as_before": as_before})


def fraction(value: float, where: str) -> None:
    """Raise ValueError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ValueError(f"'{where}' is {value}; it must be in [0, 1)")


def times(interval: tuple[float, float], where: str) -> None:
    """Raise ValueError unless the interval lies in [0, 1]."""
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"'{where}.interval' is {list(interval)}; give times 0 <= lowest <= highest <= 1")


def share(value: float, where: str) -> None:
    """Raise ValueError unless 0 < value <= 1."""
    if not 0 < value <= 1:
        raise ValueError(f"'{where}' is {value}; it must be above 0 and at most 1, which takes all")


def overlaid(section: Any, values: Mapping[str, Any]) -> Any:
    """Return a section with other values for some keys, nested sections included."""
    changed = {
        name: overlaid(getattr(section, name), value) if isinstance(value, Mapping) else value
        for name, value in values.items()
    }
    return replace(section, **changed)


def declared(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield the dotted name, type and metadata of every key of a section, nested sections included."""
    hints = get_type_hints(kind)
    for f in fields(kind):
        if is_dataclass(hints[f.name]):
            yield from declared(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, hints[f.name], f.metadata


def keys_of_kind(values: Any, *kinds: str) -> dict[str, Any]:
    """Return the keys of a section that are of the given kinds, nested sections included, as plain JSON values.

    Keys at their ``as_before`` value are omitted.
    """
    result: dict[str, Any] = {}
    for f in fields(values):
        value = getattr(values, f.name)
        if is_dataclass(value):
            if nested := keys_of_kind(value, *kinds):
                result[f.name] = nested
        elif f.metadata["kind"] in kinds and value != f.metadata["as_before"]:
            result[f.name] = list(value) if isinstance(value, tuple) else value
    return result
