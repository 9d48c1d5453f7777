"""What belongs to a finished target: files found by the scheme of paths and by the digests that they record."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmfm import config
from mmfm.generation.sampler import SampleFiles
from mmfm.infra import store
from mmfm.models.weights import weights_metadata
from mmfm.workflow import garbage

_PLACES = {
    "ema": ("train", "train/{encoder}_{setting}/{training}/ema.safetensors"),
    "guide": ("train", "train/{encoder}_{setting}/*.guide/ema.safetensors"),
    "decoder": ("decoder", "decoder/{encoder}/decoder.safetensors"),
    "stats": ("latent_stats", "latent_stats/{encoder}/stats.pt"),
    "gmm": ("fit_gmm", "gmm/{encoder}/{modes}/gmm.safetensors"),
    "assignment": ("fit_gmm", "gmm/{encoder}/{modes}/assignment.safetensors"),
    "spatial_gmm": ("spatial_gmm", "spatial_gmm/{encoder}/{modes}/spatial_gmm.zarr"),
    "tokens": ("extract", "cls_tokens/{encoder}/cls_tokens.zarr"),
    "listing": ("list_images", "list_images/listing.train.safetensors"),
    "reference": ("fid_reference", "fid_reference/reference.safetensors"),
}
"""Rule and place below the results folder by the name that digests are recorded under."""

_BATCHES = {"batch_size": 64, "shard_size": 500}
"""Where no configuration is recorded; they change images by rounding at most."""


@dataclass(frozen=True)
class Finished:
    """A finished target and what it says of itself.

    Attributes:
        target: the file or folder that was asked for.
        results: folder of the stages' folders.
        names: ``encoder``, ``setting``, ``training`` and ``modes`` of the paths; ``*`` where the target does not say.
        digests: of the files it was made from, by name.
        settings: the section ``sample`` that it was, or would now be, sampled with.
        encoder: the section ``encoder``.
        image_size: S, pixels.
        seed: of the images.
        configuration: that of the last run, or None.
    """

    target: Path
    results: Path
    names: dict[str, str]
    digests: dict[str, str]
    settings: config.Sample
    encoder: config.Encoder
    image_size: int
    seed: int
    configuration: config.Config | None

    def file(self, name: str) -> Path:
        """Return a file that the target was made from, or a file made from the same.

        Args:
            name: key of the recorded digests (``ema``, ``gmm``, ``listing``, ...).

        Raises:
            FileNotFoundError: it is not there; the message names it and the command that makes it.
            ValueError: one is there, but not the one that was used.
        """
        rule, place = _PLACES[name]
        name_of_place = place.format(**self.names)
        path, found = self.results / name_of_place, sorted(self.results.glob(name_of_place))
        given = self.configuration.guide.weights if name == "guide" and self.configuration else "train"
        if given != "train":
            found += [p for p in self._below(given.format(**self.names)) if p.is_file()]
        return self._used(name, found, path, _command(path, self.target, rule))

    def encoder_folder(self) -> Path:
        """Return the folder of the encoder; errors as those of :meth:`file`."""
        fetched = self.results / "fetched" / self.names["encoder"]
        hub = self.encoder.weights.startswith("hf:")
        places = [fetched] if hub else list(self._below(self.encoder.weights))
        found = [place for place in places if (place / "config.json").is_file()]
        remedy = _command(fetched / "config.json", self.target, "") if hub else "put it back, or run where it lies"
        return self._used("encoder", found, places[0], remedy)

    def detector(self) -> tuple[str, Path]:
        """Return kind and weights of the configured detector.

        Raises:
            FileNotFoundError: no configuration is recorded, or the weights are not there.
        """
        if self.configuration is None:
            raise FileNotFoundError(
                f"no '{self.results / garbage.RECORD}', which names the detector; load one with mmfm.load_detector"
            )
        places = list(self._below(self.configuration.fid.weights))
        return self.configuration.fid.detector, next((p for p in places if p.is_file()), places[0])

    def sample_files(self) -> SampleFiles:
        """Return the files that generation reads; errors as those of :meth:`file`."""
        mixture = config.SETTINGS[self.names["setting"]].mixture
        return SampleFiles(
            self.file("ema"), self.file("decoder"), self.file("stats"), self.encoder_folder(),
            self.file("spatial_gmm") if mixture else None, self.file("guide") if "guide" in self.digests else None,
        )  # fmt: skip

    def _used(self, name: str, found: list[Path], wanted: Path, remedy: str) -> Path:
        """Return the file among those found that has the recorded digest."""
        what = name.replace("_", " ")
        if not found:
            raise FileNotFoundError(f"'{self.target}' needs '{wanted}' ({what}), which is not there; {remedy}")
        digest = self._digest(name)
        if digest is None:
            return found[0]
        for path in found:
            if garbage.has_digest(path, digest):
                return path
        raise ValueError(
            f"'{self.target}' was made with another {what} (digest {digest[:12]}) than '{found[0]}'; make it again: "
            f"{_snakemake(self.target)}"
        )

    def _digest(self, name: str) -> str | None:
        """Return a file's digest as the target recorded it, or else the target's weights; None if neither did."""
        if name in self.digests or name == "ema":
            return self.digests.get(name)
        return weights_metadata(self.file("ema")).get(f"{name}_digest")

    def _below(self, path: str) -> Iterator[Path]:
        """Yield the places that a path of the configuration can mean: Snakemake ran above the folder ``results``."""
        runs = self.results.parents[1] if self.results.parent.name == "results" else self.results.parent
        yield runs / path
        yield Path(path)


def find(target: str | Path) -> Finished:
    """Read what a finished target says of itself.

    Args:
        target: ``results/fid/NAME.txt``, or a folder ``results/sample/NAME/VARIANT`` or ``results/train/NAME/VARIANT``,
            or a file in one.

    Raises:
        FileNotFoundError: it is not there; the message names the command that makes it.
        ValueError: it is something else, or damaged.
    """
    target = Path(target)
    if not target.exists():
        raise FileNotFoundError(f"no '{target}'; make it: {_snakemake(target)}")
    place = target.absolute()
    folder = place if place.is_dir() else place.parent
    if place.suffix in (".txt", ".json") and folder.name == "fid":
        record = place.with_name(place.name.removesuffix(place.suffix) + ".json")
        samples = _read(record, target).get("samples")
        return _from_samples(target, folder.parent, record.name.removesuffix(".json"), "", samples)
    if (folder / "samples.json").is_file():
        samples = _read(folder / "samples.json", target)
        return _from_samples(target, folder.parents[2], folder.parent.name, folder.name, samples)
    if (folder / "ema.safetensors").is_file():
        return _from_weights(target, folder)
    known = sorted(map(str, target.glob("fid/*.txt"))) if target.is_dir() else []
    raise ValueError(
        f"'{target}' is no finished target; give "
        + (f"one of {', '.join(known)}" if known else "results/fid/NAME.txt, or a folder of a training or of samples")
    )


def _from_samples(target: Path, results: Path, name: str, variant: str, about: Any) -> Finished:
    """Make a target of the description of its samples."""
    try:
        setting, source_only, tolerances = about["setting"], about["source_only"], about["tolerances"] or {}
        guidance = about["guidance"] or {"scale": 1.0, "interval": (0.0, 1.0)}
        encoder, recorded = about["encoder"], _configuration(results)
        draw = (about["mode_draw"] or "multinomial").rpartition(" ")[2]
        values = {
            "n_images": about["n_images"], "time_points": about["time_points"],
            "solver": "euler" if source_only else about["solver"], "precision": about["precision"],
            "rtol": tolerances.get("rtol", 1e-3), "atol": tolerances.get("atol", 1e-3), "mode_draw": draw,
            "label_draw": about["label_draw"] or "equal", "means_device": "device", "features": False,
            "guidance": {key: guidance[key] for key in ("scale", "interval")},
            **{key: getattr(recorded.sample, key) if recorded else value for key, value in _BATCHES.items()},
        }  # fmt: skip
        names = _names(name, setting, variant, f"k{about['n_modes']}")
        return Finished(
            target, results, names, about["inputs"], config.build(config.Sample, values, "sample"),
            config.build(config.Encoder, encoder, "encoder"), about["image_size"], about["seed"], recorded,
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{target}' has no whole description ({error!r}); make it again") from error


def _from_weights(target: Path, folder: Path) -> Finished:
    """Make a target of trained weights: sampled as the recorded configuration says."""
    results, about = folder.parents[2], weights_metadata(folder / "ema.safetensors")
    recorded = _configuration(results)
    if recorded is None:
        raise FileNotFoundError(
            f"no '{results / garbage.RECORD}', which says how weights are sampled; run Snakemake once, or open the "
            "result of a sampling"
        )
    settings = recorded.sample
    if not about["model"].get("label_dropout"):  # no classifier-free guidance; the key is for settings that have it
        settings = replace(settings, guidance=config.Guidance(1.0, (0.0, 1.0)))
    digests = {name.removesuffix("_digest"): value for name, value in about.items() if name.endswith("_digest")}
    names = _names(folder.parent.name, about["setting"], folder.name, "*")
    return Finished(
        target, results, names, {**digests, "ema": about["digest"]}, settings,
        config.build(config.Encoder, about["settings"]["encoder"], "encoder"), about["settings"]["image"]["size"],
        about["seed"], recorded,
    )  # fmt: skip


def _names(name: str, setting: str, variant: str, modes: str) -> dict[str, str]:
    match = re.match(rf"(.+)_{setting}(_ag)?(\.|$)", name)
    if match is None:
        raise ValueError(f"'{name}' is of setting '{setting}', which its name does not say; give it back its name")
    training = re.sub(r"\.t\d+(\.g[\d.]+)?$", "", variant)
    return {"encoder": match[1], "setting": setting, "training": training or "*", "modes": modes}


def _configuration(results: Path) -> config.Config | None:
    record = garbage.recorded(results / garbage.RECORD)
    return record[0] if record else None


def _read(path: Path, target: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"'{target}' needs '{path}', which is not there; make it: {_snakemake(path)}")
    return store.read_json(path)


def _snakemake(path: Path) -> str:
    """Return the command that makes a file, which Snakemake knows by its place below the folder where it runs."""
    parts = path.absolute().parts
    start = max((i for i, part in enumerate(parts) if part == "results"), default=0)
    return f"snakemake {Path(*parts[start:])} --cores all"


def _command(path: Path, target: Path, rule: str) -> str:
    """Return the remedy for a missing file; a rule is named where the file's own name is not known."""
    return f"make it: {_snakemake(target)} -R {rule}" if "*" in str(path) else f"make it: {_snakemake(path)}"
