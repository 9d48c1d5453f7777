"""Finished targets and the files they were made from, located by path and checked by digest."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmfm import config
from mmfm.config.choices import INCEPTION_FILE
from mmfm.generation.sampler import SampleFiles
from mmfm.models.weights import weights_metadata
from mmfm.workflow import garbage, last_run
from mmfm.workflow.missing import snakemake_command

_PLACES = {
    "ema": ("train", "train/{encoder}_{setting}/{training}/ema.safetensors"),
    "processor": ("processor", "processor/{encoder}/preprocessor_config.json"),
    "guide": ("train", "train/{encoder}_{setting}/*.guide/ema.safetensors"),
    "decoder": ("decoder", "decoder/{encoder}/decoder.safetensors"),
    "stats": ("latent_stats", "latent_stats/{encoder}/stats.pt"),
    "gmm": ("fit_gmm", "gmm/{encoder}/{modes}/gmm.safetensors"),
    "assignment": ("fit_gmm", "gmm/{encoder}/{modes}/assignment.safetensors"),
    "spatial_gmm": ("spatial_gmm", "spatial_gmm/{encoder}/{modes}/spatial_gmm.zarr"),
    "tokens": ("extract", "cls_tokens/{encoder}/cls_tokens.zarr"),
    "listing": ("list_images", "list_images/listing.train.safetensors"),
    "reference": ("fid_reference", "fid_reference/{features}reference.safetensors"),
}
"""Rule, and path below the results folder, by the name under which the digest is recorded."""


@dataclass(frozen=True)
class Finished:
    """A finished target and its description.

    Attributes:
        target: the file or folder that was asked for.
        results: folder that holds the stages' folders.
        names: ``encoder``, ``setting``, ``training`` and ``modes`` in paths; ``*`` if the target does not record it.
        digests: digests of the files it was made from, by name.
        sample: section ``sample`` of its images; for weights, that of the last run.
        encoder: section ``encoder``.
        image_size: S, pixels.
        seed: seed of the images.
        configuration: configuration of the last run; None if not recorded.
    """

    target: Path
    results: Path
    names: dict[str, str]
    digests: dict[str, str]
    sample: config.Sample
    encoder: config.Encoder
    image_size: int
    seed: int
    configuration: config.Config | None

    def file(self, name: str) -> Path:
        """Return a file that the target was made from, or one that was made from the same files.

        Args:
            name: a key of the digests (``ema``, ``gmm``, ``listing``, ...).

        Raises:
            FileNotFoundError: the file is missing; the message names the command that makes it.
            ValueError: the file has changed since.
        """
        rule, template = _PLACES[name]
        place = template.format(features=f"{self._feature_encoder}/" if self._feature_encoder else "", **self.names)
        path, found = self.results / place, sorted(self.results.glob(place))
        if name == "ema":  # given weights are there once for all seeds
            found += sorted(
                self.results.glob(f"train/{self.names['encoder']}_{self.names['setting']}/given*/ema.safetensors")
            )
        exact = "*" not in place
        remedy = snakemake_command(path) if exact else snakemake_command(self.target, rule)
        return self._used(name, found, path, f"make it: {remedy}")

    @property
    def _feature_encoder(self) -> str:
        """Name of the encoder whose tokens are the detector's features; empty for other detectors."""
        if self.configuration is None or self.configuration.fid.detector != "encoder":
            return ""
        return self.configuration.fid.encoder or self.names["encoder"]

    def _encoder_places(self, weights: str) -> list[Path]:
        """Return where an encoder's folder can be."""
        if not weights.startswith("hf:"):
            return list(self._below(weights))
        folder = self.configuration.published.folder if self.configuration else "published"
        return list(self._below(f"{folder}/models/{weights.removeprefix('hf:')}"))

    def encoder_folder(self) -> Path:
        """Return the encoder's folder; errors as in :meth:`file`."""
        hub = self.encoder.weights.startswith("hf:")
        places = self._encoder_places(self.encoder.weights)
        found = [place for place in places if (place / "config.json").is_file()]
        fetched = f"{places[-1] / 'config.json'}"  # as Snakemake names it
        remedy = f"fetch it: snakemake {fetched} --cores all" if hub else "restore it"
        return self._used("encoder", found, places[0], remedy)

    def processor_folder(self) -> Path:
        """Return the folder with the encoder's image normalisation; errors as in :meth:`file`."""
        own = self.results / "processor" / self.names["encoder"]
        if "processor" in self.digests:
            return self.file("processor").parent
        return own if self._digest("encoder") is None and own.is_dir() else self.encoder_folder()

    def detector(self) -> tuple[str, Path]:
        """Return the name of the configured detector and the path of its weights.

        Raises:
            FileNotFoundError: no configuration is recorded.
        """
        if self.configuration is None:
            raise FileNotFoundError(
                f"no '{self.results / last_run.FILE}', which names the detector; load one with mmfm.load_detector"
            )
        if name := self._feature_encoder:
            folders = self._encoder_places(self.configuration.encoders[name].weights)
            places = [folder / "model.safetensors" for folder in folders]
        else:
            weights, folder = self.configuration.fid.weights, self.configuration.published.folder
            fetched = f"{folder}/detectors/{INCEPTION_FILE}"
            places = list(self._below(fetched if weights == "fetch" else weights))
        return self.configuration.fid.detector, next((p for p in places if p.is_file()), places[0])

    def sample_files(self) -> SampleFiles:
        """Return the files that generation reads; errors as in :meth:`file`."""
        ema, decoder, stats = (self.file(name) for name in ("ema", "decoder", "stats"))
        mixture = config.SETTINGS[self.names["setting"]].mixture
        spatial_gmm = self.file("spatial_gmm") if mixture else None
        guide = self.file("guide") if "guide" in self.digests else None
        return SampleFiles(ema, decoder, stats, self.processor_folder(), spatial_gmm, guide)

    def _used(self, name: str, found: list[Path], wanted: Path, remedy: str) -> Path:
        """Return the file with the recorded digest from those found."""
        what = name.replace("_", " ")
        if not found:
            raise FileNotFoundError(f"'{self.target}' needs '{wanted}' ({what}), which is missing; {remedy}")
        digest = self._digest(name)
        if digest is None:
            return found[0]
        for path in found:
            if garbage.has_digest(path, digest):
                return path
        raise ValueError(
            f"'{self.target}' was made with another {what} (digest {digest[:12]}) than '{found[0]}'; make it again: "
            f"{snakemake_command(self.target)}"
        )

    def _digest(self, name: str) -> str | None:
        """Return a file's digest as recorded by the target or by its weights; None if neither recorded it."""
        if name in self.digests or name == "ema":
            return self.digests.get(name)
        return weights_metadata(self.file("ema")).get(f"{name}_digest")

    def _below(self, path: str) -> Iterator[Path]:
        """Yield what a configured path can refer to: it is relative to where Snakemake ran, above ``results``."""
        runs = self.results.parents[1] if self.results.parent.name == "results" else self.results.parent
        yield runs / path
        yield Path(path)
