"""Latents of the listed images for the stages that need them: from the latent cache, or encoded at every use."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmfm import data
from mmfm.autoencoder.encoders import Encoder, EncoderOutput
from mmfm.autoencoder.latent_cache import Encode, LatentCache, ReadLatents, use_cache
from mmfm.autoencoder.latent_shards import CacheKey
from mmfm.config import StageConfig
from mmfm.infra import memory, store
from mmfm.stages.runner import Context


def crop_size(config: StageConfig, crop: str) -> int:
    """Return the side in pixels to which images are cropped, for a value of the keys ``crop``."""
    return config.encoder.input_size if crop == "encoder" else config.image.size


@memory.explained("Set latents.cache to off, which encodes in the stage's own batches")
def open_cache(
    context: Context,
    listing: Path,
    encoder: Encoder,
    encoder_weights: Path,
    normalise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = EncoderOutput,
    *,
    crop: str = "image",
    views: int = 1,
    workers: int = 0,
) -> ReadLatents | None:
    """Open the latent cache, after encoding what it lacks of a listing; a collective call.

    Args:
        encoder_weights: folder of the encoder.
        normalise: applied to latents and tokens.
        crop: of the images; other crops have caches of their own.
        views: 2 with mirror images, else 1.
        workers: image-reading processes.

    Returns:
        What reads latents from it; None if latents.cache says that there is no cache.

    Raises:
        ValueError: see :meth:`mmfm.autoencoder.latent_cache.LatentCache.fill`; or memory ran out.
    """
    config, ranks, images = context.config, context.ranks, data.Listing.open(listing)

    def describe() -> LatentCache | None:
        """Open the cache on the main process, and decide whether it is used."""
        shape = (encoder.hidden_size, *encoder.grid)
        digest, size = store.folder_digest(encoder_weights), crop_size(config, crop)
        how = config.encoder.precision, config.encoder.norm_affine
        key = CacheKey(digest, size, encoder.input_size, ranks.device.type, shape, *how)
        cache = LatentCache(config.latents.folder, encoder.family, key)

        def missing() -> int:
            return int(cache.missing(images, views).sum()) * key.row_bytes

        wanted = use_cache(config.latents.cache, cache.bytes_needed(len(images), views), missing, config.latents.folder)
        return cache if wanted else None

    cache: LatentCache | None = ranks.from_main(describe)
    if cache is None:
        return None
    cache.fill(listing, encoder, ranks, stage=config.stage, views=views, workers=workers)
    reader = cache.reader(images, views, ranks.device)
    return lambda indices, flipped=0: normalise(*reader(indices, flipped))


def encoded(
    context: Context,
    listing: Path,
    batches: Sequence[Sequence[int]],
    encode: Encode,
    cache: ReadLatents | None,
    crop: str,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield latents (B, C, H, W) and global tokens (B, C) of batches of images.

    Args:
        batches: indices of the listing.
        encode, crop, workers: encoder, crop and number of image-reading processes, used without a cache.
    """
    device = context.ranks.device
    if cache is None:
        size, pin = crop_size(context.config, crop), device.type == "cuda"
        for _, pixels in data.image_batches(listing, size, batches, workers, pin=pin):
            yield encode(data.to_float(pixels, device))
    else:
        for batch in batches:
            yield cache(torch.as_tensor(batch))
