"""Descriptions of finished targets, read from the files that stages write beside their results."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmfm import config
from mmfm.infra import store
from mmfm.models.weights import weights_metadata
from mmfm.workflow import exported, last_run
from mmfm.workflow.finished import Finished
from mmfm.workflow.missing import advice, snakemake_command
from mmfm.workflow.targets import COMPARISON

_BATCHES = {"batch_size": 64, "shard_size": 500}
"""Used if no configuration is recorded; they affect images by rounding only."""


def read(target: str | Path) -> Finished:
    """Read the description of a finished target.

    Args:
        target: ``results/fid/NAME.txt``, a folder ``results/sample/NAME/VARIANT`` or ``results/train/NAME/VARIANT``, a
            folder that ``mmfm export`` wrote, or a file in such a folder.

    Raises:
        FileNotFoundError: it does not exist; the message names the command that makes it.
        ValueError: it is something else, or damaged.
    """
    target = Path(target)
    place = target.absolute()
    if place.stem == COMPARISON and place.suffix:
        results = ", ".join(map(str, sorted(target.parent.glob("fid/*.txt")))) or f"{target.parent / 'fid'}/NAME.txt"
        raise ValueError(f"'{target}' compares several results; open one of them: {results}")
    if not target.exists():
        raise FileNotFoundError(f"no '{target}'; {advice(target)}")
    folder = place if place.is_dir() else place.parent
    if (folder / exported.ABOUT).is_file():
        return exported.read(folder)
    if place.suffix in (".txt", ".json") and folder.name == "fid":
        name = place.name.removesuffix(place.suffix)
        record = _read(folder / f"{name}.json", target)
        if record.get("stage") == "seeds":
            results = ", ".join(f"{result}.txt" for result in record["results"])
            raise ValueError(f"'{target}' is a summary of several seeds; open the result of one of them: {results}")
        return _from_samples(target, folder.parent, name, "", record.get("samples"))
    if (folder / "samples.json").is_file():
        samples = _read(folder / "samples.json", target)
        return _from_samples(target, folder.parents[2], folder.parent.name, folder.name, samples)
    if (folder / "ema.safetensors").is_file():
        return _from_weights(target, folder)
    known = sorted(map(str, target.glob("fid/*.txt"))) if target.is_dir() else []
    raise ValueError(
        f"'{target}' is not a finished target; give "
        + (f"one of {', '.join(known)}" if known else "results/fid/NAME.txt, or a folder of a training or of samples")
    )


def _from_samples(target: Path, results: Path, name: str, variant: str, about: Any) -> Finished:
    """Return a target of generated images, from samples.json."""
    try:
        recorded = last_run.configuration(results)
        tolerances = about["tolerances"] or {"rtol": 1e-3, "atol": 1e-3}
        guidance = about["guidance"] or {"scale": 1.0, "interval": (0.0, 1.0)}
        values = {
            "n_images": about["n_images"],
            "time_points": about["time_points"],
            "solver": "euler" if about["source_only"] else about["solver"],
            "precision": about["precision"],
            "guidance": {key: guidance[key] for key in ("scale", "interval")},
            "mode_draw": (about["mode_draw"] or "multinomial").rpartition(" ")[2],
            "label_draw": about["label_draw"] or "equal",
            "means_device": "device",
            "features": False,
            **{key: tolerances[key] for key in ("rtol", "atol")},
            **{key: getattr(recorded.sample, key) if recorded else value for key, value in _BATCHES.items()},
        }
        names = _names(name, about["setting"], variant, f"k{about['n_modes']}")
        sample = config.build(config.Sample, values, "sample")
        encoder, size = config.build(config.Encoder, about["encoder"], "encoder"), about["image_size"]
        return Finished(target, results, names, about["inputs"], sample, encoder, size, about["seed"], recorded)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the description of '{target}' is incomplete ({error!r}); make it again") from error


def _from_weights(target: Path, folder: Path) -> Finished:
    """Return a target of trained weights, to be sampled as in the configuration of the last run."""
    results, about = folder.parents[2], weights_metadata(folder / "ema.safetensors")
    recorded = last_run.configuration(results)
    if recorded is None:
        raise FileNotFoundError(
            f"no '{results / last_run.FILE}', which has the section `sample`; run Snakemake once, or open a folder of "
            "results/sample"
        )
    sample = recorded.sample
    if not about["model"].get("label_dropout"):  # these weights cannot do classifier-free guidance
        sample = replace(sample, guidance=config.Guidance(1.0, (0.0, 1.0)))
    digests = {name.removesuffix("_digest"): value for name, value in about.items() if name.endswith("_digest")}
    names = _names(folder.parent.name, about["setting"], folder.name, "*")
    encoder = config.build(config.Encoder, about["settings"]["encoder"], "encoder")
    size, digests["ema"] = about["settings"]["image"]["size"], about["digest"]
    return Finished(target, results, names, digests, sample, encoder, size, about["seed"], recorded)


def _names(name: str, setting: str, variant: str, modes: str) -> dict[str, str]:
    match = re.match(rf"(.+)_{setting}(_ag)?(\.|$)", name)
    if match is None:
        raise ValueError(f"'{name}' has the setting '{setting}', which its name lacks; restore its original name")
    training = re.sub(r"\.t\d+(\.g[\d.]+)?$", "", variant)
    return {"encoder": match[1], "setting": setting, "training": training or "*", "modes": modes}


def _read(path: Path, target: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"'{target}' needs '{path}', which is missing; make it: {snakemake_command(path)}")
    return store.read_json(path)
