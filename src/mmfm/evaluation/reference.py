"""The stage ``fid_reference``: moments of the real images' features, which generated ones are compared with."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfm import config, data
from mmfm.evaluation.detector import Detector
from mmfm.evaluation.frechet import frechet_distance
from mmfm.infra import space, stage_state, store
from mmfm.infra.distributed import Ranks
from mmfm.infra.progress import Progress
from mmfm.statistics import CovarianceMoments

VERSION = config.VERSIONS["fid_reference"]

_SHARD_IMAGES = 1000
_MOST_SHARDS = 128


@dataclass(frozen=True)
class Reference:
    """Feature moments of real images.

    Attributes:
        mu: (D,) float64.
        sigma: (D, D) float64, unbiased covariance.
        about: metadata, see docs/stages.md.
    """

    mu: np.ndarray
    sigma: np.ndarray
    about: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> "Reference":
        """Open what :func:`make_reference` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is truncated or something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no reference at '{path}'; run the stage fid_reference")
        try:
            arrays, about = store.map_arrays(path)
            found = cls(arrays["mu"], arrays["sigma"], about)
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"'{path}' is no reference of the Frechet distance; make it with fid_reference") from error
        return found

    def require_detector(self, detector: Detector, path: str | Path) -> None:
        """Raise ValueError unless the features are this detector's; ``path`` is where the reference lies."""
        if self.about["detector_digest"] != detector.digest:
            raise ValueError(
                f"the reference '{path}' has features of another detector ({self.about['detector']}, weights "
                f"{self.about['detector_digest'][:12]}) than {detector.name} ({detector.digest[:12]}); run "
                "fid_reference with it"
            )

    def require_size(self, size: int, images: str) -> None:
        """Raise ValueError if it is of images of another size; ``images`` are what has ``size`` pixels a side."""
        if self.about["image_size"] not in (None, size):
            raise ValueError(
                f"{images} have {size} pixels a side, those of the reference {self.about['image_size']}; run "
                f"fid_reference with image.size={size}"
            )

    def require_listing(self, digest: str, path: str | Path) -> None:
        """Raise ValueError if it is of images of another listing than the one with this digest."""
        if self.about["listing_digest"] not in (None, digest):
            raise ValueError(
                f"the reference '{path}' is of the images of another listing (digest "
                f"{self.about['listing_digest'][:12]}, not {digest[:12]}); run fid_reference with this one"
            )


@dataclass(frozen=True)
class _Shard:
    """Images ``rows`` of a listing, whose moments are one file."""

    listing: Path
    rows: range
    file: Path


def make_reference(
    detector: Detector,
    train_listing: str | Path | None,
    heldout_listing: str | Path | None,
    out: str | Path,
    sections: dict[str, Any],
    ranks: Ranks,
) -> None:
    """Write the reference: moments of the training images, or those of an ``.npz``; contract in docs/stages.md.

    Args:
        train_listing: needed where ``fid.reference`` is ``train``.
        heldout_listing: real images outside the reference, whose distance is the floor; None or an empty one for none.
        sections: built sections ``image`` and ``fid``.

    Raises:
        ValueError: no training listing, or an ``.npz`` that does not fit the detector.
        FileNotFoundError: no such file.
    """
    settings: config.Fid = sections["fid"]
    if settings.reference != "train":
        ranks.from_main(lambda: import_npz(settings.reference, detector, out))
        return
    if train_listing is None:
        raise ValueError("fid.reference is 'train', so the training images are needed: give --train-listing")
    listings = {"shard": Path(train_listing)}
    inputs = {"listing": data.Listing.open(train_listing).digest, "detector": detector.digest}
    if heldout_listing is not None and len(heldout := data.Listing.open(heldout_listing)):
        listings["heldout"] = Path(heldout_listing)
        inputs["heldout"] = heldout.digest
    identity = config.identity(sections)
    files = {"listing": train_listing, "heldout": heldout_listing}
    state = ranks.from_main(lambda: stage_state.state_directory(out, "fid_reference", VERSION, identity, inputs, files))
    outputs = {"reference.safetensors": out}
    shards = {name: _shards(name, path, state) for name, path in listings.items()}
    if ranks.from_main(lambda: stage_state.restore(state, outputs)):
        total = sum(len(shard.rows) for group in shards.values() for shard in group)
        Progress("fid_reference", total, "images", done=total, enabled=ranks.is_main)
        return
    moments = 8 * detector.dimension * (detector.dimension + 1)
    bytes_written = moments * (1 + sum(map(len, shards.values())))
    ranks.from_main(lambda: space.require(state, "fid_reference", bytes_written))
    _take_moments([s for group in shards.values() for s in group], detector, sections, ranks)

    def finish() -> None:
        merged = {name: _merge(group) for name, group in shards.items()}
        with stage_state.finishing(state, outputs) as finished:
            file = finished / "reference.safetensors"
            _publish(file, merged["shard"], merged.get("heldout"), detector, inputs, sections["image"].size)

    ranks.from_main(finish)


def _shards(name: str, listing: Path, state: Path) -> list[_Shard]:
    """Cut a listing into shards by its length alone, so that the result is the same for any number of processes.

    A file of moments is 34 MB at 2048 features, so a million images have fewer and larger shards.
    """
    n = len(data.Listing.open(listing))
    size = max(_SHARD_IMAGES, math.ceil(n / _MOST_SHARDS))
    cuts = data.ranges(0, n, size)
    return [_Shard(listing, rows, state / f"{name}-{i:05d}.safetensors") for i, rows in enumerate(cuts)]


def _take_moments(shards: list[_Shard], detector: Detector, sections: dict[str, Any], ranks: Ranks) -> None:
    """Write the moments of every shard that has none yet; the missing ones are dealt to the processes in turn."""
    missing = ranks.from_main(lambda: [i for i, shard in enumerate(shards) if _read(shard) is None])
    total = sum(len(shard.rows) for shard in shards)
    left = sum(len(shards[i].rows) for i in missing)
    progress = Progress("fid_reference", total, "images", done=total - left, enabled=ranks.is_main)
    mine = [shards[i] for i in missing[ranks.rank :: ranks.world]]
    with progress:
        for listing in dict.fromkeys(shard.listing for shard in mine):
            group = [shard for shard in mine if shard.listing == listing]
            for shard, images in zip(group, _images(group, sections, ranks), strict=True):
                moments = CovarianceMoments.zeros(detector.dimension, ranks.device)
                for batch in images:
                    moments.update(detector.features(batch))
                    progress.advance(min(len(batch) * ranks.world, total - progress.done))
                store.write_arrays(shard.file, moments.to_arrays(), {"first": shard.rows.start})
    ranks.barrier()


def _images(shards: list[_Shard], sections: dict[str, Any], ranks: Ranks) -> Iterator[Iterator[torch.Tensor]]:
    """Yield one iterator of image batches per shard, all fed by one loader that reads on across the shards."""
    settings: config.Fid = sections["fid"]
    cuts = [data.ranges(s.rows.start, s.rows.stop, settings.batch_size) for s in shards]
    batches = data.image_batches(
        shards[0].listing, sections["image"].size, [batch for cut in cuts for batch in cut], settings.workers,
        pin=ranks.device.type == "cuda",
    )  # fmt: skip
    for cut in cuts:
        yield (next(batches)[1] for _ in cut)


def _read(shard: _Shard) -> CovarianceMoments | None:
    """Return a finished shard's moments; None if it is missing or damaged, so that it is made again."""
    try:
        moments = CovarianceMoments.from_arrays(store.map_arrays(shard.file)[0])
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return moments if moments.count == len(shard.rows) else None


def _merge(shards: list[_Shard]) -> CovarianceMoments:
    """Merge the moments of shards in their order."""
    merged = _read(shards[0])
    for shard in shards[1:]:
        merged.merge(_read(shard))
    return merged


def _publish(
    out: str | Path, train: CovarianceMoments, heldout: CovarianceMoments | None, detector: Detector,
    inputs: dict[str, str], image_size: int,
) -> None:  # fmt: skip
    sigma = train.covariance()
    floor = None
    if heldout is not None and heldout.count > 1:
        floor = frechet_distance(train.mean, sigma, heldout.mean, heldout.covariance())
    about = {
        "detector": detector.name,
        "detector_digest": detector.digest,
        "source": f"the {train.count:,} training images at {image_size} x {image_size} pixels",
        "listing_digest": inputs["listing"],
        "n_images": train.count,
        "image_size": image_size,
        "floor": floor,
        "floor_n_images": heldout.count if floor is not None else None,
        "version": VERSION,
    }
    store.write_arrays(out, {"mu": train.mean.numpy(), "sigma": sigma.numpy()}, about)


def import_npz(path: str | Path, detector: Detector, out: str | Path) -> None:
    """Write the reference from the ``mu`` and ``sigma`` that an ``.npz`` holds.

    ADM's ``VIRTUAL_imagenet256_labeled.npz`` is the one that published FIDs on ImageNet at 256 x 256 use. Python
    objects in the file are refused, not unpickled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no ``.npz``, lacks one of them, or is of another feature dimension.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file '{path}'; fid.reference is `train` or an .npz with mu and sigma")
    try:
        with np.load(path, allow_pickle=False) as archive:
            mu, sigma = (np.asarray(archive[name], np.float64) for name in ("mu", "sigma"))
    except KeyError as error:
        raise ValueError(f"'{path}' lacks mu or sigma ({error}); fid.reference takes a file with both") from error
    except (OSError, ValueError, AttributeError, TypeError, EOFError) as error:
        raise ValueError(f"'{path}' can't be read as an .npz of numbers ({error}); fetch it again") from error
    d = detector.dimension
    if mu.shape != (d,) or sigma.shape != (d, d):
        raise ValueError(
            f"'{path}' has mu {mu.shape} and sigma {sigma.shape}, but the detector has {d} features ({detector.name}); "
            "set fid.detector to the network that the file was made with"
        )
    frechet_distance(mu, sigma, mu, sigma)  # refuses what is no covariance now, not after the sampling
    about = {
        "detector": detector.name,
        "detector_digest": detector.digest,
        "source": f"{path.name} (sha256 {store.file_digest(path)})",
        "listing_digest": None,
        "n_images": None,
        "image_size": None,
        "floor": None,
        "floor_n_images": None,
        "version": VERSION,
    }
    store.write_arrays(out, {"mu": mu, "sigma": sigma}, about)
