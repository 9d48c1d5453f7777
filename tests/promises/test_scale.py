"""Memory does not grow with the number of images, in any stage."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from mmfm import data
from mmfm.data import tokens
from mmfm.infra import store
from mmfm.mixture.spatial import SpatialMixture
from support import processes, stage_commands
from support.tiny import write_images, write_listing

FEW, MANY = 400, 1600
SIDE = 32

CHANGES = {
    "extract": {"shard_size": 100, "batch_size": 100},
    "gmm": {"chunk_size": 2048, "cache_gb": 0.0, "max_iter": 2},
    "spatial_gmm": {"batch_size": 32},
    "decoder": {"global_batch": 32, "checkpoint_every": 100},
    "train": {"global_batch": 32, "checkpoint_every": 100},
    "sample": {"shard_size": 200, "batch_size": 200},
    "fid": {"batch_size": 32},
}
"""No caches in memory, and batches that take more memory than the rest.

Those of ``sample`` are larger: its peaks are so short that a look from outside misses some of a small batch.
"""


def assert_flat(few: int, many: int) -> None:
    """The growth is the same within 5 %; half a megabyte is left to the allocator."""
    assert few > 2e6, f"{few:,} bytes: nothing was measured"
    assert many < 1.05 * few + 5e5, f"{few:,} bytes became {many:,} with four times the images"


def half_in_one_mode(assignment: Path) -> None:
    arrays, about = store.map_arrays(assignment)
    labels = np.array(arrays["labels"])
    labels[::2] = 0
    counts = np.bincount(labels, minlength=len(arrays["counts"]))
    store.write_arrays(assignment, {"labels": labels, "counts": counts}, about)


def grow(root: Path, encoder: Path, n: int, cache: str) -> dict[str, int]:
    """Run every stage on n images (a few files under many names) and return the growth of each one's memory, bytes."""
    originals = sorted(write_images(root / "originals", 40, size=SIDE).rglob("*.png"))
    for i in range(n):
        path = root / "images" / f"class{i % 2}" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(originals[i % len(originals)])
    listing = write_listing(root / "listing.safetensors", root / "images")
    heldout = write_listing(root / "heldout.safetensors", root / "originals")
    latents = {"cache": cache, "folder": str(root / "latents")}
    changes = {**CHANGES, "latents": latents, "sample": {**CHANGES["sample"], "n_images": 2 * n}}
    grown = {}
    for name, stage in stage_commands.describe(root, encoder, listing, heldout).items():
        constants = {**dict.fromkeys(stage.constants, 100), "mmfm.autoencoder.latent_cache._SHARD_IMAGES": 100}
        grown[name] = processes.growth(
            stage.command(stage.made, **changes), stage_commands.errors_file(stage.made), constants
        )
        if name == "fit_gmm":
            half_in_one_mode(stage.made / "assignment.safetensors")
    return grown


@pytest.fixture(scope="module", params=["on", "off"])
def growths(request, tmp_path_factory, tiny_encoder) -> list[dict[str, int]]:
    """With and without a latent cache."""
    roots = [tmp_path_factory.mktemp(str(n)) for n in (FEW, MANY)]
    return [grow(root, tiny_encoder, n, request.param) for root, n in zip(roots, (FEW, MANY), strict=True)]


@pytest.mark.parametrize(
    "name", ["extract", "spatial_gmm", "train_decoder", "train", "sample", "fid_reference", "fid", "mode_quality"]
)
def test_four_times_the_images_take_no_more_memory(growths, name):
    few, many = (grown[name] for grown in growths)
    assert_flat(few, many)


def test_four_times_the_tokens_take_no_more_memory(stages, tmp_path):
    """fit_gmm at a fixed number of modes."""
    grown = []
    for n in (8_000, 32_000):
        path, width = tmp_path / f"{n}.zarr", 256
        array = tokens.create(path, n, width, 4096, np.zeros(n, np.int32))
        for rows in data.ranges(0, n, 4096):
            array[rows.start : rows.stop] = np.random.default_rng(rows.start).normal(size=(len(rows), width))
        tokens.finish(path, {"digest": str(n), "listing_digest": "l", "encoder_digest": "e"})
        stage = replace(stages["fit_gmm"], inputs={"--tokens": path})
        out = tmp_path / str(n)
        command, errors = stage.command(out, gmm=CHANGES["gmm"]), stage_commands.errors_file(out)
        constants = {"mmfm.mixture.validity.SILHOUETTE_IMAGES": 1000}  # a sample of fixed size, which both are above
        grown.append(processes.growth(command, errors, constants))
    assert_flat(*grown)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_the_means_takes_the_memory_of_the_means(tmp_path, dtype):
    """No second copy of the store, and none in another dtype: 64 MB of rows into 64 MB or 32 MB."""
    shape = (512, 128, 16, 16)
    group = zarr.open_group(tmp_path / "spatial_gmm.zarr", mode="w")
    layout = {"shape": shape, "dtype": "float32", "chunks": (1, *shape[1:]), "compressors": None}
    group.create_array("means", **layout)[:] = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for name in ("variances", "weights", "counts"):
        group.create_array(name, data=np.ones(shape[0]))
    group.attrs["digest"] = "d"
    grown = processes.call_growth(_load_means, tmp_path / "memory", tmp_path / "spatial_gmm.zarr", dtype)
    size = dtype.itemsize * np.prod(shape)
    assert 0.95 * size < grown < 1.05 * size + 3e6


def _load_means(path: Path, dtype: torch.dtype) -> None:
    mixture = SpatialMixture.open(path)
    means = mixture.load_means(dtype=dtype)
    assert means.dtype == dtype and means[511, 127, 15, 15] == torch.tensor(mixture.means[511, 127, 15, 15]).to(dtype)


def test_a_listing_of_a_million_images_costs_nothing_to_open(tmp_path):
    """Neither memory nor time: a thousand times the images may take ten times the processor's, not a thousand."""
    seconds = []
    for n in (1_000, 1_000_000):
        names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i:07d}.JPEG" for i in range(n)]
        zeros = np.zeros(n, np.int64)
        data.write_listing(tmp_path / "listing", tmp_path, "train", ["all"], names, zeros, zeros)
        seconds.append(min(_processor_seconds(_open_and_read, tmp_path / "listing", n) for _ in range(20)))
    grown = processes.call_growth(_open_and_read, tmp_path / "memory", tmp_path / "listing", n)
    assert grown < 20e6
    assert seconds[1] < 10 * seconds[0]


def _processor_seconds(function: Callable[..., None], *arguments: object) -> float:
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def _open_and_read(path: Path, n: int) -> None:
    listing = data.Listing.open(path)
    assert (
        len(listing) == n
        and listing.relative_path(n - 1) == f"n{(n - 1) % 1000:08d}/n{(n - 1) % 1000:08d}_{n - 1:07d}.JPEG"
    )
