"""The store of global tokens: zarr, one row per training image."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class TokenStore:
    """Global ("CLS") tokens of the training images, row i for image i of the listing.

    Attributes:
        tokens: zarr array (N, C) float32.
        labels: zarr array (N,) int32, class labels.
        attributes: ``digest``, ``listing_digest``, ``encoder_digest``, ``settings``.
        path: where the store lies.
    """

    tokens: Any
    labels: Any
    attributes: dict[str, Any]
    path: Path | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def width(self) -> int:
        """Length C of a token."""
        return self.tokens.shape[1]

    @property
    def digest(self) -> str:
        """Digest of the contents."""
        return self.attributes["digest"]

    @property
    def listing_digest(self) -> str:
        """Digest of the listing whose images these are."""
        return self.attributes["listing_digest"]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) as float32 (stop - start, C).

        Raises:
            ValueError: the store is damaged there.
        """
        try:
            return self.tokens[start:stop]
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"token store '{self.path}' is damaged in rows {start} to {stop} ({error}); delete it and run extract"
            ) from error

    @classmethod
    def open(cls, path: str | Path) -> "TokenStore":
        """Open a finished store read-only.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is unfinished, truncated, or something else.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no token store at '{path}'; run the stage extract")
        try:
            group = zarr.open_group(path, mode="r")
            result = cls(group["tokens"], group["labels"], dict(group.attrs), path)
            expected = -(-len(result) // result.tokens.shards[0])
            found = result.tokens.nchunks_initialized // (result.tokens.shards[0] // result.tokens.chunks[0])
        except (KeyError, ValueError, OSError, TypeError) as error:
            raise ValueError(f"'{path}' is no token store ({error}); delete it and run extract again") from error
        if "digest" not in result.attributes or found < expected:
            raise ValueError(f"token store '{path}' is not whole; delete it and run extract again")
        return result


def create(path: str | Path, n: int, width: int, shard_size: int, labels: np.ndarray) -> Any:
    """Create an empty store and return its ``tokens`` array (n, width) float32 for writing whole shards.

    Two writers in one shard lose data without an error, so each shard has one writer. Tokens do not compress.
    """
    group = zarr.open_group(path, mode="w")
    chunk = min(_CHUNK_ROWS, shard_size)
    shard = -(-shard_size // chunk) * chunk
    if shard != shard_size:
        raise ValueError(f"extract.shard_size {shard_size} is no multiple of {chunk}; take {shard}")
    tokens = group.create_array(
        "tokens", shape=(n, width), dtype="float32", chunks=(chunk, width), shards=(shard, width), compressors=None
    )
    group.create_array("labels", data=np.asarray(labels, np.int32), chunks=(max(1, len(labels)),))
    return tokens


def open_for_writing(path: str | Path) -> Any:
    """Return the ``tokens`` array of a store under construction."""
    return zarr.open_group(path, mode="r+")["tokens"]


def finish(path: str | Path, attributes: dict[str, Any]) -> None:
    """Give a completely written store its attributes, by which :meth:`TokenStore.open` knows that it is whole."""
    zarr.open_group(path, mode="r+").attrs.update(attributes)
