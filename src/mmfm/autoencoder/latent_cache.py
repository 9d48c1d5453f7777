"""Latent cache on disk: each image is encoded only once, for all stages, settings and runs.

A cache belongs to one :class:`CacheKey`. It stores the raw latent (not normalised by the latent statistics) and the
global token of each image. View 0 is the image. View 1 is its mirror image, which has to be encoded too: its latent is
not the mirrored latent. Images are identified by full path and file size, so all listings of a folder share the latents
of the images that they have in common.

Layout of ``<folder>/<name>-<digest of the key>/``:

* ``about.json``: the key.
* ``view0-<digest of its images>.safetensors``, ...: shards, see :mod:`mmfm.autoencoder.latent_shards`.
* ``lock``: held by the job that fills the cache.

A killed job loses its unfinished shards and leaves partial files (hidden, with ``.partial-`` in their names). The next
job removes them and makes the missing shards from the same images in the same batches. A job that is asked to stop (see
:class:`mmfm.infra.distributed.StopRequest`) finishes its present shards first.
"""

import itertools
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmfm import data
from mmfm.autoencoder.latent_shards import CacheKey, Index, LatentReader, image_keys, write_shard
from mmfm.infra import disk, file_lock, nodes, store
from mmfm.infra.distributed import Ranks, StopRequest
from mmfm.infra.progress import Progress

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (B, 3, S, S) float32 in [0, 1] -> latent (B, C, H, W) and global token (B, C), float32."""

ReadLatents = Callable[..., tuple[Tensor, Tensor]]
"""Indices of images (b,), and if any is flipped, which, (b,) bool -> what :data:`Encode` gives, from the cache."""

AUTO_LIMIT = 20 * 10**9
"""Size of a full cache, in bytes, up to which ``auto`` uses one."""

BATCH = 64
"""Images encoded at once. It is the same in all stages, because rounding on a GPU depends on it."""

# A kill loses one or two shards per process. 1.28 million latents of 0.79 MB take 7,600 files.
_SHARD_BYTES, _SHARD_IMAGES = 128 << 20, 1000

# Seconds between attempts to take the lock, and between messages to the other processes, so that they don't time out.
_POLL, _SPELL = 0.5, 60.0


def use_cache(choice: str, total: int, missing: Callable[[], int], folder: str | Path) -> bool:
    """Decide whether to use a cache. Call on one process (`Ranks.from_main`), because free space changes.

    Args:
        choice: value of ``latents.cache``: ``on``, ``off``, or ``auto`` (if the full cache takes at most
            :data:`AUTO_LIMIT` and the missing part at most half of the free disk space).
        total: bytes of the full cache.
        missing: returns the bytes still to be written; called only if they matter.
    """
    return choice == "on" or (choice == "auto" and total <= AUTO_LIMIT and 2 * missing() <= disk.free(folder))


class _Unit(NamedTuple):
    """Images that are encoded together, into one shard per view."""

    images: Sequence[int]
    views: tuple[int, ...]


class LatentCache:
    """The cached latents of one key. All arguments ``views`` are 1, or 2 to include mirror images.

    Args:
        folder: parent folder of all caches.
        name: encoder name, used in the name of the cache's folder.
        key: what the latents depend on.
    """

    def __init__(self, folder: str | Path, name: str, key: CacheKey) -> None:
        self.key, self.path = key, Path(folder) / f"{name}-{key.digest}"

    def bytes_needed(self, n_images: int, views: int = 1) -> int:
        """Return the size of the cached latents in bytes."""
        return n_images * views * self.key.row_bytes

    def _indices(self, views: int) -> list[Index]:
        return [Index.read(self.path, self.key, view) for view in range(views)]

    def _missing(self, keys: np.ndarray, views: int) -> np.ndarray:
        return np.stack([index.find(keys)[0] < 0 for index in self._indices(views)])

    def missing(self, listing: data.Listing, views: int = 1) -> np.ndarray:
        """Return which images are missing, (views, N) bool.

        Raises:
            ValueError: a shard is damaged.
        """
        return self._missing(image_keys(listing), views)

    def reader(self, listing: data.Listing, views: int = 1, device: torch.device | str = "cpu") -> LatentReader:
        """Open the latents of a listing, which are returned on ``device``.

        Raises:
            ValueError: a shard is damaged, or an image is missing.
        """
        return LatentReader(self.key, self._indices(views), image_keys(listing), torch.device(device))

    def fill(
        self,
        listing: str | Path,
        encode: Encode,
        ranks: Ranks,
        *,
        stage: str,
        views: int = 1,
        batch_size: int = BATCH,
        workers: int = 0,
    ) -> int:
        """Encode the missing images of a listing; a collective call.

        If several jobs need the cache, one encodes while the others wait; they then encode what is still missing.
        Without file locks they all encode, which is redundant but harmless.

        Args:
            listing: a listing file.
            stage: name for the progress line.
            batch_size: images per encoder call.
            workers: number of image-reading processes.

        Returns:
            the number of images encoded, with each view counted separately.

        Raises:
            ValueError: an image can't be read, a latent is not finite, a shard is damaged, or there is too little disk.
            KeyboardInterrupt: a signal asked to stop; the shards begun were finished first.
        """
        images = data.Listing.open(listing)
        keys = image_keys(images)
        if not ranks.from_main(lambda: bool(self._missing(keys, views).any())):
            return 0
        with self._alone(ranks, stage) as locked:
            units = ranks.from_main(lambda: self._prepare(keys, views, stage, locked))
            todo, total = sum(len(unit.images) * len(unit.views) for unit in units), views * len(images)
            if not todo:
                return 0
            mine = units[ranks.rank :: ranks.world]
            batches = [u.images[r.start : r.stop] for u in mine for r in data.ranges(0, len(u.images), batch_size)]
            pixels = data.image_batches(listing, self.key.image_size, batches, workers, ranks.device.type == "cuda")
            about = f"{stage}: encoding once"
            counted = Progress(about, total, "images", done=total - todo, enabled=ranks.is_main)
            # Every process takes part in the agreement to stop after each round, with or without a unit of its own.
            rounds = itertools.islice(itertools.chain(mine, itertools.repeat(None)), -(-len(units) // ranks.world))
            with StopRequest() as stop, counted as progress:
                if self._make(rounds, images, keys, pixels, encode, ranks, stop, progress):
                    progress.say(f"asked to stop: {progress.done:,} of {total:,} {progress.unit} are saved")
                    raise KeyboardInterrupt
                ranks.barrier()
                progress.advance(total - progress.done)
        return todo

    def _prepare(self, keys: np.ndarray, views: int, stage: str, locked: bool) -> list[_Unit]:
        """Prepare the folder, check the free disk space, and return the missing units."""
        about = self.path / "about.json"
        if not about.exists():
            store.write_json(about, self.key.about())
        elif store.read_json(about) != self.key.about():
            raise ValueError(f"'{about}' describes another cache; delete its folder and run the same command again")
        for partial in self.path.glob(".*.partial-*") if locked else ():
            partial.unlink(missing_ok=True)
        missing = self._missing(keys, views)
        remedy = "free some space, set latents.folder to a larger disk, or latents.cache to off (encodes at every use)"
        disk.require(self.path, stage, int(missing.sum()) * self.key.row_bytes, 0, remedy)
        return self._units(missing)

    def _units(self, missing: np.ndarray) -> list[_Unit]:
        """Divide the missing images (views, N) into units: fixed ranges of the listing, the same after a restart."""
        units, views = [], len(missing)
        size = max(1, min(_SHARD_IMAGES, _SHARD_BYTES // self.key.row_bytes))
        pattern = (missing << np.arange(views)[:, None]).sum(0)
        lacking = {bits: tuple(v for v in range(views) if bits >> v & 1) for bits in range(1, 1 << views)}
        for rows in data.ranges(0, len(pattern), size):
            here = pattern[rows.start : rows.stop]
            if here[0] and (here == here[0]).all():
                units.append(_Unit(rows, lacking[int(here[0])]))
                here[:] = 0
        # The rest is scattered, such as images added later; one shard for each range would make too many files.
        for bits, seen in lacking.items():
            rest = np.flatnonzero(pattern == bits)
            units += [_Unit(rest[r.start : r.stop].tolist(), seen) for r in data.ranges(0, len(rest), size)]
        return units

    def _make(
        self,
        rounds: Iterable[_Unit | None],
        listing: data.Listing,
        keys: np.ndarray,
        pixels: Iterator[tuple[Tensor, Tensor]],
        encode: Encode,
        ranks: Ranks,
        stop: StopRequest,
        progress: Progress,
    ) -> bool:
        """Encode units, of which a round may have none; each is written to disk while the next one is encoded.

        Returns:
            Whether a signal asked to stop; the units of the round are whole.
        """
        shape, writing, stopping = self.key.latent_shape, list[Future[None]](), False
        with ThreadPoolExecutor(1) as writer:
            for unit in rounds:
                images, views = unit or _Unit((), ())
                n, filled = len(images), 0
                made = {v: (np.empty((n, *shape), np.float32), np.empty((n, shape[0]), np.float32)) for v in views}
                while filled < n:
                    indices, batch = next(pixels)
                    batch, place = batch.to(ranks.device, non_blocking=True), slice(filled, filled + len(indices))
                    for view, (latents, tokens) in made.items():
                        with torch.no_grad():
                            latent, token = encode(data.to_float(batch.flip(-1) if view else batch, ranks.device))
                        _require_finite(latent, token, indices, listing)
                        latents[place], tokens[place] = latent.cpu().numpy(), token.cpu().numpy()
                    filled += len(indices)
                    # Assume that the other processes are equally far.
                    progress.advance(min(len(indices) * len(views) * ranks.world, progress.total - progress.done))
                for future in writing:
                    future.result()
                writing = [writer.submit(write_shard, self.path, self.key, v, keys[images], *made[v]) for v in views]
                if stopping := stop.agreed(ranks):
                    break
            for future in writing:
                future.result()
        return stopping

    def _make_folder(self, ranks: Ranks) -> None:
        """Make the folder, and check that all processes see it: on several nodes it could be on each one's own disk."""

        def mark() -> Path:
            self.path.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".seen-", dir=self.path)
            os.close(handle)
            return self.path / Path(name).name

        marker = ranks.from_main(mark)
        blind = sorted({name for name in ranks.gather(None if marker.exists() else nodes.name()) if name})
        ranks.from_main(marker.unlink)
        if blind:
            raise ValueError(
                f"{', '.join(blind)} can't see '{self.path}', which the main process made; set latents.folder to one "
                "that all nodes share, or latents.cache to off (encodes at every use)"
            )

    @contextmanager
    def _alone(self, ranks: Ranks, stage: str) -> Iterator[bool]:
        """Hold the lock of this cache; yields False if the file system has no locks. A collective call."""
        self._make_folder(ranks)
        with open(self.path / "lock", "a+") as handle:
            messages = itertools.chain([f"{stage}: waiting for a job that fills '{self.path}'"], itertools.repeat(""))
            # A single long wait could exceed the timeout of the process group.
            while (taken := ranks.from_main(lambda: _take(handle, next(messages)))) is None:
                pass
            yield taken


def _take(handle: IO[str], message: str) -> bool | None:
    """Wait a while for the lock. Returns None if it is still taken, False if the file system has no locks."""
    end = time.monotonic() + _SPELL
    while time.monotonic() < end:
        locked = file_lock.try_lock(handle)
        if locked is False:
            if message:
                handle.seek(0)
                print(f"{message} ({handle.read()})", file=sys.stderr, flush=True)
            message = ""
            time.sleep(_POLL)
            continue
        if locked is None:
            return False
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        return True
    return None


def _require_finite(latent: Tensor, token: Tensor, indices: Tensor, listing: data.Listing) -> None:
    finite = latent.flatten(1).isfinite().all(1) & token.isfinite().all(1)
    if not finite.all():
        index = int(indices[~finite.cpu()][0])
        raise ValueError(
            f"the encoder returned NaN or Inf for image {index} '{listing.path(index)}'; check its weights"
        )
