"""The files that a training stage reads, and whether they belong together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfm.data import Listing
from mmfm.flow.source import SETTINGS
from mmfm.infra import store
from mmfm.mixture.gaussian import Mixture


@dataclass(frozen=True)
class TrainFiles:
    """Files that ``train`` reads; the two mixtures in the settings with a mixture, the decoder for previews."""

    listing: Path
    encoder_weights: Path
    stats: Path
    gmm: Path | None = None
    spatial_gmm: Path | None = None
    decoder: Path | None = None

    def digests(self, setting: str) -> dict[str, str]:
        """Return the digests of what the weights depend on, after checking that the files belong together.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a mixture is missing, or two files were made from different images, encoders or mixtures; the
                message names the file and the remedy.
        """
        if setting not in SETTINGS:
            raise ValueError(f"unknown setting '{setting}'; it must be one of {', '.join(SETTINGS)}")
        listing = Listing.open(self.listing)
        found = {"listing": listing.digest, "encoder": store.folder_digest(self.encoder_weights)}
        about = _about_statistics(self.stats)
        found["stats"] = about["digest"]
        names = {
            "listing": f"the listing {self.listing}",
            "encoder": f"the encoder {self.encoder_weights}",
            "stats": f"the statistics {self.stats}",
            "gmm": f"the mixture {self.gmm}",
        }
        same = _Comparison(names, found)
        same.check(f"the statistics {self.stats}", about, ("listing", "encoder"), "extract and latent_stats")
        if not SETTINGS[setting].mixture:
            return found
        for name, path in (("--gmm", self.gmm), ("--spatial-gmm", self.spatial_gmm)):
            if path is None:
                raise ValueError(f"setting '{setting}' draws its source from a mixture: give {name}")
        mixture = Mixture.load(self.gmm)
        found["gmm"] = mixture.metadata["digest"]
        same.check(f"the mixture {self.gmm}", mixture.metadata, ("listing",), "fit_gmm")
        from mmfm.mixture.spatial import SpatialMixture

        spatial = SpatialMixture.open(self.spatial_gmm).attributes
        found["spatial_gmm"] = spatial["digest"]
        parts = ("listing", "encoder", "stats", "gmm")
        same.check(f"the spatial mixture {self.spatial_gmm}", spatial, parts, "spatial_gmm")
        return found


@dataclass(frozen=True)
class _Comparison:
    """Compares what files say they were made from with the present files.

    Attributes:
        names: what the present files are called in messages.
        present: their digests, filled in as they become known.
    """

    names: dict[str, str]
    present: dict[str, str]

    def check(self, thing: str, about: dict[str, Any], parts: tuple[str, ...], stage: str) -> None:
        """Raise ValueError if ``thing`` was made from other parts; what it does not say (imported files) passes."""
        for part in parts:
            recorded = about.get(f"{part}_digest")
            if recorded is not None and recorded != self.present[part]:
                raise ValueError(
                    f"{thing} was not made from {self.names[part]} (digest {recorded[:12]}, not "
                    f"{self.present[part][:12]}); run {stage} with it, or give the files that belong together"
                )


def _about_statistics(path: Path) -> dict[str, Any]:
    """What is known of latent statistics: the JSON file beside them, or only their digest."""
    beside = path.with_suffix(".json")
    return store.read_json(beside) if beside.is_file() else {"digest": store.file_digest(path)}
