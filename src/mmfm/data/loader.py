"""Batches of images by global index, read by any number of worker processes."""

import itertools
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from mmfm.data.images import center_crop, read_image
from mmfm.data.listing import Listing
from mmfm.infra import cores, disk
from mmfm.infra.distributed import processes_here

SHARED_MEMORY = Path("/dev/shm")
_PREFETCHED = 4
"""Batches that each worker reads ahead."""


class _Images(torch.utils.data.Dataset):
    """Cropped images by listing index. Each worker opens the listing itself, so that it is mapped and not copied."""

    def __init__(self, listing: Path, size: int) -> None:
        self.listing_path, self.size = listing, size
        self.listing: Listing | None = None

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        if self.listing is None:
            self.listing = Listing.open(self.listing_path)
        _check_size(self.listing, index)
        image = center_crop(read_image(self.listing.path(index)), self.size)
        return index, torch.from_numpy(np.asarray(image, np.uint8).copy()).permute(2, 0, 1)


def _check_size(listing: Listing, index: int) -> None:
    """Raise ValueError if an image's file size has changed since the images were listed.

    The digest covers paths, labels and sizes, not contents, so nothing else would notice a replaced file.
    """
    path = listing.path(index)
    if path.is_file() and path.stat().st_size != listing.sizes[index]:
        raise ValueError(
            f"image '{path}' has {path.stat().st_size:,} bytes, but had {listing.sizes[index]:,} when it was listed; "
            "list the images again (snakemake TARGET --cores all -R list_images)"
        )


def _collate(items: list[tuple[int, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([index for index, _ in items]), torch.stack([image for _, image in items])


def _prepare_worker(worker: int) -> None:
    """Limit a worker to one thread, and leave signals sent to the process group to the main process."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def image_batches(
    listing: str | Path, size: int, batches: Iterable[Sequence[int]], workers: int = 0, pin: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Read the given batches of images in order.

    Args:
        size: side of the centre crop, pixels.
        batches: global indices of each batch; may be a generator.
        workers: worker processes, at most this process's share of the job's cores; 0 reads in this one. They are
            spawned, because forking after a zarr store was opened can deadlock.
        pin: whether to put the batches into pinned memory.

    Yields:
        Indices (B,) int64 and images (B, 3, size, size) uint8.
    """
    workers = min(workers, max(1, cores.given() // processes_here()))
    batches = iter(batches)
    first = list(itertools.islice(batches, 1))
    if workers and first:
        _require_shared_memory(workers, len(first[0]) * 3 * size**2)
    loader = torch.utils.data.DataLoader(
        _Images(Path(listing), size),
        batch_sampler=itertools.chain(first, batches),  # type: ignore[arg-type]  # the stub asks for lists; any sequence works
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_prepare_worker,
        prefetch_factor=_PREFETCHED if workers else None,
    )
    return iter(loader)


def batches_of_parts(
    listing: str | Path, size: int, parts: Sequence[Sequence[int]], batch_size: int, workers: int = 0, pin: bool = False
) -> Iterator[Iterator[torch.Tensor]]:
    """Read parts of a listing, each in batches of its own; one loader prefetches across the parts.

    Args:
        parts: global indices of each part.
        listing, size, workers, pin: see :func:`image_batches`.

    Yields:
        For each part an iterator of images (B, 3, size, size) uint8, to be exhausted before the next part is asked for.
    """
    cut = [[part[rows.start : rows.stop] for rows in ranges(0, len(part), batch_size)] for part in parts]
    loaded = image_batches(listing, size, [batch for batches in cut for batch in batches], workers, pin)
    for batches in cut:
        yield (next(loaded)[1] for _ in batches)


def _require_shared_memory(workers: int, batch_bytes: int) -> None:
    """Raise ValueError if the batches that workers read ahead do not fit into the shared memory of this machine.

    A worker would be killed by SIGBUS, which explains nothing.
    """
    needed = workers * _PREFETCHED * batch_bytes * processes_here()
    if SHARED_MEMORY.is_dir() and needed > (there := disk.free(SHARED_MEMORY)):
        raise ValueError(
            f"{workers} image-reading processes read up to {needed / 1e9:.1f} GB ahead into '{SHARED_MEMORY}', where "
            f"{there / 1e9:.1f} GB are free; lower the stage's `workers` (0: the stage reads the images itself) or "
            "`batch_size`, or enlarge it (docker run --shm-size=16g, or --ipc=host)"
        )


def to_float(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move uint8 images to ``device`` and convert them to float32 in [0, 1]."""
    return images.to(device, non_blocking=True).float().div_(255)


def evenly(n: int, most: int) -> np.ndarray:
    """Return at most ``most`` evenly spaced indices below n, (m,) int64, ascending.

    In a listing, which is sorted by class, they take the same share of every class. The choice needs no seed.
    """
    m = min(n, most)
    return np.arange(m, dtype=np.int64) * n // max(m, 1)


def ranges(start: int, stop: int, step: int) -> list[range]:
    """Split [start, stop) into consecutive ranges of ``step``; the last one may be shorter."""
    return [range(first, min(first + step, stop)) for first in range(start, stop, step)]


def shards(n: int, size: int, most: int) -> list[range]:
    """Split range(n) into shards of ``size``, or of more, so that there are at most ``most``.

    They depend on n alone, so that any number of processes makes the same.
    """
    return ranges(0, n, max(size, -(-n // most)))
