"""The stage ``extract``: one pass over the images for the global tokens and the latent moments."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfm import config, data, tokens
from mmfm.infra import space, stage_state, store
from mmfm.infra.distributed import Ranks
from mmfm.infra.progress import Progress
from mmfm.statistics import Moments

VERSION = config.VERSIONS["extract"]

_TOKENS, _MOMENTS = "tokens.zarr", "latent_moments.safetensors"

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
    outputs = {_TOKENS: out_tokens, _MOMENTS: out_moments}
    shards = data.ranges(0, len(listing), settings.shard_size)

    def _open_state() -> tuple[Path, list[int] | None]:
        state = stage_state.state_directory(out_tokens, "extract", VERSION, identity, inputs, {"listing": listing_path})
        if stage_state.restore(state, outputs):
            return state, None
        if not (state / "tokens.zarr" / "zarr.json").exists():
            # Markers without a store speak of rows that are gone.
            for stale in state.glob("shard-*.safetensors"):
                stale.unlink()
            fresh = state / ".tokens.partial"
            tokens.create(fresh, len(listing), latent_shape[0], settings.shard_size, listing.labels)
            store.publish_directory(fresh, state / "tokens.zarr")
        floats = len(listing) * latent_shape[0]
        space.require(state, "extract", 4 * floats + 16 * math.prod(latent_shape) * (len(shards) + 1))
        return state, [i for i in range(len(shards)) if not _marker(state, i).exists()]

    # One process looks at the disk, so that all deal from the same list.
    state, missing = ranks.from_main(_open_state)
    if missing is None:
        Progress("extract", len(listing), "images", done=len(listing), enabled=ranks.is_main)
        return
    mine = missing[ranks.rank :: ranks.world]
    partial = state / "tokens.zarr"
    array = tokens.open_for_writing(partial)
    done = len(listing) - sum(len(shards[i]) for i in missing)
    progress = Progress("extract", len(listing), "images", done=done, enabled=ranks.is_main)
    batches = [batch for i in mine for batch in data.ranges(shards[i].start, shards[i].stop, settings.batch_size)]
    images = data.image_batches(
        listing_path, sections["image"].size, batches, settings.workers, pin=ranks.device.type == "cuda"
    )
    with progress:
        for number in mine:
            _encode_shard(images, shards[number], encode, latent_shape, array, _marker(state, number), listing, ranks,
                          progress)  # fmt: skip
    ranks.barrier()
    ranks.from_main(lambda: _publish(state, outputs, shards, partial, listing, encoder_digest, identity))


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
    state: Path, outputs: dict[str, str | Path], shards: list[range], partial: Path, listing: data.Listing,
    encoder_digest: str, identity: dict[str, Any],
) -> None:  # fmt: skip
    """Check every shard against its marker, merge the moments in order, and publish both results."""
    merged, digests, written = None, [], tokens.open_for_writing(partial)
    for number, rows in enumerate(shards):
        arrays, metadata = store.map_arrays(_marker(state, number))
        if store.array_digest(written[rows.start : rows.stop]) != metadata["tokens_digest"]:
            _marker(state, number).unlink()
            raise ValueError(f"shard {number} of the tokens was damaged on disk; run the same command again to mend it")
        digests.append(metadata["tokens_digest"])
        part = Moments.from_arrays(arrays)
        merged = part if merged is None else merged.merge(part)
    provenance = {"listing_digest": listing.digest, "encoder_digest": encoder_digest, "settings": identity}
    tokens.finish(partial, {"digest": store.fingerprint([listing.digest, *digests]), **provenance})
    with stage_state.finishing(state, outputs) as finished:
        store.write_arrays(finished / _MOMENTS, merged.to_arrays(), provenance)
        store.place_linked(partial, finished / _TOKENS)
