"""The stage spatial_gmm: mean latent and variance of every mode, streamed image by image.

The images are read sorted by mode through one continuous loader, in batches that hang on the modes' counts alone, and
nothing of a latent is kept but its contribution to the moments of its mode. At [768, 16, 16] these take 3 MB.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from mmfm import config, data
from mmfm.infra import space, stage_state, store
from mmfm.infra.distributed import Ranks
from mmfm.infra.progress import Progress
from mmfm.mixture.plan import Plan, deal
from mmfm.mixture.rows import MappedRows
from mmfm.mixture.spatial_publish import REPORT, STORE, marker, publish
from mmfm.statistics import Moments

VERSION = config.VERSIONS["spatial_gmm"]

RELATIVE_FLOOR = 1e-3
"""Smallest variance of a position with ``diag``, as a share of the mode's variance averaged over all positions."""

ABSOLUTE_FLOOR = 1e-6
"""Smallest variance of a position with ``diag`` in any case; the data's own variance is 1."""

Encode = Callable[[Tensor], Tensor]
"""Images (B, 3, h, w) float32 in [0, 1] -> normalised latents (B, C, H, W) float32."""


@dataclass(frozen=True)
class SpatialMixture:
    """Mixture of K Gaussians over latents (C, H, W), opened from ``spatial_gmm.zarr``.

    Attributes:
        means: zarr array (K, C, H, W) float32, one chunk a mode; 6.4 GB at K = 8192 and [768, 16, 16].
        variances: ``spherical``: (K,) float64; ``diag``: zarr array (K, C, H, W) float32, as large as the means.
        weights: (K,) float64, sum 1.
        counts: (K,) int64, images of each mode (flips not counted).
        attributes: ``digest`` and the digests of what it was made from.
        path: where it lies.
    """

    means: Any
    variances: Any
    weights: np.ndarray
    counts: np.ndarray
    attributes: dict[str, Any]
    path: Path | None = None

    @classmethod
    def open(cls, path: str | Path) -> "SpatialMixture":
        """Open a finished store read-only; arrays (K, C, H, W) are not read.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is unfinished or something else.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no spatial mixture at '{path}'; run the stage spatial_gmm")
        try:
            group = zarr.open_group(path, mode="r")
            variances = group["variances"] if group["variances"].ndim == 4 else group["variances"][:]
            result = cls(group["means"], variances, group["weights"][:], group["counts"][:], dict(group.attrs), path)
        except (KeyError, ValueError, OSError, TypeError) as error:
            raise ValueError(f"'{path}' is no spatial mixture ({error}); delete it, run spatial_gmm again") from error
        large = [result.means] + [result.variances] * (result.covariance_type == "diag")
        if "digest" not in result.attributes or any(a.nchunks_initialized < a.shape[0] for a in large):
            raise ValueError(f"spatial mixture '{path}' is not whole; delete it and run spatial_gmm again")
        return result

    @property
    def n_components(self) -> int:
        """Number of modes K."""
        return self.means.shape[0]

    @property
    def covariance_type(self) -> str:
        """``spherical`` (one variance a mode) or ``diag`` (one a position)."""
        return "diag" if self.variances.ndim == 4 else "spherical"

    def load_variances(self) -> Tensor | MappedRows:
        """Return the variances: (K,) float64, or with ``diag`` rows (C, H, W) that are read batch by batch.

        Raises:
            ValueError: the store is damaged.
        """
        if self.covariance_type != "diag":
            return torch.as_tensor(self.variances)
        with self._damage_named():
            rows = MappedRows(self.variances)
            rows.check()
        return rows

    def load_means(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, pinned: bool = False
    ) -> Tensor:
        """Copy the means (K, C, H, W) to a device; see :meth:`mmfm.mixture.rows.MappedRows.copy_to`.

        Args:
            pinned: of the host's memory, take what a GPU can read by itself. PyTorch rounds its size up to a power of
                two.

        Raises:
            ValueError: the store is damaged.
        """
        result = torch.empty(self.means.shape, dtype=dtype, device=device, pin_memory=pinned)
        with self._damage_named():
            MappedRows(self.means).copy_to(result)
        return result

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(
                f"spatial mixture '{self.path}' is damaged ({error}); delete it and run spatial_gmm again"
            ) from error


def union_with_flips(moments: Moments) -> tuple[Tensor, float]:
    """Return mean (C, H, W) and spherical variance of latents and their horizontal flips, from the latents' moments.

    A flip is linear, so the union's mean is (m + flip m) / 2 and its population variance, averaged over C H W, is that
    of the latents plus mean((m - flip m)^2) / 4.
    """
    mean, flipped = moments.mean, moments.mean.flip(-1)
    variance = moments.variance().mean() + (mean - flipped).square().mean() / 4
    return (mean + flipped) / 2, float(variance)


def position_variances(moments: Moments) -> tuple[Tensor, int]:
    """Return the variance (C, H, W) float64 of latents and their flips at every position, and how many were raised.

    The union's variance at a position is (v + flip v) / 2 + ((m - flip m) / 2)^2. A mode of one image has none where
    its latent is symmetric, and modes of a few images have too little here and there. A source without variance
    collapses many latents to one value, so what is below the larger of :data:`ABSOLUTE_FLOOR` and
    :data:`RELATIVE_FLOOR` times the mode's average variance is raised to it.
    """
    mean, variance = moments.mean, moments.variance()
    union = (variance + variance.flip(-1)) / 2 + (mean - mean.flip(-1)).square() / 4
    floor = max(ABSOLUTE_FLOOR, RELATIVE_FLOOR * float(union.mean()))
    return union.clamp(min=floor), int((union < floor).sum())


@dataclass
class _Accumulator:
    """Moments of the modes that are being streamed; hands over each one with its last image."""

    plan: Plan
    done: set[int]
    finish: Callable[[int, Moments], None]
    current: dict[int, Moments] = field(default_factory=dict)

    def add(self, batch: range, latents: Tensor) -> None:
        """Add latents (B, C, H, W) of the images at consecutive positions."""
        for k in self.plan.modes(batch):
            if k in self.done:
                continue
            start, stop = int(self.plan.offsets[k]), int(self.plan.offsets[k + 1])
            own = latents[max(start - batch.start, 0) : stop - batch.start]
            moments = self.current.setdefault(k, Moments.zeros(tuple(latents.shape[1:]), latents.device))
            moments.update(own)
            if stop <= batch.stop:
                self.finish(k, self.current.pop(k))
                self.done.add(k)


@torch.no_grad()
def fit(
    listing: str | Path,
    encode: Encode,
    latent_shape: tuple[int, int, int],
    labels: np.ndarray,
    weights: np.ndarray,
    out: str | Path,
    sections: dict[str, Any],
    digests: dict[str, str],
    ranks: Ranks,
    files: dict[str, Path] | None = None,
) -> dict[str, Any]:
    """Make the spatial mixture; contract in docs/stages.md.

    A mode is finished when its marker exists, which is written after its row. A restarted run encodes the batches that
    hold images of unfinished modes and leaves the finished ones alone, so its result is that of an undisturbed run.

    Args:
        listing: listing file of the training images.
        latent_shape: (C, H, W) of ``encode``'s latents.
        labels: (N,) mode of every image, in [0, K).
        weights: (K,) weights of the modes.
        out: the store; ``report.json`` is written beside it.
        sections: built sections ``image``, ``encoder``, ``spatial_gmm``.
        digests: ``listing_digest``, ``encoder_digest``, ``stats_digest``, ``gmm_digest``; become attributes.
        files: where the inputs lie, under the names of their digests.

    Raises:
        ValueError: labels that don't fit the listing, an unreadable image, latents that are not finite.
    """
    listing, out = Path(listing), Path(out)
    n, k = len(data.Listing.open(listing)), len(weights)
    if len(labels) != n or labels.min() < 0 or labels.max() >= k:
        raise ValueError(
            f"the assignment has {len(labels)} images in modes {labels.min()} to {labels.max()}, the listing {n} "
            f"images and the mixture {k} modes; run fit_gmm again on this listing"
        )
    settings: config.SpatialGmm = sections["spatial_gmm"]
    identity = config.identity(sections)
    plan = Plan.make(labels, k, settings.batch_size)
    diag = settings.covariance_type == "diag"
    files = {"listing_digest": listing, **(files or {})}
    outputs = {STORE: out, REPORT: out.with_name("report.json")}
    state, done = ranks.from_main(lambda: _open_state(outputs, identity, digests, (k, *latent_shape), diag, files))
    if done is None:
        Progress("spatial_gmm", n, "images", done=n, enabled=ranks.is_main)
        return ranks.from_main(lambda: store.read_json(outputs[REPORT]))
    group = zarr.open_group(state / "spatial.zarr", mode="r+")

    def finish(mode: int, moments: Moments) -> None:
        mean, variance = union_with_flips(moments)
        if not math.isfinite(variance):
            raise ValueError(f"latents of images in mode {mode} are not finite; check the encoder and the statistics")
        rows = {"means": mean.float().cpu().numpy()}
        arrays = {"variance": np.array([variance]), "count": np.array([moments.count], np.int64)}
        if diag:
            positions, raised = position_variances(moments)
            rows["variances"], arrays["raised"] = positions.float().cpu().numpy(), np.array([raised], np.int64)
        for name, row in rows.items():
            group[name][mode] = row
        store.write_arrays(marker(state, mode), arrays, {"row_digest": store.array_digest(*rows.values())})

    left = [plan.batches(group, done) for group in plan.groups]
    mine = deal([sum(map(len, batches)) for batches in left], ranks.world)[ranks.rank]
    batches = [batch for group in mine for batch in left[group]]
    indices = [plan.order[batch.start : batch.stop].tolist() for batch in batches]
    images = data.image_batches(
        listing, sections["image"].size, indices, settings.workers, pin=ranks.device.type == "cuda"
    )
    accumulator = _Accumulator(plan, set(done), finish)
    with Progress("spatial_gmm", sum(map(len, batches)), "images", enabled=ranks.is_main) as progress:
        if done:
            progress.say(f"resuming with {len(done):,} modes finished")
        for batch, (_, pixels) in zip(batches, images, strict=True):
            accumulator.add(batch, encode(data.to_float(pixels, ranks.device)))
            progress.advance(len(batch), note=f"{len(accumulator.done):,} modes")
    ranks.barrier()
    return ranks.from_main(lambda: publish(state, outputs, np.diff(plan.offsets), weights, digests))


def _open_state(
    outputs: dict[str, Path],
    identity: dict[str, Any],
    digests: dict[str, str],
    shape: tuple[int, ...],
    diag: bool,
    files: dict[str, Path],
) -> tuple[Path, set[int] | None]:
    """Return the state directory with its partial store, and the modes that are finished; None when everything is."""
    state = stage_state.state_directory(outputs[STORE], "spatial_gmm", VERSION, identity, digests, files)
    if stage_state.restore(state, outputs):
        return state, None
    partial = state / "spatial.zarr"
    if not (partial / "zarr.json").exists():
        # Markers without a store speak of rows that are gone.
        for stale in state.glob("component-*.safetensors"):
            stale.unlink()
        fresh = state / ".spatial.partial"
        group = zarr.open_group(fresh, mode="w")
        # One chunk a mode and no shards: processes then never write to the same file.
        for name in ("means", "variances") if diag else ("means",):
            group.create_array(name, shape=shape, dtype="float32", chunks=(1, *shape[1:]), compressors=None)
        store.publish_directory(fresh, partial)
    space.require(state, "spatial_gmm", (8 if diag else 4) * math.prod(shape))
    return state, {int(path.stem.split("-")[1]) for path in state.glob("component-*.safetensors")}
