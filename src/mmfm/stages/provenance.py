"""Provenance: the digests of the files that a stage reads, and the check that these files belong together.

Files of this project record the digests of the files that they were made from. Published or imported files that record
none can't be checked and are accepted.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmfm.autoencoder.decoder import read_provenance
from mmfm.data.listing import Listing
from mmfm.data.tokens import TokenStore
from mmfm.evaluation.detector import Detector
from mmfm.evaluation.reference import Reference
from mmfm.infra import npz, store
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.spatial import SpatialMixture
from mmfm.models.weights import weights_metadata


@dataclass(frozen=True)
class Input:
    """A file or folder that a stage reads.

    Attributes:
        name: short name; files made from this one record its digest as ``NAME_digest``.
        noun: what the file is, for error messages.
        path: where it is; None for tokens that are in memory only.
        digest: digest of its contents.
        remedy: what makes it again, for error messages.
        about: its metadata, with the digests of what it was made from.
        made: how it relates to the others ("made from", "trained with"), for error messages.
    """

    name: str
    noun: str
    path: Path | None
    digest: str
    remedy: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    made: str = "made from"


def listing(path: Path, name: str = "listing") -> Input:
    """The listing of the images."""
    return Input(name, "listing", path, Listing.open(path).digest)


def encoder(folder: Path) -> Input:
    """The folder of the frozen encoder."""
    return Input("encoder", "encoder", folder, store.folder_digest(folder))


def processor(folder: Path) -> Input:
    """What sampling needs of the encoder: its folder, or one that holds its image normalisation alone."""
    known = [name for name in store.MODEL_FILES if (folder / name).is_file()]
    if known != ["preprocessor_config.json"]:
        return encoder(folder)
    return Input("processor", "image normalisation", folder, store.file_digest(folder / "preprocessor_config.json"))


def statistics(path: Path) -> Input:
    """The latent statistics, with the metadata that `latent_stats` writes beside them.

    Raises:
        ValueError: the metadata describe a different file.
    """
    description, digest = path.with_suffix(".json"), store.file_digest(path)
    about = store.read_json(description) if description.is_file() else {}
    if about.get("digest", digest) != digest:
        raise ValueError(f"{path} is not the file that {description} describes; run latent_stats again")
    return Input("stats", "set of latent statistics", path, digest, "run extract and latent_stats", about)


def tokens(opened: TokenStore) -> Input:
    """The store of global tokens."""
    return Input("tokens", "tokens", opened.path, opened.digest, "run extract", opened.attributes)


def mixture(path: Path, opened: Mixture | None = None) -> Input:
    """The mixture of the global tokens; pass ``opened`` if it is already loaded."""
    about = (opened or Mixture.load(path)).metadata
    return Input("gmm", "mixture", path, about["digest"], "run extract and fit_gmm", about)


def labels(path: Path) -> np.ndarray:
    """Return the mode of every image, (N,) int32, memory-mapped from an assignment file.

    Raises:
        ValueError: the file is not an assignment.
    """
    arrays, _ = store.map_arrays(path)
    if "labels" not in arrays:
        raise ValueError(f"'{path}' does not assign images to modes; make it with fit_gmm")
    return arrays["labels"]


def assignment(path: Path) -> Input:
    """The assignment of the images to modes."""
    about = store.map_arrays(path)[1]
    return Input("assignment", "assignment", path, about["digest"], "run fit_gmm", about)


def spatial_mixture(path: Path) -> Input:
    """The spatial mixture."""
    about = SpatialMixture.open(path).attributes
    return Input("spatial_gmm", "spatial mixture", path, about["digest"], "run spatial_gmm", about)


def weights(path: Path, name: str = "ema") -> Input:
    """The EMA weights; with the name ``guide`` those of the guide."""
    about = weights_metadata(path)
    noun = "weights" if name == "ema" else "guide"
    return Input(name, noun, path, about["digest"], "run train", about, "trained with")


def decoder(path: Path) -> Input:
    """The decoder; one that was trained here knows its encoder."""
    known = read_provenance(path).get("digests", {})
    about = {"encoder_digest": known["encoder"]} if "encoder" in known else {}
    return Input("decoder", "decoder", path, store.file_digest(path), "run train_decoder", about, "trained with")


@dataclass(frozen=True)
class Inputs:
    """The files that a stage reads.

    Attributes:
        digests: digest of every file, by name.
        files: paths, by the same names.
    """

    digests: dict[str, str]
    files: dict[str, Path | None] = field(default_factory=dict)

    def made_from(self) -> dict[str, str]:
        """Return the digests as files made from these record them."""
        return {f"{name}_digest": digest for name, digest in self.digests.items()}


def belong_together(*inputs: Input) -> Inputs:
    """Return digests and paths of the files, after comparing the digests that each records with the others.

    Raises:
        ValueError: a file was made from another one than given here; the message names both and the remedy.
    """
    for made in inputs:
        for source in inputs:
            recorded = made.about.get(f"{source.name}_digest")
            if recorded is not None and recorded != source.digest:
                raise ValueError(
                    f"{made.path} was {made.made} another {source.noun} than {source.path} (digest {recorded[:12]}, "
                    f"not {source.digest[:12]}); {made.remedy} with this one, or give files that belong together"
                )
    return Inputs({each.name: each.digest for each in inputs}, {each.name: each.path for each in inputs})


def extracted_alike(ours: TokenStore, theirs: TokenStore) -> None:
    """Raise ValueError unless two sets of tokens were extracted by the same encoder with the same keys."""
    for name in ("encoder_digest", "settings"):
        if ours.attributes.get(name) != theirs.attributes.get(name):
            raise ValueError(
                f"the tokens in '{theirs.path}' were extracted with another {name.removesuffix('_digest')} than those "
                f"in '{ours.path}'; extract both with one configuration"
            )


def real_images(train: Path, heldout: Path | None) -> tuple[Path, bool]:
    """Return the listing of the real images to compare with, the held-out ones if there are any, and whether it is."""
    if heldout is not None and len(Listing.open(heldout)):
        return heldout, True
    return train, False


def generated(images_path: Path, samples_path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Open generated images (n, S, S, 3) uint8, memory-mapped, and their description.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one of them is something else.
    """
    images, samples = npz.map_array(images_path), store.read_json(samples_path)
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(f"'{images_path}' holds {images.dtype} {images.shape}, but images are uint8 (n, S, S, 3)")
    if not isinstance(samples, dict) or "images_digest" not in samples:
        raise ValueError(f"'{samples_path}' does not describe images; give the samples.json that sample wrote")
    return images, samples


def described(images: np.ndarray, images_path: Path, samples: dict[str, Any], samples_path: Path) -> str:
    """Return the digest of generated images, after comparing it with the one that their description has.

    Raises:
        ValueError: these are other images.
    """
    digest = store.array_digest(images)
    if samples.get("images_digest") != digest:
        raise ValueError(f"'{samples_path}' does not describe the images in '{images_path}'; run sample again")
    return digest


def reference_for(
    path: Path, detector: Detector, size: int, images: str, listing_digest: str | None = None
) -> Reference:
    """Open the reference for a Frechet distance, after checking that it fits.

    Args:
        size: side of the generated images in pixels.
        images: what to call these images in the error message.
        listing_digest: digest of the listing that the reference must belong to; None accepts any.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or was made with another detector, image size or listing.
    """
    reference = Reference.open(path)
    about = reference.about
    if about["detector_digest"] != detector.digest:
        raise ValueError(
            f"the reference '{path}' was made with another detector ({about['detector']}, weights "
            f"{about['detector_digest'][:12]}) than {detector.name} ({detector.digest[:12]}); run fid_reference with "
            "this one"
        )
    if listing_digest is not None and about["listing_digest"] not in (None, listing_digest):
        raise ValueError(
            f"the reference '{path}' was made from the images of another listing (digest "
            f"{about['listing_digest'][:12]}, not {listing_digest[:12]}); run fid_reference with this one"
        )
    if about["image_size"] not in (None, size):
        raise ValueError(
            f"{images} are {size} pixels wide, those of the reference {about['image_size']}; run fid_reference with "
            f"image.size={size}"
        )
    return reference
