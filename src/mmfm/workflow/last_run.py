"""The configuration of the last run, kept beside its results for ``mmfm clean`` and the Python API."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mmfm import config
from mmfm.infra import store

FILE = "configuration.json"
"""Name of the file, in the folder that holds the stages' folders."""


@dataclass(frozen=True)
class LastRun:
    """The last run of the workflow.

    Attributes:
        configuration: the whole configuration.
        folders: names of the stages' folders; others in the same place belong to other runs.
    """

    configuration: config.Config
    folders: list[str]


def save(used: config.Config, results: str | Path, folders: Iterable[str]) -> None:
    """Record a run whose results lie in a folder; ``folders`` as in :class:`LastRun`."""
    value = {"configuration": dataclasses.asdict(used), "folders": sorted(set(folders))}
    store.write_json(Path(results) / FILE, value)


def load(results: Path) -> LastRun | None:
    """Return the last run recorded in a folder; None if there is none.

    Raises:
        ValueError: the file is damaged, or was written by another version of this software.
    """
    path = results / FILE
    if not path.is_file():
        return None
    try:
        value = store.read_json(path)
        return LastRun(config.build(config.Config, value["configuration"]), value["folders"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' is not a valid configuration ({error}); run Snakemake once to rewrite it"
        ) from error


def configuration(results: Path) -> config.Config | None:
    """Return the configuration of the last run; None and errors as in :func:`load`."""
    last = load(results)
    return last.configuration if last else None
