"""What belongs together: the files that a stage reads, their digests, and what each says that it was made from.

A file that says less of itself than this project's do (a published or imported one) can't be checked and passes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfm.config import StageConfig
from mmfm.config.choices import SETTINGS
from mmfm.data.listing import Listing
from mmfm.data.tokens import TokenStore
from mmfm.evaluation.detector import Detector
from mmfm.evaluation.reference import Reference
from mmfm.infra import store
from mmfm.infra.precision import uses_bf16
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.spatial import SpatialMixture
from mmfm.models.weights import weights_metadata


@dataclass(frozen=True)
class Input:
    """A file or folder that a stage reads.

    Attributes:
        name: of its digest; another file's ``NAME_digest`` says that it was made from this one.
        what: what it is, for messages.
        path: where it lies.
        digest: of its contents.
        remedy: what makes it again.
        about: what it says of itself.
        made: how it came from the others, for messages.
    """

    name: str
    what: str
    path: Path
    digest: str
    remedy: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    made: str = "made from"


def listing(path: Path, name: str = "listing") -> Input:
    """The listing of the images."""
    return Input(name, "listing", path, Listing.open(path).digest)


def encoder(folder: Path) -> Input:
    """The frozen encoder's folder."""
    return Input("encoder", "encoder", folder, store.folder_digest(folder))


def statistics(path: Path) -> Input:
    """The latent statistics, with the description that `latent_stats` writes beside them.

    Raises:
        ValueError: the description is of another file.
    """
    beside, digest = path.with_suffix(".json"), store.file_digest(path)
    about = store.read_json(beside) if beside.is_file() else {}
    if about.get("digest", digest) != digest:
        raise ValueError(f"{path} is not the file that {beside} describes; run latent_stats again")
    return Input("stats", "set of latent statistics", path, digest, "run extract and latent_stats", about)


def tokens(opened: TokenStore) -> Input:
    """The store of global tokens."""
    return Input("tokens", "tokens", opened.path, opened.digest, "run extract", opened.attributes)


def mixture(path: Path, opened: Mixture | None = None) -> Input:
    """The mixture of the global tokens; ``opened``, if it is already."""
    about = (opened or Mixture.load(path)).metadata
    return Input("gmm", "mixture", path, about["digest"], "run extract and fit_gmm", about)


def labels(path: Path) -> np.ndarray:
    """Return the mode of every image, (N,) int32, memory-mapped from an assignment.

    Raises:
        ValueError: it is something else.
    """
    arrays, _ = store.map_arrays(path)
    if "labels" not in arrays:
        raise ValueError(f"'{path}' is no assignment of images to modes; make it with fit_gmm")
    return arrays["labels"]


def assignment(path: Path) -> Input:
    """The modes of the images."""
    about = store.map_arrays(path)[1]
    return Input("assignment", "assignment", path, about["digest"], "run fit_gmm", about)


def spatial_mixture(path: Path) -> Input:
    """The mixture over latents."""
    about = SpatialMixture.open(path).attributes
    return Input("spatial_gmm", "spatial mixture", path, about["digest"], "run spatial_gmm", about)


def weights(path: Path, name: str = "ema") -> Input:
    """EMA weights, or those of a guide."""
    about = weights_metadata(path)
    what = "weights" if name == "ema" else "guide"
    return Input(name, what, path, about["digest"], "run train", about, "trained with")


def decoder(path: Path) -> Input:
    """The decoder."""
    return Input("decoder", "decoder", path, store.file_digest(path))


@dataclass(frozen=True)
class Inputs:
    """Files that belong together.

    Attributes:
        digests: by name.
        files: where they lie, by the same names.
    """

    digests: dict[str, str]
    files: dict[str, Path | None] = field(default_factory=dict)

    def made_from(self) -> dict[str, str]:
        """Return the digests as what is made from these files says of itself."""
        return {f"{name}_digest": digest for name, digest in self.digests.items()}


def belong_together(*inputs: Input) -> Inputs:
    """Return digests and places of files, after comparing what each was made from with the others.

    Raises:
        ValueError: two were not made from one another; the message names both and the remedy.
    """
    present = {each.name: each for each in inputs}
    for made in inputs:
        for source in inputs:
            recorded = made.about.get(f"{source.name}_digest")
            if recorded is not None and recorded != source.digest:
                found = f"digest {recorded[:12]}, not {source.digest[:12]}"
                raise ValueError(
                    f"{made.path} was {made.made} another {source.what} than {source.path} ({found}); {made.remedy} "
                    "with this one, or give files that belong together"
                )
    return Inputs({n: i.digest for n, i in present.items()}, {n: i.path for n, i in present.items()})


def reference_for(
    path: Path, detector: Detector, size: int, images: str, listing_digest: str | None = None
) -> Reference:
    """Open the reference that images are compared with.

    Args:
        size: pixels a side of the images, and ``images`` their name for the message.
        listing_digest: of the listing that the reference must be of; None: any.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another detector, size or listing.
    """
    found = Reference.open(path)
    about = found.about
    if about["detector_digest"] != detector.digest:
        raise ValueError(
            f"the reference '{path}' has features of another detector ({about['detector']}, weights "
            f"{about['detector_digest'][:12]}) than {detector.name} ({detector.digest[:12]}); run fid_reference with it"
        )
    if listing_digest is not None and about["listing_digest"] not in (None, listing_digest):
        raise ValueError(
            f"the reference '{path}' is of the images of another listing (digest {about['listing_digest'][:12]}, not "
            f"{listing_digest[:12]}); run fid_reference with this one"
        )
    if about["image_size"] not in (None, size):
        raise ValueError(
            f"{images} have {size} pixels a side, those of the reference {about['image_size']}; run fid_reference with "
            f"image.size={size}"
        )
    return found


def training_identity(config: StageConfig, device: torch.device) -> dict[str, Any]:
    """Return the identity of ``train`` on a device, where ``auto`` must not continue a float32 run in bf16."""
    identity = {"setting": config.setting, **config.identity()}
    if uses_bf16(config.train.precision, device):
        identity["autocast"] = "bf16"
    if SETTINGS[config.setting].mixture and uses_bf16(config.train.means_precision, device):
        identity["means"] = "bf16"
    return identity
