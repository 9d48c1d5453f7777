"""State directories that no target uses any more, and latent caches, for ``mmfm clean`` to remove.

A state is unused if its stage, run now, would not resume from it: the stage has another version, the configuration has
other values, or one of the inputs has been remade. Keys that a target's name can set (seed, model, modes, time points,
guidance) never make a state unused, and when in doubt a state counts as used.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfm import config
from mmfm.infra import disk, file_lock, store
from mmfm.workflow import last_run

_FREE = {"gmm": ("n_components", "init_means"), "train": ("seed", "model"), "sample": ("time_points", "guidance")}
"""Keys that do not count: a target's name can set them, or (`init_means`) the file's digest is among the inputs."""


@dataclass(frozen=True)
class State:
    """A state directory.

    Attributes:
        path: the directory.
        size: bytes that removing it frees.
        reason: why it is unused; empty if it is or may be used.
    """

    path: Path
    size: int
    reason: str


def find(results: str | Path) -> Iterator[State]:
    """Yield the state directories below a folder, each compared with the nearest last run recorded above it.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: see :func:`mmfm.workflow.last_run.load`.
    """
    results = Path(results)
    if not results.is_dir():
        raise FileNotFoundError(f"no folder '{results}'; give the folder of the results")
    known: dict[Path, last_run.LastRun | None] = {}
    for marker in sorted(results.rglob("state-*/about.json")):
        about = _read(marker)
        if about is None:
            continue
        reason = ""
        for folder in marker.parents[1:]:
            if folder not in known:
                known[folder] = last_run.load(folder)
            if last := known[folder]:
                if marker.relative_to(folder).parts[0] in last.folders:
                    reason = _why_unused(about, last.configuration, marker.parents[1])
                break
            if folder == results:
                break
        yield State(marker.parent, disk.used(marker.parent, freeable=True), reason)


@dataclass(frozen=True)
class LatentCache:
    """A latent cache of one encoder and image size; see :mod:`mmfm.autoencoder.latent_cache`.

    Attributes:
        path: its folder.
        size: bytes.
        about: what the latents are of, for people.
    """

    path: Path
    size: int
    about: str


def find_caches(folder: Path) -> Iterator[LatentCache]:
    """Yield the latent caches in a folder, by name; it need not exist."""
    for marker in sorted(folder.glob("*-*/about.json")):
        path = marker.parent
        try:
            about = json.loads(marker.read_text())
            images = f"{about['image_size']} px images at {about['input_size']} px on {about['device']}"
        except (OSError, ValueError, KeyError, TypeError):
            continue
        name, _, digest = path.name.rpartition("-")
        if not path.is_symlink() and digest == store.fingerprint(about):
            yield LatentCache(path, disk.used(path), f"{name}, {images}")


def remove_cache(cache: LatentCache) -> bool:
    """Remove a latent cache and return True, unless a job is filling it, or may be: no locks tell."""
    with open(cache.path / "lock", "a") as handle:
        if not file_lock.try_lock(handle):
            return False
        shutil.rmtree(cache.path)
    return True


def _read(marker: Path) -> dict[str, Any] | None:
    """Return the contents of an about.json; None if its folder is not one of our state directories."""
    if marker.parent.is_symlink() or not re.fullmatch(r"state-[0-9a-f]{16}", marker.parent.name):
        return None
    try:
        about = json.loads(marker.read_text())
        named = {name: about[name] for name in ("stage", "version", "identity", "inputs")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return about if marker.parent.name == f"state-{store.fingerprint(named)}" else None


def _why_unused(about: dict[str, Any], configuration: config.Config, folder: Path) -> str:
    stage = about["stage"]
    if stage not in config.STAGES:
        return ""
    version = config.STAGES[stage].version
    if about["version"] != version:
        return f"{stage} is at version {version}, but was at {about['version']}"
    for name in config.STAGES[stage].sections:
        if reason := _difference(stage, name, about["identity"], configuration):
            return reason
    for name, digest in about["inputs"].items():
        file = about.get("files", {}).get(name)
        if file is not None and (folder / file).exists() and not has_digest(folder / file, digest):
            return f"made from another {name.removesuffix('_digest')} than '{file}'"
    return ""


def _difference(stage: str, section: str, identity: dict[str, Any], configuration: config.Config) -> str:
    """Describe the first key of a section in which a stage's state differs from the configuration; empty for none."""
    own = identity.get(section)
    if own is None:
        return ""
    if section == "encoder":
        candidates: list[Any] = list(configuration.encoders.values())
    elif section == "model":
        name = identity.get("train", {}).get("model")
        if name not in configuration.models:
            return f"no '{name}' in models"
        candidates = [configuration.models[name]]
    elif section == "train" and identity.get("setting") in config.SETTINGS and own.get("model") in configuration.models:
        candidates = [configuration.train_of(identity["setting"], own["model"])]
    else:
        candidates = [getattr(configuration, section)]
    free, first = _FREE.get(section, ()), ""
    for candidate in candidates:
        setting = identity.get("setting")
        used = config.effective(candidate, setting if setting in config.SETTINGS else None)
        used = used.read_by(stage) if hasattr(used, "read_by") else used
        wanted = config.keys_of_kind(used, "identity")
        wrong = [key for key in {**wanted, **own} if key not in free and wanted.get(key) != own.get(key)]
        if not wrong:
            return ""
        key = wrong[0]
        first = first or f"{section}.{key} is {wanted.get(key)}, but was {own.get(key)}"
    return first


def has_digest(path: Path, digest: str) -> bool:
    """Whether a file or folder has a digest, recorded in it or computed from its bytes; True if it cannot be read."""
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
