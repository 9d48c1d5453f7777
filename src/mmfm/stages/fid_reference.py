"""``fid_reference``: the moments of the real images' features, which generated images are compared with.

Reads: the listings, the images and the detector; or, if ``fid.reference`` names it, an ``.npz`` with ``mu`` and
    ``sigma``.
Writes: ``reference.safetensors``. With held-out images it records the floor: their distance from the reference.
Unit of work: a shard of consecutive images, whose moments are ``shard-00003.safetensors`` in the state, or
    ``heldout-00001.safetensors`` for held-out images.
After a kill: whole shards are kept; missing and damaged ones are made again.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from mmfm import data
from mmfm.config import STAGES, StageConfig
from mmfm.data.moments import CovarianceMoments
from mmfm.evaluation.detector import Detector
from mmfm.evaluation.frechet import frechet_distance
from mmfm.infra import store
from mmfm.infra.distributed import Ranks
from mmfm.stages import provenance
from mmfm.stages.runner import Advance, Context, Work, run_units

_SHARD_IMAGES = 1000
_MOST_SHARDS = 128
_OUTPUT = "reference.safetensors"


def fid_reference(
    config: StageConfig, detector: Detector, train: Path | None, heldout: Path | None, out: Path, ranks: Ranks
) -> None:
    """Write the reference: the moments of the training images, or those in an ``.npz``.

    Args:
        train: listing of the training images; needed if ``fid.reference`` is ``train``.
        heldout: listing of the real images whose distance from the reference is the floor; without it, or if it is
            empty, the floor is unknown.

    Raises:
        ValueError: the training listing is missing, or the ``.npz`` does not fit the detector.
        FileNotFoundError: an input is missing.
    """
    if config.fid.reference != "train":
        ranks.from_main(lambda: import_npz(config.fid.reference, detector, out))
        return
    if train is None:
        raise ValueError("fid.reference is 'train', which needs the training images: give --train-listing")
    digests = {"listing": provenance.listing(train).digest, "detector": detector.digest}
    floor_listing = heldout if heldout is not None and len(data.Listing.open(heldout)) else None
    if floor_listing is not None:
        digests["heldout"] = provenance.listing(floor_listing).digest
    inputs = provenance.Inputs(digests, {"listing": train, "heldout": heldout})
    with Context.open(config, ranks, inputs, {_OUTPUT: out}) as context:
        _FeatureMoments(context, detector, train, floor_listing).run()


@dataclass(frozen=True)
class _Shard:
    """Images ``rows`` of a listing, and the file with their moments."""

    listing: Path
    rows: range
    file: Path

    def __len__(self) -> int:
        return len(self.rows)

    def moments(self) -> CovarianceMoments:
        """Read the moments.

        Raises:
            FileNotFoundError: they have not been made.
            ValueError, KeyError: the file is damaged.
        """
        return CovarianceMoments.from_arrays(store.map_arrays(self.file)[0])

    def is_whole(self) -> bool:
        """Whether the moments exist and are undamaged."""
        try:
            return self.moments().count == len(self.rows)
        except (FileNotFoundError, ValueError, KeyError):
            return False


def cut(name: str, listing: Path, state: Path) -> list[_Shard]:
    """Cut a listing into shards by its length alone, so that the result is the same for any number of processes.

    The moments of a shard take 34 MB at 2048 features, so a million images are cut into fewer and larger shards.
    """
    n = len(data.Listing.open(listing))
    ranges = data.ranges(0, n, max(_SHARD_IMAGES, math.ceil(n / _MOST_SHARDS)))
    return [_Shard(listing, rows, state / f"{name}-{i:05d}.safetensors") for i, rows in enumerate(ranges)]


def _merged(shards: Sequence[_Shard]) -> CovarianceMoments:
    """Merge the moments of shards in their order, one file in memory at a time."""
    return functools.reduce(CovarianceMoments.merge, (shard.moments() for shard in shards))


class _FeatureMoments:
    """The shards of one run."""

    def __init__(self, context: Context, detector: Detector, train: Path, heldout: Path | None) -> None:
        self.context, self.detector, self.device = context, detector, context.ranks.device
        self.train = cut("shard", train, context.state)
        self.heldout = cut("heldout", heldout, context.state) if heldout else []

    def run(self) -> None:
        """Make the missing shards and publish the reference."""
        shards = [*self.train, *self.heldout]
        moments = 8 * self.detector.dimension * (self.detector.dimension + 1)
        work = Work(shards, self.make, is_done=_Shard.is_whole)
        run_units(self.context, work, publish=self.publish, bytes_written=lambda: moments * (1 + len(shards)))

    def make(self, shards: list[_Shard], advance: Advance) -> None:
        """Write the moments of shards."""
        for listing in dict.fromkeys(shard.listing for shard in shards):
            group = [shard for shard in shards if shard.listing == listing]
            for shard, images in zip(group, self.images(group), strict=True):
                moments = CovarianceMoments.zeros(self.detector.dimension, self.device)
                for batch in images:
                    moments.update(self.detector.features(batch))
                    advance(len(batch))
                store.write_arrays(shard.file, moments.to_arrays(), {"first": shard.rows.start})

    def images(self, shards: list[_Shard]) -> Iterator[Iterator[Tensor]]:
        """Yield an iterator of image batches for every shard; one loader prefetches across the shards."""
        section, size = self.context.config.fid, self.context.config.image.size
        batches = [data.ranges(shard.rows.start, shard.rows.stop, section.batch_size) for shard in shards]
        indices = [rows for of_shard in batches for rows in of_shard]
        pin = self.device.type == "cuda"
        loaded = data.image_batches(shards[0].listing, size, indices, section.workers, pin=pin)
        for of_shard in batches:
            yield (next(loaded)[1] for _ in of_shard)

    def publish(self, finished: Path) -> None:
        """Write the reference."""
        train, size = _merged(self.train), self.context.config.image.size
        sigma, floor, n_heldout = train.covariance(), None, sum(map(len, self.heldout))
        if n_heldout > 1:
            heldout = _merged(self.heldout)
            floor = frechet_distance(train.mean, sigma, heldout.mean, heldout.covariance())
        about = {
            "detector": self.detector.name,
            "detector_digest": self.detector.digest,
            "source": f"the {train.count:,} training images at {size} x {size} pixels",
            "listing_digest": self.context.inputs.digests["listing"],
            "n_images": train.count,
            "image_size": size,
            "floor": floor,
            "floor_n_images": None if floor is None else n_heldout,
            "version": self.context.version,
        }
        store.write_arrays(finished / _OUTPUT, {"mu": train.mean.numpy(), "sigma": sigma.numpy()}, about)


def import_npz(path: str | Path, detector: Detector, out: str | Path) -> None:
    """Write the reference from the ``mu`` and ``sigma`` in an ``.npz``.

    Published FIDs on ImageNet at 256 x 256 use ADM's ``VIRTUAL_imagenet256_labeled.npz``. A file with Python objects is
    refused, not unpickled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no ``.npz``, lacks ``mu`` or ``sigma``, or has another number of features.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file '{path}'; set fid.reference to `train` or to an .npz with mu and sigma")
    try:
        with np.load(path, allow_pickle=False) as archive:
            mu, sigma = (np.asarray(archive[name], np.float64) for name in ("mu", "sigma"))
    except KeyError as error:
        raise ValueError(f"'{path}' lacks mu or sigma ({error}); set fid.reference to a file with both") from error
    except (OSError, ValueError, AttributeError, TypeError, EOFError) as error:
        raise ValueError(f"'{path}' can't be read as an .npz of numbers ({error}); download it again") from error
    d = detector.dimension
    if mu.shape != (d,) or sigma.shape != (d, d):
        raise ValueError(
            f"'{path}' has mu {mu.shape} and sigma {sigma.shape}, but the detector has {d} features ({detector.name}); "
            "set fid.detector to the network that made the file"
        )
    frechet_distance(mu, sigma, mu, sigma)  # rejects a broken covariance now, not after hours of sampling
    about = {
        "detector": detector.name,
        "detector_digest": detector.digest,
        "source": f"{path.name} (sha256 {store.file_digest(path)})",
        **dict.fromkeys(("listing_digest", "n_images", "image_size", "floor", "floor_n_images")),  # unknown
        "version": STAGES["fid_reference"].version,
    }
    store.write_arrays(out, {"mu": mu, "sigma": sigma}, about)
