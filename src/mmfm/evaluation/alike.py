"""What results have in common, and whether they differ in nothing else than what is compared.

Nothing here imports PyTorch.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfm.config.choices import METRICS
from mmfm.infra import store

_LEFT_OUT = (
    "seconds", "images_digest", "function_evaluations", "straightness", "device", "inputs", "weights", "guidance",
)  # fmt: skip
"""What ``samples.json`` records besides settings, and what is looked into."""


def read(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Read results, given as .txt or .json, by the names of their files without ending.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or two have the same name.
    """
    records = {path.stem: store.read_json(path.with_suffix(".json")) for path in paths}
    if len(records) < len(paths):
        names = [path.stem for path in paths]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two results are called '{twice}'; give each once, and those of one run")
    return records


def require_alike(records: Mapping[str, Mapping[str, Any]], varied: Collection[str], than: str) -> None:
    """Raise ValueError if results differ in more than what is varied.

    Args:
        records: results of the stage `fid`, by the names of their files without ending.
        varied: names of settings that may differ, as :func:`setting` has them. With ``guidance`` there may be guided
            and unguided results; the guided ones are compared with one another.
        than: what these are called.

    Raises:
        ValueError: two results differ in another setting; the message names them.
        KeyError, TypeError, AttributeError: a record is not a result of the stage `fid`.
    """
    settings = {name: setting(record) for name, record in records.items()}
    known: dict[str, tuple[str, Any]] = {}
    for name, each in settings.items():
        unguided = not each["guidance"] and "guidance" in varied
        for what in dict.fromkeys(key for other in settings.values() for key in other):
            if what in varied or (unguided and what.startswith("guidance ")):
                continue
            first, expected = known.setdefault(what, (name, each.get(what)))
            if each.get(what) != expected:
                raise ValueError(
                    f"'{name}' and '{first}' differ in more than {than}: {what} is {each.get(what)} and {expected}; "
                    "make both with one configuration"
                )


def setting(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a result by name, as far as its record tells.

    They are keys of ``samples.json``, ``detector``, ``reference``, ``step``, ``model KEY``, ``weights``, ``guidance``
    (whether there is any), ``guidance KEY`` and ``input NAME``. Files are given by their digests.
    """
    samples = record["samples"]
    about = {name: value for name, value in samples.items() if name not in _LEFT_OUT}
    about.setdefault("quantisation", "truncated to 8 bits")  # which older records don't say, and which has not changed
    guidance, inputs = samples["guidance"] or {}, samples.get("inputs", {})
    return {
        **about,
        "detector": record["detector"]["digest"],
        "reference": record["reference"]["digest"],
        "step": samples["weights"]["step"],
        **{f"model {name}": value for name, value in (samples["weights"]["model"] or {}).items()},
        "weights": samples["weights"]["digest"],
        **{f"guidance {name}": _digest(value) for name, value in guidance.items()},
        "guidance": bool(guidance),
        **{f"input {name}": value for name, value in inputs.items() if name not in ("ema", "guide")},
    }


def _digest(value: Any) -> Any:
    """Return the digest of described weights, and other values as they are."""
    return value.get("digest") if isinstance(value, Mapping) else value


def metrics_of(records: Collection[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the values of the metrics that all results have, by name; the Frechet distance is the first."""
    found = {"frechet": [float(record["frechet_distance"]) for record in records]}
    for name in METRICS:
        if all(name in record.get("metrics", {}) for record in records):
            found[name] = [float(record["metrics"][name]) for record in records]
    return found


def warnings_of(records: Collection[Mapping[str, Any]]) -> list[str]:
    """Return the warnings of results, each once."""
    return list(dict.fromkeys(line for record in records for line in record["warnings"]))
