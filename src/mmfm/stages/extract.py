"""``extract``: one pass over the images for their global tokens and the moments of their latents.

Reads the listing, the encoder's folder, the images. Writes ``cls_tokens.zarr``, row i for image i, and
``latent_moments.safetensors``: moments are taken here because another pass over 1.28 million images would cost hours.

The unit of work is a shard of ``extract.shard_size`` consecutive images: its rows in the state's ``tokens.zarr``, and
then ``shard-00003.safetensors`` with the moments of its latents and the digest of its tokens. The shard is finished
when that file exists; a kill leaves whole shards, and rows that are written again.
"""

import functools
import math
from pathlib import Path

import numpy as np

from mmfm import data
from mmfm.autoencoder.encoders import Encoder, load_encoder
from mmfm.config import StageConfig
from mmfm.data import tokens
from mmfm.data.moments import Moments
from mmfm.infra import store
from mmfm.infra.distributed import Ranks
from mmfm.stages import provenance
from mmfm.stages.runner import Advance, Context, run_units

_TOKENS, _MOMENTS = "tokens.zarr", "latent_moments.safetensors"


def extract(
    config: StageConfig, listing: Path, encoder_weights: Path, out_tokens: Path, out_moments: Path, ranks: Ranks
) -> None:
    """Encode every image of a listing.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: an unreadable image, or tokens that are not finite; the message names the image.
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
        self.context, self.path, self.weights = context, listing, encoder_weights
        self.config, self.device = context.config, context.ranks.device
        self.listing = data.Listing.open(listing)
        self.shards = data.ranges(0, len(self.listing), self.config.extract.shard_size)
        self.store = context.state / _TOKENS

    @functools.cached_property
    def encoder(self) -> Encoder:
        """Loaded where there is something to encode."""
        about = self.config.encoder
        return load_encoder(about.family, self.weights, about.input_size, self.device)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.encoder.hidden_size, *self.encoder.grid)

    def run(self) -> None:
        """Make the shards that are missing, and both results."""
        run_units(
            self.context,
            self.shards,
            make=self.encode,
            is_done=lambda rows: self.marker(rows).exists(),
            publish=self.publish,
            prepare=self.prepare,
            bytes_written=self.bytes_written,
        )

    def bytes_written(self) -> int:
        """Tokens in float32, and two moments in float64 a shard and in all."""
        moments = 16 * math.prod(self.latent_shape) * (len(self.shards) + 1)
        return 4 * len(self.listing) * self.latent_shape[0] + moments

    def marker(self, rows: range) -> Path:
        """The file whose existence says that a shard is finished."""
        return self.context.state / f"shard-{rows.start // self.config.extract.shard_size:05d}.safetensors"

    def prepare(self) -> None:
        """Lay out the store of the tokens."""
        if (self.store / "zarr.json").exists():
            return
        for stale in self.context.state.glob("shard-*.safetensors"):
            stale.unlink()  # without a store it speaks of rows that are gone
        fresh = self.context.state / ".tokens.partial"
        width, shard_size = self.latent_shape[0], self.config.extract.shard_size
        tokens.create(fresh, len(self.listing), width, shard_size, self.listing.labels)
        store.publish_directory(fresh, self.store)

    def encode(self, shards: list[range], advance: Advance) -> None:
        """Encode shards, fed by one loader that reads on across them; write the rows, then the marker of each."""
        size, array = self.config.extract.batch_size, tokens.open_for_writing(self.store)
        batches = [batch for rows in shards for batch in data.ranges(rows.start, rows.stop, size)]
        images = data.image_batches(
            self.path, self.config.image.size, batches, self.config.extract.workers, pin=self.device.type == "cuda"
        )
        for rows in shards:
            block = np.empty((len(rows), self.latent_shape[0]), np.float32)
            moments = Moments.zeros(self.latent_shape, device=self.device)
            filled = 0
            while filled < len(rows):
                indices, batch = next(images)
                latent, token = self.encoder(data.to_float(batch, self.device))
                moments.update(latent)
                block[filled : filled + len(indices)] = token.cpu().numpy()
                filled += len(indices)
                advance(len(indices))
            self.require_finite(block, rows)
            array[rows.start : rows.stop] = block
            store.write_arrays(self.marker(rows), moments.to_arrays(), {"tokens_digest": store.array_digest(block)})

    def require_finite(self, block: np.ndarray, rows: range) -> None:
        """Raise ValueError that names the first image whose token is not finite."""
        broken = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if len(broken):
            index = rows[int(broken[0])]
            raise ValueError(
                f"the encoder gives NaN or Inf for image {index} '{self.listing.path(index)}'; check the weights"
            )

    def publish(self, finished: Path) -> None:
        """Check every shard against its marker, merge the moments in order, and write both results."""
        merged, digests, written = None, [], tokens.open_for_writing(self.store)
        for number, rows in enumerate(self.shards):
            arrays, metadata = store.map_arrays(self.marker(rows))
            if store.array_digest(written[rows.start : rows.stop]) != metadata["tokens_digest"]:
                self.marker(rows).unlink()
                raise ValueError(
                    f"shard {number} of the tokens was damaged on disk; run the same command again to mend it"
                )
            digests.append(metadata["tokens_digest"])
            part = Moments.from_arrays(arrays)
            merged = part if merged is None else merged.merge(part)
        about = {**self.context.inputs.made_from(), "settings": dict(self.context.identity)}
        tokens.finish(self.store, {"digest": store.fingerprint([self.listing.digest, *digests]), **about})
        store.write_arrays(finished / _MOMENTS, merged.to_arrays(), about)
        store.place_linked(self.store, finished / _TOKENS)
