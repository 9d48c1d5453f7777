"""Shards of the latent cache (:mod:`mmfm.autoencoder.latent_cache`): keys, file format, index and reader.

A shard is an immutable safetensors file with the latents of one view: ``keys`` (n, 16) uint8, ``latents`` (n, C, H, W)
and ``tokens`` (n, C), both float32.
"""

import hashlib
import json
import math
import os
import struct
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfm import data
from mmfm.infra import store

_VERSION = 1  # increase it when a change of the code changes the latent of an image


@dataclass(frozen=True)
class CacheKey:
    """Everything that a latent depends on, apart from its image.

    Attributes:
        encoder_digest: of the encoder's folder, :func:`mmfm.infra.store.folder_digest`.
        image_size: side of the crop, pixels.
        input_size: side that the encoder resizes to, pixels.
        device: type of the encoding device; GPUs round differently from CPUs.
        latent_shape: (C, H, W).
        precision: of the encoder.
        norm_affine: whether its final norm keeps weight and bias.
    """

    encoder_digest: str
    image_size: int
    input_size: int
    device: str
    latent_shape: tuple[int, int, int]
    precision: str = "float32"
    norm_affine: bool = False

    def about(self) -> dict[str, object]:
        """Return the key as JSON values. What is at its default is left out: older caches have neither."""
        usual = {f.name for f in fields(self) if f.default is not MISSING and getattr(self, f.name) == f.default}
        values = {name: value for name, value in asdict(self).items() if name not in usual}
        return {**values, "latent_shape": list(self.latent_shape), "version": _VERSION}

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the key."""
        return store.fingerprint(self.about())

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: latent, token and key."""
        channels, height, width = self.latent_shape
        return 4 * channels * (height * width + 1) + 16


def image_keys(listing: data.Listing) -> np.ndarray:
    """Return a 128-bit hash of full path and file size for each image, (N,) of dtype S16.

    Links in the path of the image folder are resolved.
    """
    keys = bytearray(16 * len(listing))
    root = hashlib.blake2b(os.fsencode(listing.root.resolve()) + b"/", digest_size=16)
    paths, sizes = listing.path_bytes.tobytes(), np.asarray(listing.sizes, "<i8").tobytes()
    for block in data.ranges(0, len(listing), 1 << 16):
        offsets = listing.path_offsets[block.start : block.stop + 1].tolist()
        for i, start, stop in zip(block, offsets[:-1], offsets[1:], strict=True):
            image = root.copy()
            image.update(paths[start:stop] + b"\0" + sizes[8 * i : 8 * i + 8])
            keys[16 * i : 16 * i + 16] = image.digest()
    return np.frombuffer(keys, "S16")


def write_shard(
    folder: Path, key: CacheKey, view: int, images: np.ndarray, latents: np.ndarray, tokens: np.ndarray
) -> None:
    """Write a shard atomically; its name depends only on its images.

    Args:
        images: (n,) keys from :func:`image_keys`.
        latents: (n, C, H, W) float32.
        tokens: (n, C) float32.
    """
    keys = np.ascontiguousarray(images).view(np.uint8).reshape(-1, 16)
    path = folder / f"view{view}-{store.array_digest(keys)[:16]}.safetensors"
    store.write_arrays(path, {"keys": keys, "latents": latents, "tokens": tokens}, {"cache": key.digest, "view": view})


def _damaged(path: Path) -> ValueError:
    return ValueError(
        f"the latent cache's shard '{path}' is missing, damaged, truncated or of another cache; delete it and run the "
        "same command again to encode its images"
    )


@dataclass(frozen=True)
class Index:
    """The location of all latents of one view.

    Attributes:
        paths: the shards.
        keys: (M,) S16, sorted.
        shards, rows: (M,) int32, index into ``paths`` and row in that shard.
    """

    paths: list[Path]
    keys: np.ndarray
    shards: np.ndarray
    rows: np.ndarray

    @classmethod
    def read(cls, folder: Path, key: CacheKey, view: int) -> "Index":
        """Read the keys of all shards and check headers and file sizes, without reading latents.

        Raises:
            ValueError: a shard is damaged or belongs to another cache.
        """
        paths, found = sorted(folder.glob(f"view{view}-*.safetensors")), []
        for path in paths:
            try:
                arrays, metadata = store.map_arrays(path)
                n = len(arrays["keys"])
                shapes = [(n, 16), (n, *key.latent_shape), (n, key.latent_shape[0])]
                if [arrays[name].shape for name in ("keys", "latents", "tokens")] != shapes:
                    raise ValueError("other shapes")
                if (metadata["cache"], metadata["view"]) != (key.digest, view):
                    raise ValueError("another cache")
            except (OSError, ValueError, KeyError) as error:
                raise _damaged(path) from error
            found.append(np.array(arrays["keys"]).view("S16").ravel())
        sizes = [len(keys) for keys in found]
        keys = np.concatenate([np.empty(0, "S16"), *found])
        order = np.argsort(keys, kind="stable")
        shards = np.repeat(np.arange(len(paths), dtype=np.int32), sizes)
        rows = np.concatenate([np.empty(0, np.int32), *(np.arange(n, dtype=np.int32) for n in sizes)])
        return cls(paths, keys[order], shards[order], rows[order])

    def find(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return shard and row, both (N,) int32, of images by their keys (N,); -1 for missing images."""
        shards, rows = np.full((2, len(images)), -1, np.int32)
        if len(self.keys):
            order = np.argsort(images)  # searching in sorted order is cache-friendly
            place = np.searchsorted(self.keys, images[order]).clip(max=len(self.keys) - 1)
            hit = self.keys[place] == images[order]
            shards[order[hit]], rows[order[hit]] = self.shards[place[hit]], self.rows[place[hit]]
        return shards, rows


class LatentReader:
    """Reads latents and tokens by image index. Shards are memory-mapped on first use.

    Args:
        indices: one index per view.
        images: (N,) keys of the listing's images.
        device: where latents and tokens are wanted.

    Raises:
        ValueError: an image of the listing is missing.
    """

    def __init__(self, key: CacheKey, indices: list[Index], images: np.ndarray, device: torch.device) -> None:
        self._device = device
        self._shape, self._mapped = key.latent_shape, dict[Path, tuple[np.ndarray, np.ndarray]]()
        self._paths = [index.paths for index in indices]
        self._shards, self._rows = (np.stack(each) for each in zip(*(i.find(images) for i in indices), strict=True))
        if lacking := int((self._shards < 0).sum()):
            raise ValueError(
                f"{lacking:,} of {self._shards.size:,} latents are missing from the cache; run the same command again "
                "to encode them"
            )

    def __call__(self, indices: Tensor, view: int | Tensor = 0) -> tuple[Tensor, Tensor]:
        """Return latents (b, C, H, W) and tokens (b, C) of images (b,), float32 on the device.

        Args:
            view: 0 or 1 (mirror images), for all images or as (b,) integer or bool.

        Raises:
            ValueError: a shard was removed or damaged after its index was read.
        """
        n, images = len(indices), indices.cpu().numpy()
        views = np.broadcast_to(view.cpu().numpy() if isinstance(view, Tensor) else view, n).astype(np.int64)
        pin = self._device.type == "cuda"
        latents = torch.empty(n, *self._shape, pin_memory=pin)
        tokens = torch.empty(n, self._shape[0], pin_memory=pin)
        latent_rows, token_rows = latents.numpy(), tokens.numpy()
        shards, rows = self._shards[views, images].tolist(), self._rows[views, images].tolist()
        for i, (v, shard, row) in enumerate(zip(views.tolist(), shards, rows, strict=True)):
            path = self._paths[v][shard]
            mapped = self._mapped.get(path) or self._map(path)
            latent_rows[i], token_rows[i] = mapped[0][row], mapped[1][row]
        return latents.to(self._device, non_blocking=pin), tokens.to(self._device, non_blocking=pin)

    def _map(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        try:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            # np.memmap would keep a file descriptor open for each of thousands of shards.
            floats = torch.from_file(str(path), size=path.stat().st_size // 4, dtype=torch.float32).numpy()
            latents, tokens = (
                floats[(8 + length + start) // 4 :][: math.prod(shape)].reshape(shape)
                for shape, (start, _) in (
                    (header[n]["shape"], header[n]["data_offsets"]) for n in ("latents", "tokens")
                )
            )
        except (OSError, ValueError, KeyError, RuntimeError, struct.error) as error:
            raise _damaged(path) from error
        self._mapped[path] = (latents, tokens)
        return latents, tokens
