"""``spatial_gmm``: the mixture over latents, with a mean latent and a variance for every mode.

Reads: the listing, the images, the encoder, the latent statistics, the mixture and the assignment; latents from the
    latent cache, which it fills first. It takes the images sorted by mode, and of every latent only its contribution to
    the moments of its mode is kept: 3 MB per mode for latents [768, 16, 16].
Writes: ``spatial_gmm.zarr``, one row per mode, and ``report.json``.
Unit of work: a mode. Its rows go into ``spatial.zarr`` in the state; then ``component-00012.safetensors``, with its
    variance, number of images and digest of the rows, marks it as done. Processes are dealt groups of modes.
After a kill: modes with a marker are kept; a restarted run takes the batches that hold images of the others.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zarr
from torch import Tensor

from mmfm import data
from mmfm.autoencoder.encoders import configured_encoder
from mmfm.autoencoder.latent_cache import Encode, ReadLatents
from mmfm.autoencoder.rae import RAE, load_statistics
from mmfm.config import StageConfig
from mmfm.data.moments import Moments
from mmfm.infra import store
from mmfm.infra.distributed import Ranks
from mmfm.mixture.coupling import CouplingCost
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.images_by_mode import ImagesByMode
from mmfm.mixture.spatial import position_variances, union_with_flips
from mmfm.stages import provenance
from mmfm.stages.cached_latents import encoded, open_cache
from mmfm.stages.runner import Advance, Context, Work, run_units

_STORE, _REPORT = "spatial_gmm.zarr", "report.json"


class Autoencoder(NamedTuple):
    """What makes the latents.

    Attributes:
        encode: images (B, 3, h, w) float32 in [0, 1] -> normalised latents (B, C, H, W) and global tokens (B, C).
        latent_shape: (C, H, W).
        open_cache: opens the latent cache for the same latents, or returns None; a collective call.
    """

    encode: Encode
    latent_shape: tuple[int, int, int]
    open_cache: Callable[[], ReadLatents | None] = lambda: None


@dataclass(frozen=True)
class SpatialFiles:
    """The files that ``spatial_gmm`` reads, besides the images."""

    listing: Path
    encoder_weights: Path
    stats: Path
    gmm: Path
    assignment: Path

    def inputs(self, mixture: Mixture) -> provenance.Inputs:
        """Return digests and paths of the files, after checking that they belong together."""
        listing, encoder = provenance.listing(self.listing), provenance.encoder(self.encoder_weights)
        stats, gmm = provenance.statistics(self.stats), provenance.mixture(self.gmm, mixture)
        provenance.belong_together(listing, encoder, stats, gmm, provenance.assignment(self.assignment))
        # The assignment is no input of its own: fit_gmm makes it together with the mixture.
        read = {f"{each.name}_digest": each for each in (listing, encoder, stats, gmm)}
        return provenance.Inputs({n: i.digest for n, i in read.items()}, {n: i.path for n, i in read.items()})


def spatial_gmm(config: StageConfig, files: SpatialFiles, out: Path, ranks: Ranks) -> dict[str, Any]:
    """Make the spatial mixture and return its report, on every process.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: the inputs do not belong together, an image can't be read, or latents are not finite.
    """
    mixture = Mixture.load(files.gmm)
    labels = provenance.labels(files.assignment)
    inputs = ranks.from_main(lambda: files.inputs(mixture))

    def open_encoder() -> Autoencoder:
        """Load the encoder, and say how it encodes images."""
        encoder = configured_encoder(config.encoder, files.encoder_weights, ranks.device)
        latent_shape = (encoder.hidden_size, *encoder.grid)
        rae = RAE(encoder, None, *load_statistics(files.stats, latent_shape))
        crop, workers = config.spatial_gmm.crop, config.spatial_gmm.workers

        def cached() -> ReadLatents | None:
            return open_cache(
                context, files.listing, encoder, files.encoder_weights, rae.normalise, crop=crop, workers=workers
            )

        return Autoencoder(rae.encode, latent_shape, cached)

    with Context.open(config, ranks, inputs, {_STORE: out, _REPORT: out.with_name(_REPORT)}) as context:
        return fit(context, files.listing, labels, mixture.weights.numpy(), open_encoder)


def fit(
    context: Context,
    listing: Path,
    labels: np.ndarray,
    weights: np.ndarray,
    open_encoder: Callable[[], Autoencoder],
) -> dict[str, Any]:
    """Make the spatial mixture of an assignment; see :func:`spatial_gmm`.

    Args:
        labels: (N,) mode of every image, in [0, K).
        weights: (K,) weights of the modes.
        open_encoder: called if there is work to do.

    Raises:
        ValueError: the labels do not fit the listing, an image can't be read, or latents are not finite.
    """
    n, k = len(data.Listing.open(listing)), len(weights)
    if len(labels) != n or labels.min() < 0 or labels.max() >= k:
        raise ValueError(
            f"the assignment has {len(labels)} images in modes {labels.min()} to {labels.max()}, the listing {n} "
            f"images and the mixture {k} modes; run extract and fit_gmm again on this listing"
        )
    _SpatialFit(context, listing, labels, np.asarray(weights, np.float64), open_encoder).run()
    return context.ranks.from_main(lambda: store.read_json(context.outputs[_REPORT]))


@dataclass
class _Accumulator:
    """Moments of the modes that are being streamed; calls ``finish`` for a mode after its last image."""

    images: ImagesByMode
    done: set[int]
    finish: Callable[[int, Moments], None]
    current: dict[int, Moments] = field(default_factory=dict)

    def add(self, batch: range, latents: Tensor) -> None:
        """Add the latents (B, C, H, W) of the images at the positions ``batch``."""
        for k in self.images.modes(batch):
            if k in self.done:
                continue
            start, stop = int(self.images.offsets[k]), int(self.images.offsets[k + 1])
            of_mode = latents[max(start - batch.start, 0) : stop - batch.start]
            moments = self.current.setdefault(k, Moments.zeros(tuple(latents.shape[1:]), latents.device))
            moments.update(of_mode)
            if stop <= batch.stop:
                self.finish(k, self.current.pop(k))
                self.done.add(k)


class _SpatialFit:
    """The modes of one run."""

    def __init__(
        self,
        context: Context,
        listing: Path,
        labels: np.ndarray,
        weights: np.ndarray,
        open_encoder: Callable[[], Autoencoder],
    ) -> None:
        self.context, self.listing, self.weights = context, listing, weights
        self.section, self.device = context.config.spatial_gmm, context.ranks.device
        self.images = ImagesByMode.make(labels, len(weights), self.section.batch_size)
        self.counts = np.diff(self.images.offsets)
        self.diag = self.section.covariance_type == "diag"
        self.row_names = ("means", "variances") if self.diag else ("means",)
        self.store = context.state / "spatial.zarr"
        self._open_encoder = open_encoder
        self.cache: ReadLatents | None = None

    @functools.cached_property
    def encoder(self) -> Autoencoder:
        """What makes the latents, loaded on first use: a finished run does not need it."""
        return self._open_encoder()

    def run(self) -> None:
        """Make the missing modes and publish both results."""
        work = Work(
            self.images.groups,
            self.encode,
            is_done=lambda group: not self.images.batches(group, self.finished(group)),
            begin=self.open_cache,
            size=lambda group: int(self.counts[group.start : group.stop].sum()),
        )
        run_units(self.context, work, publish=self.publish, prepare=self.prepare, bytes_written=self.bytes_written)

    def bytes_written(self) -> int:
        """Bytes of the float32 rows of all modes."""
        return 4 * len(self.row_names) * len(self.weights) * math.prod(self.encoder.latent_shape)

    def marker(self, mode: int) -> Path:
        """The file whose existence marks a mode as done."""
        return self.context.state / f"component-{mode:05d}.safetensors"

    def finished(self, group: range) -> set[int]:
        """Return the modes of a group that are done."""
        return {mode for mode in group if self.marker(mode).exists()}

    def prepare(self) -> None:
        """Create the store unless it exists."""
        if (self.store / "zarr.json").exists():
            return
        for stale in self.context.state.glob("component-*.safetensors"):
            stale.unlink()  # the rows that it marks are lost with the store
        fresh, shape = self.context.state / ".spatial.partial", self.encoder.latent_shape
        group = zarr.open_group(fresh, mode="w")
        # One chunk per mode and no zarr shards, so that two processes never write to the same file.
        for name in self.row_names:
            group.create_array(
                name, shape=(len(self.weights), *shape), dtype="float32", chunks=(1, *shape), compressors=None
            )
        store.publish_directory(fresh, self.store)

    def open_cache(self) -> None:
        """Open the latent cache, if there is one; a collective call."""
        self.cache = self.encoder.open_cache()

    @torch.no_grad()
    def encode(self, groups: list[range], advance: Advance) -> None:
        """Take the latents of the images of unfinished modes; a mode is written after its last image."""
        if not groups:
            return
        done = {mode for group in groups for mode in self.finished(group)}
        batches = [batch for group in groups for batch in self.images.batches(group, done)]
        indices = [self.images.order[batch.start : batch.stop].tolist() for batch in batches]
        crop, workers = self.section.crop, self.section.workers
        latents = encoded(self.context, self.listing, indices, self.encoder.encode, self.cache, crop, workers)
        rows = self.open_rows()
        accumulator = _Accumulator(self.images, done, functools.partial(self.finish, rows))
        for batch, (latent, _) in zip(batches, latents, strict=True):
            accumulator.add(batch, latent)
            advance(len(batch), note=f"{len(accumulator.done):,} modes")

    def open_rows(self) -> list[zarr.Array]:
        """Open the arrays in ``row_names``, (K, C, H, W) float32, for reading and writing."""
        arrays = [zarr.open_array(self.store / name, mode="r+") for name in self.row_names]
        return [array.with_config({"write_empty_chunks": True}) for array in arrays]  # a mean of zeros is a file, too

    def finish(self, rows: list[zarr.Array], mode: int, moments: Moments) -> None:
        """Write the rows of a mode, then its marker."""
        mean, variance = union_with_flips(moments)
        if not math.isfinite(variance):
            raise ValueError(f"latents of images in mode {mode} are not finite; check the encoder and the statistics")
        values = [mean.float().cpu().numpy()]
        arrays = {"variance": np.array([variance]), "count": np.array([moments.count], np.int64)}
        if self.diag:
            positions, raised = position_variances(moments)
            values.append(positions.float().cpu().numpy())
            arrays["raised"] = np.array([raised], np.int64)
        for array, row in zip(rows, values, strict=True):
            array[mode] = row
        store.write_arrays(self.marker(mode), arrays, {"row_digest": store.array_digest(*values)})

    def publish(self, finished: Path) -> None:
        """Check every row against its marker, give empty modes the average of the others, write store and report.

        Raises:
            ValueError: a row does not match its marker.
        """
        arrays, weights, counts = self.open_rows(), self.weights, self.counts
        filled, empty = np.flatnonzero(counts).tolist(), np.flatnonzero(counts == 0).tolist()
        cost, row_digests = CouplingCost(weights, counts), []
        variances, raised = np.empty(len(counts)), 0
        totals = [np.zeros(array.shape[1:]) for array in arrays]
        for k in filled:
            rows = [np.asarray(array[k]) for array in arrays]
            variances[k], raised_in_mode = self.check_rows(k, rows)
            raised += raised_in_mode
            row_digests.append(store.array_digest(*rows))
            for total, row in zip(totals, rows, strict=True):
                total += row
            source_variance = float(rows[-1].mean(dtype=np.float64)) if self.diag else variances[k]
            cost.add(k, rows[0], source_variance, variances[k])
        variances[empty] = variances[filled].mean()
        for k in empty:
            for array, total in zip(arrays, totals, strict=True):
                array[k] = (total / len(filled)).astype(np.float32)
            source_variance = float(totals[-1].mean() / len(filled)) if self.diag else variances[k]
            cost.add(k, np.asarray(arrays[0][k]), source_variance, 0.0)
        group = zarr.open_group(self.store, mode="r+")
        per_mode = {"weights": weights, "counts": counts} | ({} if self.diag else {"variances": variances})
        for name, values in per_mode.items():
            group.create_array(name, data=values, chunks=values.shape, overwrite=True)
        digest = store.array_digest(np.frombuffer("".join(row_digests).encode(), np.uint8), variances, weights, counts)
        group.attrs.update({**self.context.inputs.digests, "digest": digest})
        report = {
            "digest": digest,
            "covariance_type": "diag" if self.diag else "spherical",
            "n_images": int(counts.sum()),
            "n_components": len(counts),
            "empty_components": len(empty),
            "components_of_one_image": int((counts == 1).sum()),
            "latent_shape": list(arrays[0].shape[1:]),
            "variance": {"min": variances.min(), "median": float(np.median(variances)), "max": variances.max()},
            "mean_variance_by_images": float(variances @ counts / counts.sum()),
            "share_of_positions_raised_to_the_floor": raised / (len(filled) * totals[0].size),
            "coupling_cost": cost.result(),
            **self.context.inputs.digests,
        }
        store.write_json(finished / _REPORT, report)
        store.place_linked(self.store, finished / _STORE)

    def check_rows(self, mode: int, rows: list[np.ndarray]) -> tuple[float, int]:
        """Return the average variance of a mode and how many positions were raised, after comparing rows and marker."""
        arrays, metadata = store.map_arrays(self.marker(mode))
        if metadata["row_digest"] != store.array_digest(*rows) or arrays["count"][0] != self.counts[mode]:
            self.marker(mode).unlink()
            raise ValueError(f"the row of mode {mode} is damaged on disk; run the same command again to redo it")
        return float(arrays["variance"][0]), int(arrays["raised"][0]) if "raised" in arrays else 0
