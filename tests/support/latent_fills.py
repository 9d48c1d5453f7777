"""Fills latent caches of tiny images: imported, or started by test_latent_cache.py as one process or several.

python tests/support/latent_fills.py LISTING FOLDER [KILL_AFTER | slow | apart | SIGNAL]
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from mmfm.autoencoder import latent_cache
from mmfm.autoencoder.latent_cache import LatentCache
from mmfm.autoencoder.latent_shards import CacheKey
from mmfm.infra.distributed import Ranks, process_group
from support.tiny import CHANNELS, GRID, SIZE

ALONE = Ranks(0, 1, torch.device("cpu"))
SHARD = 6
"""Images of a shard in these tests."""

AT = 8
"""Images, each view counted, after which a process is sent a signal: within its first two shards."""


def open_cache(folder: Path, **changes: object) -> LatentCache:
    values = {"encoder_digest": "abc", "image_size": SIZE, "input_size": SIZE, "device": "cpu"}
    shape = {"latent_shape": (CHANNELS, GRID, GRID)}
    return LatentCache(folder, "tiny", CacheKey(**{**values, **shape, **changes}))


class Fake:
    """Encodes by pooling, which tells images and their mirror images apart, and counts the images it is shown.

    Args:
        fail_after: images after which it raises.
    """

    def __init__(self, fail_after: int = 10**9) -> None:
        self.seen, self.fail_after = 0, fail_after

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += len(images)
        if self.seen > self.fail_after:
            raise RuntimeError("stopped")
        pooled = torch.nn.functional.adaptive_avg_pool2d(images, GRID)
        latent = pooled.repeat(1, 11, 1, 1)[:, :CHANNELS] * torch.arange(1, CHANNELS + 1)[:, None, None]
        return latent, latent[:, :, 0, 0]


def main(listing: Path, folder: Path, how: str = "") -> None:
    latent_cache._SHARD_IMAGES = SHARD
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
    fake = Fake()
    if how == "apart":  # a relative folder is then each process's own, as a disk of its node is
        os.chdir(tempfile.mkdtemp())

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        if how.startswith("SIG") and fake.seen == AT:
            signal.raise_signal(signal.Signals[how])
        elif how == "slow":
            time.sleep(0.05)
        elif how.isdigit() and fake.seen >= int(how):
            os.kill(os.getpid(), signal.SIGKILL)
        return fake(images)

    with process_group() as ranks:
        made = open_cache(folder).fill(listing, encode, ranks, stage="extract", views=2, batch_size=4)
        print(f"encoded {fake.seen} of {made}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
