"""The stage ``extract``: one pass over the images for the global tokens and the latent moments."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfm import config, data, tokens
from mmfm.infra import store
from mmfm.infra.distributed import Ranks
from mmfm.infra.progress import Progress
from mmfm.statistics import Moments

VERSION = 1

Encode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Images (B, 3, h, w) float32 in [0, 1] -> latent (B, C, H, W) and global token (B, C), float32."""


def extract(
    listing_path: str | Path,
    encode: Encode,
    latent_shape: tuple[int, int, int],
    out_tokens: str | Path,
    out_moments: str | Path,
    sections: dict[str, Any],
    encoder_digest: str,
    ranks: Ranks,
) -> None:
    """Encode every image of a listing; contract in docs/stages.md.

    Shards of consecutive images are dealt to the processes in turn. A shard is finished when its moments file exists; a
    restarted run does only what is missing, so tokens and moments are those of an undisturbed run.

    Args:
        latent_shape: (C, H, W) of ``encode``'s latents.
        sections: built sections ``image``, ``encoder``, ``extract``.
        encoder_digest: identity of the encoder's weights.

    Raises:
        ValueError: an unreadable image, or tokens that are not finite; the message names the image.
    """
    listing = data.Listing.open(listing_path)
    settings: config.Extract = sections["extract"]
    identity = config.identity(sections)
    inputs = {"listing": listing.digest, "encoder": encoder_digest}
    state = store.state_directory(out_tokens, "extract", VERSION, identity, inputs)
    shards = data.ranges(0, len(listing), settings.shard_size)
    partial = state / "tokens.zarr"
    if ranks.is_main and not (partial / "zarr.json").exists():
        # Markers without a store: the kill came after the store was published. They speak of rows that are gone.
        for stale in state.glob("shard-*.safetensors"):
            stale.unlink()
        fresh = state / ".tokens.partial"
        tokens.create(fresh, len(listing), latent_shape[0], settings.shard_size, listing.labels)
        store.publish_directory(fresh, partial)
    ranks.barrier()
    done = {i for i in range(len(shards)) if _marker(state, i).exists()}
    ranks.barrier()  # before anybody finishes a shard: the work is dealt from the same list everywhere
    missing = [i for i in range(len(shards)) if i not in done]
    mine = missing[ranks.rank :: ranks.world]
    array = tokens.open_for_writing(partial)
    progress = Progress(
        "extract", len(listing), "images", done=sum(len(shards[i]) for i in done), enabled=ranks.is_main
    )
    batches = [batch for i in mine for batch in data.ranges(shards[i].start, shards[i].stop, settings.batch_size)]
    images = data.image_batches(
        listing_path, sections["image"].size, batches, settings.workers, pin=ranks.device.type == "cuda"
    )
    with progress:
        for number in mine:
            _encode_shard(images, shards[number], encode, latent_shape, array, _marker(state, number), listing, ranks,
                          progress)  # fmt: skip
    ranks.barrier()
    if ranks.is_main:
        _publish(state, len(shards), partial, Path(out_tokens), Path(out_moments), listing, encoder_digest, identity)
    ranks.barrier()


def _marker(state: Path, shard: int) -> Path:
    return state / f"shard-{shard:05d}.safetensors"


def _encode_shard(
    images: Any, rows: range, encode: Encode, latent_shape: tuple[int, int, int], array: Any, marker: Path,
    listing: data.Listing, ranks: Ranks, progress: Progress,
) -> None:  # fmt: skip
    """Encode one shard, write its rows, then the marker with its moments."""
    block = np.empty((len(rows), latent_shape[0]), np.float32)
    moments = Moments.zeros(latent_shape, device=ranks.device)
    filled = 0
    while filled < len(rows):
        indices, batch = next(images)
        latent, token = encode(data.to_float(batch, ranks.device))
        moments.update(latent)
        block[filled : filled + len(indices)] = token.cpu().numpy()
        filled += len(indices)
        progress.advance(len(indices) * ranks.world)
    broken = np.flatnonzero(~np.isfinite(block).all(axis=1))
    if len(broken):
        index = rows[int(broken[0])]
        raise ValueError(f"the encoder gives NaN or Inf for image {index} '{listing.path(index)}'; check the weights")
    array[rows.start : rows.stop] = block
    store.write_arrays(marker, moments.to_arrays(), {"tokens_digest": store.array_digest(block)})


def _publish(
    state: Path, n_shards: int, partial: Path, out_tokens: Path, out_moments: Path, listing: data.Listing,
    encoder_digest: str, identity: dict[str, Any],
) -> None:  # fmt: skip
    """Merge the moments in the order of the shards, give the store its attributes, move both into place."""
    merged, digests = None, []
    for number in range(n_shards):
        arrays, metadata = store.map_arrays(_marker(state, number))
        digests.append(metadata["tokens_digest"])
        part = Moments.from_arrays(arrays)
        merged = part if merged is None else merged.merge(part)
    provenance = {"listing_digest": listing.digest, "encoder_digest": encoder_digest, "settings": identity}
    store.write_arrays(out_moments, merged.to_arrays(), provenance)
    tokens.finish(partial, {"digest": store.fingerprint([listing.digest, *digests]), **provenance})
    store.publish_directory(partial, out_tokens)
    shutil.rmtree(state)
