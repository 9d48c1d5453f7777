"""``fid_reference``: moments of the real images' features, which generated ones are compared with.

Reads the listings, the images and the detector, or an ``.npz`` with ``mu`` and ``sigma``. Writes
``reference.safetensors``; with held-out images it also says how far these are from the reference, the floor.

The unit of work is a shard of consecutive images: its moments in ``shard-00003.safetensors`` of the state, or
``heldout-00001.safetensors``. A kill leaves whole files of moments; a damaged one is made again.
"""

import math
from collections.abc import Iterator
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
from mmfm.stages.runner import Advance, Context, run_units

_SHARD_IMAGES = 1000
_MOST_SHARDS = 128
_OUTPUT = "reference.safetensors"


def fid_reference(
    config: StageConfig, detector: Detector, train: Path | None, heldout: Path | None, out: Path, ranks: Ranks
) -> None:
    """Write the reference: moments of the training images, or those of an ``.npz``.

    Args:
        train: listing of the training images; needed where ``fid.reference`` is ``train``.
        heldout: listing of real images outside the reference, whose distance is the floor; None or an empty one for
            none.

    Raises:
        ValueError: no training listing, or an ``.npz`` that does not fit the detector.
        FileNotFoundError: no such file.
    """
    if config.fid.reference != "train":
        ranks.from_main(lambda: import_npz(config.fid.reference, detector, out))
        return
    if train is None:
        raise ValueError("fid.reference is 'train', so the training images are needed: give --train-listing")
    listings = {"shard": train}
    digests = {"listing": provenance.listing(train).digest, "detector": detector.digest}
    if heldout is not None and len(data.Listing.open(heldout)):
        listings["heldout"] = heldout
        digests["heldout"] = provenance.listing(heldout).digest
    inputs = provenance.Inputs(digests, {"listing": train, "heldout": heldout})
    with Context.open(config, ranks, inputs, {_OUTPUT: out}) as context:
        _FeatureMoments(context, detector, listings).run()


@dataclass(frozen=True)
class _Shard:
    """Images ``rows`` of a listing, whose moments are one file."""

    name: str
    listing: Path
    rows: range
    file: Path

    def __len__(self) -> int:
        return len(self.rows)

    def moments(self) -> CovarianceMoments | None:
        """Return the moments; None if they are missing or damaged, so that they are made again."""
        try:
            found = CovarianceMoments.from_arrays(store.map_arrays(self.file)[0])
        except (FileNotFoundError, ValueError, KeyError):
            return None
        return found if found.count == len(self.rows) else None


def cut(name: str, listing: Path, state: Path) -> list[_Shard]:
    """Cut a listing into shards by its length alone, so that the result is the same for any number of processes.

    A file of moments is 34 MB at 2048 features, so a million images have fewer and larger shards.
    """
    n = len(data.Listing.open(listing))
    cuts = data.ranges(0, n, max(_SHARD_IMAGES, math.ceil(n / _MOST_SHARDS)))
    return [_Shard(name, listing, rows, state / f"{name}-{i:05d}.safetensors") for i, rows in enumerate(cuts)]


class _FeatureMoments:
    """The shards of one run."""

    def __init__(self, context: Context, detector: Detector, listings: dict[str, Path]) -> None:
        self.context, self.detector, self.device = context, detector, context.ranks.device
        self.shards = [shard for name, path in listings.items() for shard in cut(name, path, context.state)]

    def run(self) -> None:
        """Make the shards that are missing, and the reference."""
        moments = 8 * self.detector.dimension * (self.detector.dimension + 1)
        run_units(
            self.context,
            self.shards,
            make=self.take,
            is_done=lambda shard: shard.moments() is not None,
            publish=self.publish,
            bytes_written=lambda: moments * (1 + len(self.shards)),
        )

    def take(self, shards: list[_Shard], advance: Advance) -> None:
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
        """Yield one iterator of image batches per shard, all fed by one loader that reads on across the shards."""
        settings, size = self.context.config.fid, self.context.config.image.size
        cuts = [data.ranges(s.rows.start, s.rows.stop, settings.batch_size) for s in shards]
        indices = [batch for cut in cuts for batch in cut]
        batches = data.image_batches(shards[0].listing, size, indices, settings.workers, pin=self.device.type == "cuda")
        for cut in cuts:
            yield (next(batches)[1] for _ in cut)

    def merged(self, name: str) -> CovarianceMoments | None:
        """Merge the moments of a listing's shards in their order; None if it has none."""
        whole = None
        for shard in self.shards:
            if shard.name == name:
                whole = shard.moments() if whole is None else whole.merge(shard.moments())
        return whole

    def publish(self, finished: Path) -> None:
        """Write the reference."""
        train, heldout, size = self.merged("shard"), self.merged("heldout"), self.context.config.image.size
        sigma, floor = train.covariance(), None
        if heldout is not None and heldout.count > 1:
            floor = frechet_distance(train.mean, sigma, heldout.mean, heldout.covariance())
        about = {
            "detector": self.detector.name,
            "detector_digest": self.detector.digest,
            "source": f"the {train.count:,} training images at {size} x {size} pixels",
            "listing_digest": self.context.inputs.digests["listing"],
            "n_images": train.count,
            "image_size": size,
            "floor": floor,
            "floor_n_images": heldout.count if floor is not None else None,
            "version": self.context.version,
        }
        store.write_arrays(finished / _OUTPUT, {"mu": train.mean.numpy(), "sigma": sigma.numpy()}, about)


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
        "version": STAGES["fid_reference"].version,
    }
    store.write_arrays(out, {"mu": mu, "sigma": sigma}, about)
