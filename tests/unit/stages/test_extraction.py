"""The stage extract: row order, moments, resumption, process count."""

import contextlib
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from mmfm import config, data
from mmfm.data.moments import Moments
from mmfm.data.tokens import TokenStore, create, finish, open_for_writing
from mmfm.infra import store
from mmfm.infra.distributed import Ranks
from mmfm.stages.extract import extract

N, SHARD = 53, 8
SHAPE = (6, 2, 2)


class Encode:
    """Stands for an encoder: latents and tokens that identify the image. Stops after ``limit`` calls."""

    hidden_size, grid, input_size, family = SHAPE[0], SHAPE[1:], 16, "tiny"

    def __init__(self, limit=10**9):
        self.limit, self.images = limit, 0

    def __call__(self, images):
        self.limit -= 1
        if self.limit < 0:
            raise KeyboardInterrupt
        self.images += len(images)
        latent = torch.nn.functional.adaptive_avg_pool2d(images, 2).repeat(1, 2, 1, 1) * 3 - 1
        return latent, latent.flatten(1)[:, :6]


@pytest.fixture(scope="module")
def listing(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(N):
        (root / f"class{i % 3}").mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), np.uint8)).save(root / f"class{i % 3}" / f"{i}.png")
    classes, paths, labels, sizes = data.scan(root)
    path = root / "listing.safetensors"
    data.write_listing(path, root, "train", classes, paths, labels, sizes)
    return path


def sections(batch, cache):
    return config.StageConfig(
        "extract",
        image=config.Image(16),
        encoder=config.Encoder("dinov2", "none", 16, "float32", norm_affine=False),
        latents=config.Latents("on" if cache else "off", str(cache)),
        extract=config.Extract(shard_size=SHARD, batch_size=batch, workers=0, crop="image"),
    )


class Left(Exception):
    pass


class Process(Ranks):
    """One of several processes that are run one after the other: they do their own shards and leave."""

    def barrier(self):
        if not self.is_main:
            raise Left

    def from_main(self, make):
        return make()


def run(listing, folder, encode, rank=0, world=1, batch=5, cache=""):
    ranks = Process(rank, world, torch.device("cpu"))
    weights = folder.parent / "encoder"
    weights.mkdir(exist_ok=True)
    for name in store.MODEL_FILES:
        (weights / name).touch()
    with contextlib.suppress(Left), mock.patch("mmfm.stages.extract.configured_encoder", lambda *_: encode):
        extract(sections(batch, cache), listing, weights, folder / "t.zarr", folder / "m.safetensors", ranks)


def read(folder):
    tokens = TokenStore.open(folder / "t.zarr")
    return tokens.digest, tokens.read(0, N), store.map_arrays(folder / "m.safetensors")[1]["digest"]


@pytest.fixture(scope="module")
def undisturbed(listing, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(listing, folder, Encode())
    return folder


def test_row_i_is_image_i(listing, undisturbed):
    listed = data.Listing.open(listing)
    tokens = TokenStore.open(undisturbed / "t.zarr")
    assert (len(tokens), tokens.width) == tokens.read(0, N).shape and len(tokens) == N
    assert tokens.listing_digest == listed.digest
    np.testing.assert_array_equal(tokens.labels[:], listed.labels)
    for i in (0, 17, N - 1):
        image = np.asarray(Image.open(listed.path(i)), np.float32).transpose(2, 0, 1)[None] / 255
        np.testing.assert_allclose(tokens.read(i, i + 1), Encode()(torch.from_numpy(image))[1], rtol=1e-6)


def test_moments_are_exact(listing, undisturbed):
    images = next(data.image_batches(listing, 16, [range(N)]))[1]
    latents = Encode()(data.to_float(images, torch.device("cpu")))[0].double()
    moments = Moments.from_arrays(store.map_arrays(undisturbed / "m.safetensors")[0])
    torch.testing.assert_close(torch.as_tensor(moments.mean), latents.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.as_tensor(moments.variance()), latents.var(0, unbiased=False))


@pytest.mark.parametrize("limit", [0, 1, 3, 7])
def test_an_interrupted_run_goes_on(listing, undisturbed, tmp_path, limit):
    with pytest.raises(KeyboardInterrupt):
        run(listing, tmp_path, Encode(limit))
    assert not (tmp_path / "t.zarr").exists() and not (tmp_path / "m.safetensors").exists()
    again = Encode()
    run(listing, tmp_path, again)
    finished = SHARD * (limit // 2)  # two batches a shard
    assert again.images == N - finished
    for got, expected in zip(read(tmp_path), read(undisturbed), strict=True):
        np.testing.assert_array_equal(got, expected)
    run(listing, tmp_path, Encode(0))
    shutil.rmtree(tmp_path / "t.zarr")  # as Snakemake does before it runs a rule again
    run(listing, tmp_path, Encode(0))
    np.testing.assert_array_equal(read(tmp_path)[1], read(undisturbed)[1])


def test_from_the_cache_it_is_the_same(listing, undisturbed, tmp_path):
    """Whatever the batch; the second run encodes nothing, and what is added to the folder alone is encoded."""
    first, second = Encode(), Encode(0)
    run(listing, tmp_path / "one", first, cache=tmp_path / "latents")
    run(listing, tmp_path / "two", second, batch=7, cache=tmp_path / "latents")
    assert first.images == N
    np.testing.assert_array_equal(read(tmp_path / "one")[1], read(undisturbed)[1])
    assert read(tmp_path / "one")[2] == read(undisturbed)[2]
    np.testing.assert_array_equal(read(tmp_path / "two")[1], read(undisturbed)[1])


def test_a_run_that_is_interrupted_while_the_cache_is_filled_goes_on(listing, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr("mmfm.autoencoder.latent_cache._SHARD_IMAGES", 10)
    with pytest.raises(KeyboardInterrupt):
        run(listing, tmp_path, Encode(3), cache=tmp_path / "latents")
    again = Encode()
    run(listing, tmp_path, again, cache=tmp_path / "latents")
    assert again.images == N - 3 * 10
    np.testing.assert_array_equal(read(tmp_path)[1], read(undisturbed)[1])


def test_markers_without_a_store_are_not_trusted(listing, undisturbed, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(listing, tmp_path, Encode(4))
    state = next(tmp_path.glob("state-*"))
    (state / "tokens.zarr").rename(tmp_path / "gone.zarr")
    run(listing, tmp_path, Encode())
    np.testing.assert_array_equal(read(tmp_path)[1], read(undisturbed)[1])


def test_processes_share_the_shards(listing, undisturbed, tmp_path):
    """Rank 1 of 2 encodes its shards and publishes nothing; rank 0 encodes exactly the others and publishes."""
    run(listing, tmp_path, Encode(), rank=1, world=2)
    state = next(tmp_path.glob("state-*"))
    assert {int(p.stem[-5:]) for p in state.glob("shard-*")} == {1, 3, 5}
    assert not (tmp_path / "t.zarr").exists()
    last = Encode()
    run(listing, tmp_path, last)
    assert last.images == N - 3 * SHARD
    np.testing.assert_array_equal(read(tmp_path)[1], read(undisturbed)[1])


def test_a_damaged_shard_is_found_before_publishing(listing, undisturbed, tmp_path):
    run(listing, tmp_path, Encode(), rank=1, world=2)
    state = next(tmp_path.glob("state-*"))
    tokens = zarr.open_group(state / "tokens.zarr", mode="r+")["tokens"]
    tokens[SHARD : 2 * SHARD] = 0
    with pytest.raises(ValueError, match=r"shard 1 .* damaged"):
        run(listing, tmp_path, Encode())
    run(listing, tmp_path, Encode())
    np.testing.assert_array_equal(read(tmp_path)[1], read(undisturbed)[1])


def test_nan_names_the_image(listing, tmp_path):
    class Broken(Encode):
        def __call__(self, images):
            latent, token = super().__call__(images)
            if self.images == 13:
                token[2, 3] = torch.nan
            return latent, token

    with pytest.raises(ValueError, match=r"image 10 .*\.png"):
        run(listing, tmp_path, Broken())


def test_a_truncated_store_is_refused(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "t.zarr", tmp_path / "t.zarr")
    next((tmp_path / "t.zarr" / "tokens" / "c").rglob("3/0")).unlink()
    with pytest.raises(ValueError, match="incomplete"):
        TokenStore.open(tmp_path / "t.zarr")


def test_a_store_whose_last_shard_is_missing_is_refused(tmp_path, monkeypatch):
    """Chunks are counted, and a shard holds several."""
    monkeypatch.setattr("mmfm.data.tokens._CHUNK_ROWS", 4)
    rows = np.ones((14, 6), np.float32)
    for name, written in (("whole", 14), ("part", 8)):
        create(tmp_path / name, 14, 6, 8, np.zeros(14))[:written] = rows[:written]
        finish(tmp_path / name, {"digest": "d"})
    assert len(TokenStore.open(tmp_path / "whole")) == 14
    with pytest.raises(ValueError, match=r"part' is incomplete"):
        TokenStore.open(tmp_path / "part")


def test_tokens_of_zeros_are_stored(tmp_path):
    """zarr leaves out chunks of its fill value, unless told otherwise at every opening."""
    for name, arrays in {"at once": lambda made: made, "later": lambda _: open_for_writing(tmp_path / "later")}.items():
        arrays(create(tmp_path / name, 14, 6, 8, np.zeros(14)))[:] = 0
        finish(tmp_path / name, {"digest": "d"})
        assert not TokenStore.open(tmp_path / name).read(0, 14).any()
