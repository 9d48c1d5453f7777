"""Whether results differ in nothing but what is compared. Nothing here imports PyTorch."""

from collections.abc import Collection, Mapping
from typing import Any

_NOT_SET = (
    "seconds", "images_digest", "function_evaluations", "inputs", "device", "weights", "guidance",
    "straightness",
)  # fmt: skip
"""What ``samples.json`` records but nobody sets; weights and guidance are looked into."""


def require_alike(records: Mapping[str, Mapping[str, Any]], varied: Collection[str], than: str) -> None:
    """Raise ValueError if results differ in more than what is varied.

    Args:
        records: results of the stage `fid`, by the names of their files without ending.
        varied: names of settings that may differ: keys of ``samples.json``, ``step``, ``model``, ``guidance KEY``.
        than: what these are called.

    Raises:
        ValueError: two results differ in another setting; the message names them.
        KeyError, TypeError, AttributeError: a record is no result of the stage `fid`.
    """
    settings = {name: setting(record) for name, record in records.items()}
    first, *others = settings
    for name in others:
        for what in {**settings[first], **settings[name]}:
            one, other = (settings[each].get(what) for each in (name, first))
            if one != other and what not in varied:
                raise ValueError(
                    f"'{name}' and '{first}' differ in more than {than}: {what} is {one} and {other}; make both with "
                    "one configuration"
                )


def setting(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a result by name, as far as its record tells."""
    samples = record["samples"]
    about = {name: value for name, value in samples.items() if name not in _NOT_SET}
    about.setdefault("quantisation", "truncated to 8 bits")  # which older records don't say, and which has not changed
    guidance = samples["guidance"] or {}
    return {
        **about,
        "detector": record["detector"]["digest"],
        "reference": record["reference"]["digest"],
        "step": samples["weights"]["step"],
        "model": samples["weights"]["model"],
        **{f"guidance {name}": value for name, value in guidance.items() if name != "guide"},
    }
