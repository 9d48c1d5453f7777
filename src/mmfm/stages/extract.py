"""``extract``: encode every image once and keep its global token and the moments of all latents.

Reads: the listing, the images, the encoder; latents from the latent cache, which it fills first.
Writes: ``cls_tokens.zarr``, whose row i is the token of image i, and ``latent_moments.safetensors``. The moments are
    taken here because a second pass over 1.28 million images would cost hours.
Unit of work: a shard of ``extract.shard_size`` consecutive images. Its tokens go into ``tokens.zarr`` in the state;
    then ``shard-00003.safetensors``, with the latent moments and the digest of the tokens, marks it as done.
After a kill: shards with a marker are kept, the others are made again; what is in the latent cache is encoded no more.
"""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np

from mmfm import data
from mmfm.autoencoder.encoders import Encoder, configured_encoder
from mmfm.autoencoder.latent_cache import ReadLatents
from mmfm.config import StageConfig
from mmfm.data import tokens
from mmfm.data.moments import Moments
from mmfm.infra import store
from mmfm.infra.distributed import Ranks
from mmfm.stages import provenance
from mmfm.stages.cached_latents import encoded, open_cache
from mmfm.stages.runner import Advance, Context, Work, run_units

_TOKENS, _MOMENTS = "tokens.zarr", "latent_moments.safetensors"


def extract(
    config: StageConfig, listing: Path, encoder_weights: Path, out_tokens: Path, out_moments: Path, ranks: Ranks
) -> None:
    """Encode every image of a listing.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: an image can't be read, or its token is not finite; the message names the image.
    """
    inputs = ranks.from_main(
        lambda: provenance.belong_together(provenance.listing(listing), provenance.encoder(encoder_weights))
    )
    outputs = {_TOKENS: out_tokens, _MOMENTS: out_moments}
    with Context.open(config, ranks, inputs, outputs) as context:
        _Extraction(context, listing, encoder_weights).run()


class _Extraction:
    """The shards of one run."""

    def __init__(self, context: Context, listing: Path, encoder_weights: Path) -> None:
        self.context, self.listing_path, self.encoder_weights = context, listing, encoder_weights
        self.config, self.device = context.config, context.ranks.device
        self.listing = data.Listing.open(listing)
        self.shards = data.ranges(0, len(self.listing), self.config.extract.shard_size)
        self.store = context.state / _TOKENS
        self.cache: ReadLatents | None = None

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The encoder, loaded on first use: a finished run does not need it."""
        return configured_encoder(self.config.encoder, self.encoder_weights, self.device)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.encoder.hidden_size, *self.encoder.grid)

    def run(self) -> None:
        """Encode the missing shards and publish tokens and moments."""
        work = Work(self.shards, self.encode, lambda rows: self.marker(rows).exists(), self.open_cache)
        run_units(self.context, work, publish=self.publish, prepare=self.prepare, bytes_written=self.bytes_written)

    def bytes_written(self) -> int:
        """Bytes of the float32 tokens, and of mean and m2 in float64 for every shard and for the whole."""
        moments = 16 * math.prod(self.latent_shape) * (len(self.shards) + 1)
        return 4 * len(self.listing) * self.latent_shape[0] + moments

    def marker(self, rows: range) -> Path:
        """The file whose existence marks a shard as done."""
        return self.context.state / f"shard-{rows.start // self.config.extract.shard_size:05d}.safetensors"

    def prepare(self) -> None:
        """Create the token store unless it exists."""
        if (self.store / "zarr.json").exists():
            return
        for stale in self.context.state.glob("shard-*.safetensors"):
            stale.unlink()  # the rows that it marks are lost with the store
        fresh = self.context.state / ".tokens.partial"
        width, shard_size = self.latent_shape[0], self.config.extract.shard_size
        tokens.create(fresh, len(self.listing), width, shard_size, self.listing.labels)
        store.publish_directory(fresh, self.store)

    def open_cache(self) -> None:
        """Open the latent cache, if there is one; a collective call."""
        section = self.config.extract
        self.cache = open_cache(
            self.context, self.listing_path, self.encoder, self.encoder_weights, crop=section.crop,
            workers=section.workers,
        )  # fmt: skip

    def encode(self, shards: list[range], advance: Advance) -> None:
        """Encode shards with one loader that prefetches across them; write a shard's rows, then its marker."""
        array, section = tokens.open_for_writing(self.store), self.config.extract
        batches = [batch for rows in shards for batch in data.ranges(rows.start, rows.stop, section.batch_size)]
        latents = encoded(
            self.context, self.listing_path, batches, self.encoder, self.cache, section.crop, section.workers
        )
        for rows in shards:
            block = np.empty((len(rows), self.latent_shape[0]), np.float32)
            moments = Moments.zeros(self.latent_shape, device=self.device)
            filled = 0
            while filled < len(rows):
                latent, token = next(latents)
                moments.update(latent)
                block[filled : filled + len(token)] = token.cpu().numpy()
                filled += len(token)
                advance(len(token))
            self.require_finite(block, rows)
            array[rows.start : rows.stop] = block
            store.write_arrays(self.marker(rows), moments.to_arrays(), {"tokens_digest": store.array_digest(block)})

    def require_finite(self, block: np.ndarray, rows: range) -> None:
        """Raise a ValueError that names the first image whose token is not finite."""
        broken = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if len(broken):
            index = rows[int(broken[0])]
            raise ValueError(
                f"the encoder gives NaN or Inf for image {index} '{self.listing.path(index)}'; check its weights"
            )

    def publish(self, finished: Path) -> None:
        """Check the rows of every shard, merge the moments in order, and write both results."""
        array = tokens.open_for_writing(self.store)
        checked = (self.checked(rows, array) for rows in self.shards)
        moments, digest = next(checked)
        digests = [digest]
        for part, digest in checked:
            moments.merge(part)
            digests.append(digest)
        about = {**self.context.inputs.made_from(), "settings": dict(self.context.identity)}
        tokens.finish(self.store, {"digest": store.fingerprint([self.listing.digest, *digests]), **about})
        store.write_arrays(finished / _MOMENTS, moments.to_arrays(), about)
        store.place_linked(self.store, finished / _TOKENS)

    def checked(self, rows: range, array: Any) -> tuple[Moments, str]:
        """Return the moments of a shard and the digest of its tokens.

        Raises:
            ValueError: the tokens in the store have another digest; the shard's marker is removed.
        """
        arrays, metadata = store.map_arrays(self.marker(rows))
        digest = metadata["tokens_digest"]
        if store.array_digest(array[rows.start : rows.stop]) != digest:
            self.marker(rows).unlink()
            number = self.shards.index(rows)
            raise ValueError(f"shard {number} of the tokens is damaged on disk; run the same command again to redo it")
        return Moments.from_arrays(arrays), digest
