"""``spatial_gmm``: mean latent and variance of every mode, streamed image by image.

Reads the listing, the images, encoder, latent statistics, mixture and assignment. Writes ``spatial_gmm.zarr``, one row
a mode, and ``report.json``. The images are read sorted by mode through one continuous loader, and nothing of a latent
is kept but its contribution to the moments of its mode: 3 MB at [768, 16, 16].

The unit of work is a mode: its rows in the state's ``spatial.zarr``, then ``component-00012.safetensors`` with its
variance, its number of images and the digest of the rows. Processes are dealt groups of modes. A kill leaves whole
modes; a restarted run encodes the batches that hold images of unfinished ones.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from mmfm import data
from mmfm.autoencoder.encoders import load_encoder
from mmfm.autoencoder.rae import RAE, load_statistics
from mmfm.config import StageConfig
from mmfm.data.moments import Moments
from mmfm.infra import store
from mmfm.infra.distributed import Ranks
from mmfm.mixture.coupling import CouplingCost
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.grouping import ImagesByMode
from mmfm.mixture.spatial import position_variances, union_with_flips
from mmfm.stages import provenance
from mmfm.stages.runner import Advance, Context, run_units

_STORE, _REPORT = "spatial_gmm.zarr", "report.json"

Encode = Callable[[Tensor], Tensor]
"""Images (B, 3, h, w) float32 in [0, 1] -> normalised latents (B, C, H, W) float32."""


@dataclass(frozen=True)
class SpatialFiles:
    """Files that ``spatial_gmm`` reads besides the images."""

    listing: Path
    encoder_weights: Path
    stats: Path
    gmm: Path
    assignment: Path

    def inputs(self, mixture: Mixture) -> provenance.Inputs:
        """Return digests and places of the files, after checking that they belong together."""
        listing, encoder = provenance.listing(self.listing), provenance.encoder(self.encoder_weights)
        stats, gmm = provenance.statistics(self.stats), provenance.mixture(self.gmm, mixture)
        provenance.belong_together(listing, encoder, stats, gmm, provenance.assignment(self.assignment))
        read = {f"{each.name}_digest": each for each in (listing, encoder, stats, gmm)}
        return provenance.Inputs({n: i.digest for n, i in read.items()}, {n: i.path for n, i in read.items()})


def spatial_gmm(config: StageConfig, files: SpatialFiles, out: Path, ranks: Ranks) -> dict[str, Any]:
    """Make the spatial mixture and return its report, on every process.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: inputs that do not belong together, an unreadable image, latents that are not finite.
    """
    mixture = Mixture.load(files.gmm)
    labels = provenance.labels(files.assignment)
    inputs = ranks.from_main(lambda: files.inputs(mixture))

    def open_encoder() -> tuple[Encode, tuple[int, int, int]]:
        about = config.encoder
        encoder = load_encoder(about.family, files.encoder_weights, about.input_size, ranks.device)
        latent_shape = (encoder.hidden_size, *encoder.grid)
        rae = RAE(encoder, None, *load_statistics(files.stats, latent_shape))
        return (lambda images: rae.encode(images).latent), latent_shape

    with Context.open(config, ranks, inputs, {_STORE: out, _REPORT: out.with_name(_REPORT)}) as context:
        return fit(context, files.listing, labels, mixture.weights.numpy(), open_encoder)


def fit(
    context: Context,
    listing: Path,
    labels: np.ndarray,
    weights: np.ndarray,
    open_encoder: Callable[[], tuple[Encode, tuple[int, int, int]]],
) -> dict[str, Any]:
    """Make the spatial mixture of an assignment; see :func:`spatial_gmm`.

    Args:
        labels: (N,) mode of every image, in [0, K).
        weights: (K,) weights of the modes.
        open_encoder: called where there is something to encode; returns it and the shape (C, H, W) of its latents.

    Raises:
        ValueError: labels that don't fit the listing, an unreadable image, latents that are not finite.
    """
    n, k = len(data.Listing.open(listing)), len(weights)
    if len(labels) != n or labels.min() < 0 or labels.max() >= k:
        raise ValueError(
            f"the assignment has {len(labels)} images in modes {labels.min()} to {labels.max()}, the listing {n} "
            f"images and the mixture {k} modes; run fit_gmm again on this listing"
        )
    _SpatialFit(context, listing, labels, np.asarray(weights, np.float64), open_encoder).run()
    return context.ranks.from_main(lambda: store.read_json(context.outputs[_REPORT]))


@dataclass
class _Accumulator:
    """Moments of the modes that are being streamed; hands over each one with its last image."""

    images: ImagesByMode
    done: set[int]
    finish: Callable[[int, Moments], None]
    current: dict[int, Moments] = field(default_factory=dict)

    def add(self, batch: range, latents: Tensor) -> None:
        """Add latents (B, C, H, W) of the images at consecutive positions."""
        for k in self.images.modes(batch):
            if k in self.done:
                continue
            start, stop = int(self.images.offsets[k]), int(self.images.offsets[k + 1])
            own = latents[max(start - batch.start, 0) : stop - batch.start]
            moments = self.current.setdefault(k, Moments.zeros(tuple(latents.shape[1:]), latents.device))
            moments.update(own)
            if stop <= batch.stop:
                self.finish(k, self.current.pop(k))
                self.done.add(k)


class _SpatialFit:
    """The modes of one run."""

    def __init__(
        self, context: Context, listing: Path, labels: np.ndarray, weights: np.ndarray, open_encoder: Callable
    ) -> None:
        self.context, self.listing, self.weights = context, listing, weights
        self.config, self.device = context.config, context.ranks.device
        self.images = ImagesByMode.make(labels, len(weights), self.config.spatial_gmm.batch_size)
        self.counts = np.diff(self.images.offsets)
        self.diag = self.config.spatial_gmm.covariance_type == "diag"
        self.store = context.state / "spatial.zarr"
        self._open_encoder = open_encoder

    @functools.cached_property
    def encoder(self) -> tuple[Encode, tuple[int, int, int]]:
        """Loaded where there is something to encode, with the shape (C, H, W) of its latents."""
        return self._open_encoder()

    def run(self) -> None:
        """Make the modes that are missing, and both results."""
        run_units(
            self.context,
            self.images.groups,
            make=self.encode,
            is_done=lambda group: not self.images.batches(group, self.finished(group)),
            publish=self.publish,
            size=lambda group: int(self.counts[group.start : group.stop].sum()),
            prepare=self.prepare,
            bytes_written=lambda: (8 if self.diag else 4) * len(self.weights) * math.prod(self.encoder[1]),
        )

    def marker(self, mode: int) -> Path:
        """The file whose existence says that a mode's rows are finished."""
        return self.context.state / f"component-{mode:05d}.safetensors"

    def finished(self, group: range) -> set[int]:
        """The finished modes of a group."""
        return {mode for mode in group if self.marker(mode).exists()}

    def prepare(self) -> None:
        """Lay out the store."""
        if (self.store / "zarr.json").exists():
            return
        for stale in self.context.state.glob("component-*.safetensors"):
            stale.unlink()  # without a store it speaks of rows that are gone
        fresh, shape = self.context.state / ".spatial.partial", self.encoder[1]
        group = zarr.open_group(fresh, mode="w")
        # One chunk a mode and no shards: processes then never write to the same file.
        for name in ("means", "variances") if self.diag else ("means",):
            group.create_array(
                name, shape=(len(self.weights), *shape), dtype="float32", chunks=(1, *shape), compressors=None
            )
        store.publish_directory(fresh, self.store)

    @torch.no_grad()
    def encode(self, groups: list[range], advance: Advance) -> None:
        """Encode the images of unfinished modes, and finish each mode with its last image."""
        if not groups:
            return
        done = {mode for group in groups for mode in self.finished(group)}
        batches = [batch for group in groups for batch in self.images.batches(group, done)]
        indices = [self.images.order[batch.start : batch.stop].tolist() for batch in batches]
        workers, size = self.config.spatial_gmm.workers, self.config.image.size
        loaded = data.image_batches(self.listing, size, indices, workers, pin=self.device.type == "cuda")
        rows = zarr.open_group(self.store, mode="r+")
        accumulator = _Accumulator(self.images, done, functools.partial(self.finish, rows))
        for batch, (_, pixels) in zip(batches, loaded, strict=True):
            accumulator.add(batch, self.encoder[0](data.to_float(pixels, self.device)))
            advance(len(batch), note=f"{len(accumulator.done):,} modes")

    def finish(self, rows: zarr.Group, mode: int, moments: Moments) -> None:
        """Write the rows of a mode, then its marker."""
        mean, variance = union_with_flips(moments)
        if not math.isfinite(variance):
            raise ValueError(f"latents of images in mode {mode} are not finite; check the encoder and the statistics")
        own = {"means": mean.float().cpu().numpy()}
        arrays = {"variance": np.array([variance]), "count": np.array([moments.count], np.int64)}
        if self.diag:
            positions, raised = position_variances(moments)
            own["variances"], arrays["raised"] = positions.float().cpu().numpy(), np.array([raised], np.int64)
        for name, row in own.items():
            rows[name][mode] = row
        store.write_arrays(self.marker(mode), arrays, {"row_digest": store.array_digest(*own.values())})

    def publish(self, finished: Path) -> None:
        """Check every row against its marker, fill in the modes without images, write store and report.

        Raises:
            ValueError: a row is not the one that its marker was written for.
        """
        group = zarr.open_group(self.store, mode="r+")
        large = [group[name] for name in ("means", "variances") if name in group and group[name].ndim == 4]
        weights, counts, cost = self.weights, self.counts, CouplingCost(self.weights, self.counts)
        filled, empty = np.flatnonzero(counts), np.flatnonzero(counts == 0)
        variances, raised, row_digests = np.empty(len(counts)), 0, []
        totals = [np.zeros(array.shape[1:]) for array in large]
        for k in filled:
            rows = [array[int(k)] for array in large]
            variances[k], floored = self.check_rows(k, rows)
            raised += floored
            row_digests.append(store.array_digest(*rows))
            for total, row in zip(totals, rows, strict=True):
                total += row
            source = float(rows[-1].mean(dtype=np.float64)) if self.diag else variances[k]
            cost.add(k, rows[0], source, variances[k])
        variances[empty] = variances[filled].mean()
        for k in empty:
            for array, total in zip(large, totals, strict=True):
                array[int(k)] = (total / len(filled)).astype(np.float32)
            source = float(totals[-1].mean() / len(filled)) if self.diag else variances[k]
            cost.add(k, large[0][int(k)], source, 0.0)
        small = {"weights": weights, "counts": counts} | ({"variances": variances} if not self.diag else {})
        for name, values in small.items():
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
            "latent_shape": list(large[0].shape[1:]),
            "variance": {"min": variances.min(), "median": float(np.median(variances)), "max": variances.max()},
            "mean_variance_by_images": float(variances @ counts / counts.sum()),
            "share_of_positions_raised_to_the_floor": raised / (len(filled) * totals[0].size),
            "coupling_cost": cost.result(),
            **self.context.inputs.digests,
        }
        store.write_json(finished / _REPORT, report)
        store.place_linked(self.store, finished / _STORE)

    def check_rows(self, mode: int, rows: list[np.ndarray]) -> tuple[float, int]:
        """Return a mode's average variance and its number of raised positions, after comparing rows and marker."""
        arrays, metadata = store.map_arrays(self.marker(mode))
        if metadata["row_digest"] != store.array_digest(*rows) or arrays["count"][0] != self.counts[mode]:
            self.marker(mode).unlink()
            raise ValueError(f"the row of mode {mode} was damaged on disk; run the same command again to make it anew")
        return float(arrays["variance"][0]), int(arrays["raised"][0]) if "raised" in arrays else 0
