"""The files that a training stage reads, and whether they belong together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfm.data import Listing
from mmfm.infra import store
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.spatial import SpatialMixture
from mmfm.settings import SETTINGS


@dataclass(frozen=True)
class TrainFiles:
    """Files that ``train`` reads; the two mixtures in the settings with a mixture, the decoder for previews."""

    listing: Path
    encoder_weights: Path
    stats: Path
    gmm: Path | None = None
    spatial_gmm: Path | None = None
    decoder: Path | None = None

    @property
    def paths(self) -> dict[str, Path | None]:
        """The files by the names of their digests."""
        return {"encoder" if name == "encoder_weights" else name: path for name, path in vars(self).items()}

    def digests(self, setting: str) -> dict[str, str]:
        """Return the digests of what the weights depend on, after checking that the files belong together.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a mixture is missing, or two files were made from different images, encoders or mixtures; the
                message names the file and the remedy.
        """
        if setting not in SETTINGS:
            raise ValueError(f"unknown setting '{setting}'; it must be one of {', '.join(SETTINGS)}")
        found = {"listing": Listing.open(self.listing).digest, "encoder": store.folder_digest(self.encoder_weights)}
        found["stats"] = store.file_digest(self.stats)
        beside = self.stats.with_suffix(".json")
        about = store.read_json(beside) if beside.is_file() else {}
        self._compare(self.stats, about, found, "extract and latent_stats")
        if about.get("digest", found["stats"]) != found["stats"]:
            raise ValueError(f"{self.stats} is not the file that {beside} describes; run latent_stats again")
        if not SETTINGS[setting].mixture:
            return found
        for name, path in (("--gmm", self.gmm), ("--spatial-gmm", self.spatial_gmm)):
            if path is None:
                raise ValueError(f"setting '{setting}' draws its source from a mixture: give {name}")
        mixture = Mixture.load(self.gmm).metadata
        self._compare(self.gmm, mixture, found, "fit_gmm")
        found["gmm"] = mixture["digest"]
        spatial = SpatialMixture.open(self.spatial_gmm).attributes
        self._compare(self.spatial_gmm, spatial, found, "spatial_gmm")
        found["spatial_gmm"] = spatial["digest"]
        return found

    def _compare(self, path: Path, about: dict[str, Any], present: dict[str, str], stage: str) -> None:
        """Raise ValueError if ``path`` was made from other inputs; what it does not say (imported files) passes.

        Args:
            about: what the file says of itself; ``listing_digest``, ``encoder_digest``, ...
            present: digests of the present files.
            stage: what makes the file again.
        """
        files = {
            "listing": ("listing", self.listing),
            "encoder": ("encoder", self.encoder_weights),
            "stats": ("latent statistics", self.stats),
            "gmm": ("mixture", self.gmm),
        }
        for part, digest in present.items():
            recorded = about.get(f"{part}_digest")
            if recorded is not None and recorded != digest:
                what, given = files[part]
                raise ValueError(
                    f"{path} was made from another {what} than {given} (digest {recorded[:12]}, not {digest[:12]}); "
                    f"run {stage} with this one, or give files that belong together"
                )


def image_classes(listing: Listing) -> tuple[Tensor, int]:
    """Return the class of every image, (N,) int64 on the CPU, and the number of classes.

    Raises:
        ValueError: labels that name no class of the listing, or one class only.
    """
    labels, count = torch.from_numpy(listing.labels.astype("int64")), len(listing.classes)
    if count < 2:
        raise ValueError(
            f"the images of '{listing.root}' are of one class; class labels need at least two class folders in "
            "data.root: sort the images into folders, or choose a setting without classes"
        )
    outside = ((labels < 0) | (labels >= count)).nonzero()
    if len(outside):
        image = int(outside[0])
        raise ValueError(
            f"image {image} of the listing has label {int(labels[image])}, but there are {count} classes (labels 0 to "
            f"{count - 1}); run list_images again"
        )
    return labels, count
