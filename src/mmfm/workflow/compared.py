"""Finished Frechet distances for a comparison, with what lies beside them in the results folder.

Nothing here imports PyTorch.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmfm.config.choices import SETTINGS
from mmfm.evaluation.comparison import Result, Training
from mmfm.infra import store
from mmfm.training.history import DISTANCES, HISTORY, read_history
from mmfm.workflow.missing import advice, snakemake_command
from mmfm.workflow.targets import COMPARISON

_COMPLETE = re.compile(r"\.seed\d+\..+\.t\d+(\.g\d+(\.\d+)?)?\.json$")
"""Ending of a complete name. Short names are copies."""


def find(places: Sequence[Path]) -> list[Result]:
    """Return the finished results in some places, each once.

    Args:
        places: results folders (``results``, ``results/RUN``), of which all results with complete names are taken, or
            single results, ``FOLDER/fid/NAME.txt`` or ``.json``.

    Raises:
        FileNotFoundError: a file or folder does not exist, or nothing in it is finished; the message names the command
            that makes it.
        ValueError: a file is damaged, or is not a result of the stage `fid`.
    """
    found: dict[str, Result] = {}
    for path in (path for place in places for path in _files(place)):
        result = _result(path)
        known = found.get(content := store.canonical_json(result.record))
        # Of a result and its copy under a short name, the complete name tells more.
        if known is None or len(path.name) > len(known.path.name):
            found[content] = result
    return list(found.values())


def _files(place: Path) -> list[Path]:
    """Return the JSON files in a results folder, or that of a single result."""
    if place.is_dir():
        folder = place if place.name == "fid" else place / "fid"
        files = sorted(path for path in folder.glob("*.json") if _is_complete(path))
        if files:
            return files
        runs = sorted(str(fid.parent) for fid in place.glob("*/fid"))
        remedy = (
            f"give {' or '.join(runs)}" if runs else f"make it: {snakemake_command(folder.parent / 'comparison.txt')}"
        )
        raise FileNotFoundError(f"there is no finished result in '{place}'; {remedy}")
    if place.stem == COMPARISON and place.suffix:
        raise ValueError(f"'{place}' is a comparison itself; give results, or their folder: {place.parent}")
    path = place.with_suffix(".json") if place.suffix == ".txt" else place
    if not path.is_file():
        if place.suffix or place.parent.name == "fid":
            raise FileNotFoundError(f"no '{place}'; {advice(place if place.suffix else place.with_suffix('.txt'))}")
        folders = (place.parent, *sorted(place.parent.glob("*/")))
        finished = [str(folder) for folder in folders if any(map(_is_complete, folder.glob("fid/*.json")))]
        others = f", there {'is' if len(finished) == 1 else 'are'} {' and '.join(finished)}" if finished else ""
        in_results = "results" in place.absolute().parts[:-1]
        make = f"make it: {snakemake_command(place / 'comparison.txt')}" if in_results else "give a folder of results"
        raise FileNotFoundError(f"no '{place}'{others}; {make}")
    if path.suffix != ".json":
        raise ValueError(f"'{place}' is not a result; give FOLDER/fid/NAME.txt, or a results folder")
    record = store.read_json(path)
    if isinstance(record, dict) and record.get("stage") == "seeds":
        return [path.with_name(f"{name}.json") for name in record["results"]]
    return [path]


def _is_complete(path: Path) -> bool:
    return _COMPLETE.search(path.name) is not None


def _result(path: Path) -> Result:
    """Read a result and look for its images, its training's history and its mixture's report.

    What has been made anew since, and now belongs to other results, is left out.
    """
    record = store.read_json(path)
    try:
        samples, setting = record["samples"], record["samples"]["setting"]
        step, inputs = samples["weights"]["step"], samples.get("inputs", {})
        match = re.match(rf"(.+)_{setting}(_ag)?(\.|$)", path.stem)
        if match is None:
            raise ValueError(f"'{path}' has the setting '{setting}', which its name lacks; restore its original name")
        folder, encoder, guide = path.parent.parent, match[1], match[2] or ""
        images = _images(folder / "sample" / f"{encoder}_{setting}{guide}", samples["images_digest"])
        variant = images.parent.name if images else path.stem[match.end() :]
        training = re.sub(r"(\.step\d+)?\.t\d+(\.g[\d.]+)?$", "", variant)
        model = re.fullmatch(r"seed\d+\.(.+?)(\.k\d+)?", training)
        made_from = _spatial_report(folder / "spatial_gmm" / encoder, setting, inputs)
        return Result(
            path, folder, encoder, bool(guide), model[1] if model else None, record,
            _training(folder / "train" / f"{encoder}_{setting}" / training, step),
            _mixture(folder / "gmm" / encoder, made_from) if made_from and SETTINGS[setting].mixture else None,
            _coupling_cost(made_from, setting),
            _seeds(path, samples["images_digest"]),
            _pictures(folder, f"{encoder}_{setting}{guide}.{variant}", samples["images_digest"]),
            images,
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' is not a result of fid ({error!r}); make it again") from error


def _beside(path: Path, stage: str) -> dict[str, Any]:
    """Return what another stage says of results; an empty dictionary if it says nothing, or its file is damaged."""
    try:
        content = store.read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and content.get("stage") == stage else {}


def _seeds(path: Path, digest: str) -> dict[str, Any] | None:
    """Return the result of the most seeds of which this one, with the digest of its images, is one."""
    summaries = [_beside(other, "seeds") for other in sorted(path.parent.glob("*.seeds*.json"))]
    head = path.stem.partition(".")[0]
    of_this = [
        summary
        for summary in summaries
        if digest in summary.get("images_digests", ()) and summary["results"][0].partition(".")[0] == head
    ]
    return max(of_this, key=lambda summary: len(summary["seeds"]), default=None)


def _pictures(folder: Path, name: str, digest: str) -> dict[str, Path]:
    """Return the pictures that other stages have made of the images with a digest."""
    found = {}
    for stage in ("mode_quality", "memorisation"):
        picture = folder / stage / f"{name}.png"
        about = _beside(picture.with_suffix(".json"), stage)
        if picture.is_file() and digest in (about.get("images_digest"), about.get("samples", {}).get("images_digest")):
            found[stage] = picture
    return found


def curves(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the finished curves that lie beside some results and are of their settings, with ``name`` and ``folder``.

    A curve with a point that has been made anew since is left out.
    """
    found = []
    for folder in dict.fromkeys(result.folder for result in results):
        heads = {
            f"{result.encoder}_{result.record['samples']['setting']}{'_ag' * result.guided}"
            for result in results
            if result.folder == folder
        }
        for path in sorted((folder / "curve").glob("*.json")):
            curve = _beside(path, "curve")
            if curve and path.stem.partition(".")[0] in heads and _is_current(folder, curve):
                found.append({**curve, "name": path.stem, "folder": str(folder)})
    return found


def _is_current(folder: Path, curve: dict[str, Any]) -> bool:
    """Whether the results at the points of a curve are still those that it was made from."""
    for name, digest in zip(curve["results"], curve["images_digests"], strict=True):
        result = _beside(folder / "fid" / f"{name}.json", "fid")
        if result.get("samples", {}).get("images_digest") != digest:
            return False
    return True


def _images(folder: Path, digest: str) -> Path | None:
    for about in sorted(folder.glob("*/samples.json")):
        images = about.with_name("images.npz")
        if images.is_file() and store.read_json(about).get("images_digest") == digest:
            return images
    return None


def _training(folder: Path, step: int | None) -> Training | None:
    """Return the records until the step of the weights, which is logged in any case."""
    history = read_history(folder / HISTORY)
    last = max((i for i, line in enumerate(history) if line["step"] == step), default=None)
    if step is None or last is None:
        return None
    distances = [line for line in read_history(folder / DISTANCES) if line["step"] <= step]
    return Training(folder, history[: last + 1], distances)


def _spatial_report(folder: Path, setting: str, inputs: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return the name ``k{K}`` and the report of the spatial mixture; for the Gaussian source, any of its statistics'.

    The Gaussian source's coupling cost is in the report of every mixture.
    """
    mixture = SETTINGS[setting].mixture
    for path in sorted(folder.glob("k*/report.json")):
        report = store.read_json(path)
        of = report["digest"] if mixture else report["stats_digest"]
        if of == inputs.get("spatial_gmm" if mixture else "stats"):
            return path.parent.name, report
    return None


def _coupling_cost(made_from: tuple[str, dict[str, Any]] | None, setting: str) -> float | None:
    if made_from is None:
        return None
    return made_from[1]["coupling_cost"]["mode_coupled" if SETTINGS[setting].mixture else "gaussian"]


def _mixture(folder: Path, made_from: tuple[str, dict[str, Any]]) -> Path | None:
    """Return the folder of the fit that a spatial mixture was made from."""
    name, report = made_from
    fit = folder / name / "report.json"
    same = fit.is_file() and store.read_json(fit).get("gmm_digest") == report.get("gmm_digest")
    return fit.parent if same else None
