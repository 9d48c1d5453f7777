"""Exported targets: folders that ``mmfm export`` wrote, opened without the results that they came from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfm import config
from mmfm.generation.sampler import SampleFiles
from mmfm.infra import store
from mmfm.published.mixtures import import_mixture, import_spatial
from mmfm.published.networks import Expected, import_decoder, import_weights
from mmfm.workflow.finished import Finished

ABOUT = "mmfm.json"
"""Name of the file that describes an exported folder."""

FILES = {
    "ema": "ema.safetensors",
    "guide": "guide.safetensors",
    "decoder": "decoder.safetensors",
    "stats": "stats.pt",
    "gmm": "gmm.safetensors",
    "spatial_gmm": "spatial_gmm.zarr",
}
"""Names of the files in a folder for the hub."""

PUBLISHED = {
    "ema": "checkpoint.pt",
    "guide": "guide.pt",
    "decoder": "decoder.pt",
    "stats": "stat.pt",
    "gmm": "gmm.pkl",
    "spatial_gmm": "spatial_gmm.pkl",
}
"""Names of the files in the published layout."""

_IMPORTED = "imported"


@dataclass(frozen=True)
class Exported(Finished):
    """An exported folder, which holds all that generation needs.

    Attributes:
        files: paths of the files, by the names in :data:`FILES`.
    """

    files: dict[str, Path] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        """Return a file of the folder.

        Raises:
            FileNotFoundError: it has none of this name; only the results of the workflow have.
        """
        if name not in self.files:
            raise FileNotFoundError(
                f"the exported '{self.target}' has no {name.replace('_', ' ')}; open the results it is from"
            )
        return self.files[name]

    def processor_folder(self) -> Path:
        """Return the folder with the encoder's image normalisation."""
        return self.results

    def sample_files(self) -> SampleFiles:
        """Return the files that generation reads."""
        found = {name: self.files.get(name) for name in ("spatial_gmm", "guide")}
        ema, decoder, stats = (self.file(name) for name in ("ema", "decoder", "stats"))
        return SampleFiles(ema, decoder, stats, self.results, found["spatial_gmm"], found["guide"])


def read(folder: Path) -> Exported:
    """Open an exported folder; one of the published layout is imported at its first opening, into ``imported/`` in it.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or does not belong to the others.
    """
    about = store.read_json(folder / ABOUT)
    try:
        names, size, seed = about["names"], about["image_size"], about["seed"]
        sample = config.build(config.Sample, about["sample"], "sample")
        encoder = config.build(config.Encoder, about["encoder"], "encoder")
        inside = folder if about["layout"] == "hub" else _imported(folder, about)
    except (KeyError, TypeError) as error:
        raise ValueError(f"'{folder / ABOUT}' is incomplete ({error!r}); export it again") from error
    files = {name: inside / place for name, place in FILES.items() if (inside / place).exists()}
    return Exported(folder, folder, names, {}, sample, encoder, size, seed, None, files)


def _imported(folder: Path, about: dict[str, Any]) -> Path:
    """Import the files of the published layout, as far as that has not been done; return where they are."""
    inside, setting = folder / _IMPORTED, about["names"]["setting"]
    stats = inside / FILES["stats"]
    if not stats.exists():
        with store.whole_file(stats) as partial:
            partial.write_bytes((folder / PUBLISHED["stats"]).read_bytes())
    modes = None
    if (folder / PUBLISHED["gmm"]).exists():
        modes = about["modes"]
        gmm, spatial = inside / FILES["gmm"], inside / FILES["spatial_gmm"]
        if not gmm.exists():
            import_mixture(folder / PUBLISHED["gmm"], gmm, stats, modes)
        if not spatial.exists():
            import_spatial(folder / PUBLISHED["spatial_gmm"], spatial, stats, gmm)
    for name in ("ema", "guide"):
        sizes = about["model" if name == "ema" else "guide"]
        if sizes is not None and not (inside / FILES[name]).exists():
            model = config.Model(*(tuple(sizes[key]) for key in ("hidden_size", "depth", "num_heads")))
            rounding = about["means_precision"]
            expected = Expected(setting, model, modes, None, about["encoder"], about["image_size"], rounding)
            import_weights(folder / PUBLISHED[name], inside / FILES[name], stats, expected)
    decoder = inside / FILES["decoder"]
    if not decoder.exists():
        import_decoder(folder / PUBLISHED["decoder"], decoder, stats, about["decoder_heads"], about["image_size"])
    return inside
