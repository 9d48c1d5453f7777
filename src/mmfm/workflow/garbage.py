"""State directories that nothing refers to any more: what ``mmfm clean --unused`` removes.

A state is unused if the same stage, run now, would not take it up: its VERSION is another one, its settings are not
those of the configuration, or an input that it was made from has been made anew. Whatever a target's name may say
instead of the configuration (seed, model, modes, time points, guidance) counts as referred to, and so does everything
that can't be told.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfm import config
from mmfm.infra import disk, store

RECORD = "configuration.json"
"""Beside the stages' folders: the configuration of the last run, written by the workflow."""

_FREE = {"gmm": ("n_components", "init_means"), "train": ("seed", "model"), "sample": ("time_points", "guidance")}
"""Keys that a target's name can carry (`.gN`, and `_ag`, which takes the guide's), and a file known by its digest."""


@dataclass(frozen=True)
class State:
    """A state directory.

    Attributes:
        path: the directory.
        size: bytes that removing it frees.
        reason: why nothing refers to it; empty if something does or may.
    """

    path: Path
    size: int
    reason: str


def remember(settings: config.Config, results: str | Path, folders: Iterable[str]) -> None:
    """Record the configuration with which the results below a folder are being made.

    Args:
        folders: names of the stages' folders there; what lies in others (another run's) is not judged by it.
    """
    record = {"configuration": dataclasses.asdict(settings), "folders": sorted(set(folders))}
    store.write_json(Path(results) / RECORD, record)


def find(results: str | Path) -> Iterator[State]:
    """Yield the state directories below a folder, each judged by the nearest recorded configuration above it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a recorded configuration is damaged, or of another version of this software.
    """
    results = Path(results)
    if not results.is_dir():
        raise FileNotFoundError(f"no folder '{results}'; give the one with the results")
    known: dict[Path, tuple[config.Config, list[str]] | None] = {}
    for marker in sorted(results.rglob("state-*/about.json")):
        about = _read(marker)
        if about is None:
            continue
        reason = ""
        for folder in marker.parents[1:]:
            if folder not in known:
                known[folder] = recorded(folder / RECORD)
            if record := known[folder]:
                settings, stages = record
                if marker.relative_to(folder).parts[0] in stages:
                    reason = _why_unused(about, settings, marker.parents[1])
                break
            if folder == results:
                break
        yield State(marker.parent, disk.used(marker.parent, freeable=True), reason)


def _read(marker: Path) -> dict[str, Any] | None:
    """Return what a marker says, or None if its directory is no state directory of ours."""
    if marker.parent.is_symlink() or not re.fullmatch(r"state-[0-9a-f]{16}", marker.parent.name):
        return None
    try:
        about = json.loads(marker.read_text())
        named = {name: about[name] for name in ("stage", "version", "identity", "inputs")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return about if marker.parent.name == f"state-{store.fingerprint(named)}" else None


def recorded(path: Path) -> tuple[config.Config, list[str]] | None:
    """Return what :func:`remember` wrote: the configuration and the stages' folders; None if nothing is there.

    Raises:
        ValueError: it is damaged, or of another version of this software.
    """
    if not path.is_file():
        return None
    try:
        record = store.read_json(path)
        return config.build(config.Config, record["configuration"]), record["folders"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is no configuration ({error}); run Snakemake once, which writes it anew") from error


def _why_unused(about: dict[str, Any], settings: config.Config, folder: Path) -> str:
    stage = about["stage"]
    if stage not in config.STAGES:
        return ""
    version = config.STAGES[stage].version
    if about["version"] != version:
        return f"{stage} is at version {version}, this is of version {about['version']}"
    for name in config.STAGES[stage].sections:
        if reason := _differs(name, about["identity"], settings):
            return reason
    for name, digest in about["inputs"].items():
        file = about.get("files", {}).get(name)
        if file is not None and (folder / file).exists() and not has_digest(folder / file, digest):
            return f"made from another {name.removesuffix('_digest')} than '{file}'"
    return ""


def _differs(section: str, identity: dict[str, Any], settings: config.Config) -> str:
    """Return the first key of a section in which a state differs from the configuration; empty if in none."""
    own = identity.get(section)
    if own is None:
        return ""
    if section == "encoder":
        candidates = list(settings.encoders.values())
    elif section == "model":
        name = identity.get("train", {}).get("model")
        if name not in settings.models:
            return f"no '{name}' in models"
        candidates = [settings.models[name]]
    else:
        candidates = [getattr(settings, section)]
    free, first = _FREE.get(section, ()), ""
    for candidate in candidates:
        setting = identity.get("setting")
        used = config.effective(candidate, setting if setting in config.SETTINGS else None)
        wanted = config.keys_of_kind(used, "identity")
        wrong = [key for key in {**wanted, **own} if key not in free and wanted.get(key) != own.get(key)]
        if not wrong:
            return ""
        key = wrong[0]
        first = first or f"{section}.{key} is {wanted.get(key)}, this is for {own.get(key)}"
    return first


def has_digest(path: Path, digest: str) -> bool:
    """Whether a file or folder is what a digest was taken from: the recorded one, or that of its bytes."""
    try:
        if path.is_dir() and (path / "zarr.json").exists():
            return json.loads((path / "zarr.json").read_text())["attributes"]["digest"] == digest
        if path.is_dir():
            return store.folder_digest(path) == digest
        if path.suffix == ".safetensors" and store.map_arrays(path)[1].get("digest") == digest:
            return True
        return store.file_digest(path) == digest
    except (OSError, ValueError, KeyError):
        return True
