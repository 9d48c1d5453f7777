"""``fid_reference``: what generated images are compared with: statistics of the real images' features.

Reads: the listings, the images and the detector; or, if ``fid.reference`` names it, an ``.npz`` with ``mu`` and
    ``sigma``, or with images.
Writes: ``reference.safetensors``. With held-out images it records the floor: their distance from the reference. Spatial
    moments and features of single images are kept only if a metric in ``fid.metrics`` needs them.
Unit of work: a shard of consecutive images, whose statistics are ``shard-00003.safetensors`` in the state, or
    ``heldout-00001.safetensors`` for held-out images. An ``.npz`` is read, or its images are seen, in one go.
After a kill: whole shards are kept; missing and damaged ones are made again.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmfm import data
from mmfm.config import STAGES, Fid, StageConfig
from mmfm.config.choices import METRICS
from mmfm.data.moments import CovarianceMoments
from mmfm.evaluation.adm import AdmFile
from mmfm.evaluation.collected import Statistics
from mmfm.evaluation.detector import Detector, Outputs
from mmfm.evaluation.features import image_statistics
from mmfm.evaluation.frechet import frechet_distance
from mmfm.evaluation.scores import reference_kinds
from mmfm.infra import store
from mmfm.infra.distributed import Ranks
from mmfm.stages import provenance
from mmfm.stages.runner import Advance, Context, Work, run_units

_SHARD_IMAGES = 1000
_MOST_SHARDS = 128
_OUTPUT = "reference.safetensors"
_SPATIAL = "spatial_"
"""Prefix of the moments of the spatial features in a shard."""


def fid_reference(
    config: StageConfig, detector: Detector, train: Path | None, heldout: Path | None, out: Path, ranks: Ranks
) -> None:
    """Write the reference: the statistics of the training images, or those in an ``.npz``.

    Args:
        train: listing of the training images; needed if ``fid.reference`` is ``train``.
        heldout: listing of the real images whose distance from the reference is the floor; without it, or if it is
            empty, the floor is unknown.

    Raises:
        ValueError: the training listing is missing, or the ``.npz`` does not fit the detector.
        FileNotFoundError: an input is missing.
    """
    if config.fid.reference != "train":
        import_npz(config.fid.reference, detector, out, config.fid, config.image.size, ranks)
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
    """Images ``rows`` of a listing, and the file with their statistics: of which kinds, and in the bank whose."""

    listing: Path
    rows: range
    file: Path
    kept: tuple[int, ...] = ()
    kinds: frozenset[str] = frozenset({"gaussian"})

    def __len__(self) -> int:
        return len(self.rows)

    def moments(self, prefix: str = "") -> CovarianceMoments:
        """Read the moments of the features, or with the prefix :data:`_SPATIAL` those of the spatial ones.

        Raises:
            FileNotFoundError: they have not been made.
            ValueError, KeyError: the file is damaged.
        """
        arrays = store.map_arrays(self.file)[0]
        return CovarianceMoments.from_arrays({name: arrays[prefix + name] for name in ("count", "mean", "m2")})

    def bank(self) -> np.ndarray:
        """Map the features of the images ``kept``, (n, D) float32."""
        return store.map_arrays(self.file)[0]["bank"]

    def is_whole(self) -> bool:
        """Whether the moments exist and are undamaged."""
        try:
            return self.moments().count == len(self.rows)
        except (FileNotFoundError, ValueError, KeyError):
            return False


def cut(
    name: str, listing: Path, state: Path, kinds: frozenset[str] = frozenset({"gaussian"}), most: int = 0
) -> list[_Shard]:
    """Cut a listing into shards.

    The moments of a shard take 34 MB at 2048 features, so a million images are cut into fewer and larger shards.

    Args:
        kinds: of statistics.
        most: number of images in the bank.
    """
    n = len(data.Listing.open(listing))
    spaced, found = data.evenly(n, most if "bank" in kinds else 0), []
    for i, rows in enumerate(data.shards(n, _SHARD_IMAGES, _MOST_SHARDS)):
        first, last = np.searchsorted(spaced, (rows.start, rows.stop))
        file = state / f"{name}-{i:05d}.safetensors"
        found.append(_Shard(listing, rows, file, tuple(spaced[first:last].tolist()), kinds))
    return found


def _merged(shards: Sequence[_Shard], prefix: str = "") -> CovarianceMoments:
    """Merge the moments of shards in their order, one file in memory at a time."""
    return functools.reduce(CovarianceMoments.merge, (shard.moments(prefix) for shard in shards))


class _FeatureMoments:
    """The shards of one run."""

    def __init__(self, context: Context, detector: Detector, train: Path, heldout: Path | None) -> None:
        self.context, self.detector, self.device = context, detector, context.ranks.device
        section = context.config.fid
        self.kinds = reference_kinds(section.metrics)
        self.train = cut("shard", train, context.state, self.kinds, section.reference_images)
        self.heldout = cut("heldout", heldout, context.state) if heldout else []

    def run(self) -> None:
        """Make the missing shards and publish the reference."""
        shards = [*self.train, *self.heldout]
        dimensions = [self.detector.dimension, self.detector.spatial_dimension if "spatial" in self.kinds else 0]
        moments = sum(8 * d * (d + 1) for d in dimensions)
        work = Work(shards, self.make, is_done=_Shard.is_whole)
        run_units(self.context, work, publish=self.publish, bytes_written=lambda: moments * (1 + len(shards)))

    def make(self, shards: list[_Shard], advance: Advance) -> None:
        """Write the moments of shards."""
        section, size, pin = self.context.config.fid, self.context.config.image.size, self.device.type == "cuda"
        for listing in dict.fromkeys(shard.listing for shard in shards):
            group = [shard for shard in shards if shard.listing == listing]
            parts = data.batches_of_parts(
                listing, size, [shard.rows for shard in group], section.batch_size, section.workers, pin
            )
            for shard, images in zip(group, parts, strict=True):
                store.write_arrays(shard.file, self.statistics(shard, images, advance), {"first": shard.rows.start})

    def statistics(self, shard: _Shard, images: Iterator[Tensor], advance: Advance) -> dict[str, np.ndarray]:
        """Return the arrays of a shard's file."""
        detector, first, bank = self.detector, shard.rows.start, []
        moments = CovarianceMoments.zeros(detector.dimension, self.device)
        spatial = None
        if "spatial" in shard.kinds:
            spatial = CovarianceMoments.zeros(detector.spatial_dimension, self.device)
        for batch in images:
            outputs = detector.outputs(batch) if spatial is not None else Outputs(detector.features(batch))
            moments.update(outputs.features)
            if spatial is not None and outputs.spatial is not None:
                spatial.update(outputs.spatial)
            kept = [row - first for row in shard.kept if first <= row < first + len(batch)]
            bank.append(outputs.features[kept].cpu().numpy())
            first += len(batch)
            advance(len(batch))
        arrays = moments.to_arrays()
        if spatial is not None:
            arrays |= {_SPATIAL + name: array for name, array in spatial.to_arrays().items()}
        return arrays | ({"bank": np.concatenate(bank)} if "bank" in shard.kinds else {})

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
        arrays = {"mu": train.mean.numpy(), "sigma": sigma.numpy()}
        if "spatial" in self.kinds:
            spatial = _merged(self.train, _SPATIAL)
            arrays |= {"mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance().numpy()}
        if "bank" in self.kinds:
            arrays["bank"] = np.concatenate([shard.bank() for shard in self.train])
        store.write_arrays(finished / _OUTPUT, arrays, about)


def import_npz(path: str | Path, detector: Detector, out: str | Path, section: Fid, size: int, ranks: Ranks) -> None:
    """Write the reference from an ``.npz`` for the ADM evaluator; a collective call.

    Published FIDs on ImageNet at 256 x 256 use ADM's ``VIRTUAL_imagenet256_labeled.npz``. Its moments are used as they
    are, and features of single images are computed from those in ``arr_0``, as are moments that a file lacks. A file
    with Python objects is refused, not unpickled.

    Args:
        section: says which metrics the reference must serve.
        size: side of the generated images, pixels.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no such ``.npz``, can't serve a metric, or has another number of features or image size.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file '{path}'; set fid.reference to `train` or to an .npz with mu and sigma")
    file = AdmFile.open(path)
    for name, moments, d in (("mu", file.gaussian, detector.dimension), ("mu_s", file.spatial, None)):
        d = detector.spatial_dimension or None if name == "mu_s" else d
        if moments is not None and d is not None and len(moments.mean) != d:
            raise ValueError(
                f"'{path}' has {name} ({len(moments.mean)},), but the detector has {d} features ({detector.name}); set "
                "fid.detector to the network that made the file"
            )
    known = {"gaussian": file.gaussian, "spatial": file.spatial}
    missing = frozenset(kind for kind in reference_kinds(section.metrics) if known.get(kind) is None)
    seen = _of_images(path, file.images, missing, detector, section, size, ranks) if missing else Statistics()

    def write() -> None:
        """Write the reference on the main process, which alone has the statistics."""
        assert seen is not None  # on the main process
        gaussian = file.gaussian or seen.gaussian
        assert gaussian is not None  # metrics include frechet
        # Rejects a broken covariance now, not after hours of sampling.
        frechet_distance(*gaussian, *gaussian)
        arrays: dict[str, Any] = {"mu": gaussian.mean, "sigma": gaussian.covariance}
        if (spatial := file.spatial or seen.spatial) and "spatial" in reference_kinds(section.metrics):
            frechet_distance(*spatial, *spatial)
            arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
        if seen.bank is not None:
            arrays["bank"] = seen.bank
        about = {
            "detector": detector.name,
            "detector_digest": detector.digest,
            "source": f"{path.name} (sha256 {store.file_digest(path)})",
            "n_images": None if file.gaussian else seen.count,
            "image_size": size if missing else None,
            **dict.fromkeys(("listing_digest", "floor", "floor_n_images")),  # unknown
            "version": STAGES["fid_reference"].version,
        }
        store.write_arrays(out, {name: np.asarray(array) for name, array in arrays.items()}, about)

    ranks.from_main(write)


def _of_images(
    path: Path,
    images: np.ndarray | None,
    kinds: frozenset[str],
    detector: Detector,
    section: Fid,
    size: int,
    ranks: Ranks,
) -> Statistics | None:
    """Return statistics of the images in an ``.npz`` on the main process, None on the others."""
    if images is None:
        # The section says which statistics are needed, not for which of the metrics (Fid.read_by).
        served = [name for name, metric in METRICS.items() if metric.needs in kinds]
        raise ValueError(
            f"'{path}' lacks the images (arr_0) from which to compute what {', '.join(served)} need; set fid.reference "
            "to a file with images, or leave out those of them that fid.metrics has"
        )
    if images.shape[1:3] != (size, size):
        raise ValueError(
            f"'{path}' has images of {images.shape[2]} x {images.shape[1]} pixels, but image.size is {size}; set "
            "fid.reference to a file with images of that size"
        )
    kept = data.evenly(len(images), section.reference_images)
    chosen = kept if kinds == {"bank"} else None  # moments are those of all images
    part = image_statistics(images, kinds, detector, section.batch_size, ranks, chosen=chosen, name="fid_reference")
    found = part.of_all(ranks)
    all_kept = found is None or found.bank is None or len(found.bank) == len(kept)
    return found if found is None or found.bank is None or all_kept else replace(found, bank=found.bank[kept])
