"""The token store: a zarr array with the global token of every training image."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class TokenStore:
    """Global (CLS) tokens of the training images; row i belongs to image i of the listing.

    Attributes:
        tokens: zarr array (N, C) float32.
        labels: zarr array (N,) int32, class labels.
        attributes: ``digest``, ``listing_digest``, ``encoder_digest`` and ``settings`` (keys that it was made with).
        path: location of the store.
    """

    tokens: Any
    labels: Any
    attributes: dict[str, Any]
    path: Path | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def width(self) -> int:
        """Dimension C of a token."""
        return self.tokens.shape[1]

    @property
    def digest(self) -> str:
        """Digest of the contents."""
        return self.attributes["digest"]

    @property
    def listing_digest(self) -> str:
        """Digest of the listing of these images."""
        return self.attributes["listing_digest"]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) as float32 (stop - start, C).

        Raises:
            ValueError: the store is damaged in these rows.
        """
        try:
            return self.tokens[start:stop]
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"token store '{self.path}' is damaged in rows {start} to {stop} ({error}); "
                "delete it and run extract again"
            ) from error

    @classmethod
    def open(cls, path: str | Path) -> "TokenStore":
        """Open a finished store read-only.

        Raises:
            FileNotFoundError: there is no store at ``path``.
            ValueError: it is incomplete, or not a token store.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no token store at '{path}'; run extract")
        try:
            group = zarr.open_group(path, mode="r")
            result = cls(group["tokens"], group["labels"], dict(group.attrs), path)
            expected = -(-len(result) // result.tokens.shards[0])
            found = result.tokens.nchunks_initialized // (result.tokens.shards[0] // result.tokens.chunks[0])
        except (KeyError, ValueError, OSError, TypeError) as error:
            raise ValueError(f"'{path}' is not a token store ({error}); delete it and run extract again") from error
        if "digest" not in result.attributes or found < expected:
            raise ValueError(f"token store '{path}' is incomplete; delete it and run extract again")
        return result


def create(path: str | Path, n: int, width: int, shard_size: int, labels: np.ndarray) -> Any:
    """Create an empty store and return its ``tokens`` array, (n, width) float32, to be written by whole shards.

    Each shard must have a single writer: concurrent writes to one shard lose data silently. Tokens are stored
    uncompressed, as compression would not make them smaller.

    Raises:
        ValueError: ``shard_size`` is not a multiple of the chunk size.
    """
    group = zarr.open_group(path, mode="w")
    chunk = min(_CHUNK_ROWS, shard_size)
    shard = -(-shard_size // chunk) * chunk
    if shard != shard_size:
        raise ValueError(f"extract.shard_size is {shard_size}, not a multiple of {chunk}; set it to {shard}")
    tokens = group.create_array(
        "tokens",
        shape=(n, width),
        dtype="float32",
        chunks=(chunk, width),
        shards=(shard, width),
        compressors=None,
        config={"write_empty_chunks": True},  # tokens of zeros must be a file, too
    )
    group.create_array("labels", data=np.asarray(labels, np.int32), chunks=(max(1, len(labels)),))
    return tokens


def open_for_writing(path: str | Path) -> Any:
    """Return the ``tokens`` array of an unfinished store."""
    array = zarr.open_array(Path(path) / "tokens", mode="r+")
    return array.with_config({"write_empty_chunks": True})  # zarr.json does not record it


def finish(path: str | Path, attributes: dict[str, Any]) -> None:
    """Write the attributes of a completed store, which :meth:`TokenStore.open` requires."""
    zarr.open_group(path, mode="r+").attrs.update(attributes)
