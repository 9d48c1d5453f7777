"""The latent cache: the encoder's bits, what is encoded when, kills, concurrent jobs, damage."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmfm import data
from mmfm.autoencoder import latent_cache, latent_shards
from mmfm.autoencoder.encoders import load_encoder
from mmfm.autoencoder.latent_cache import AUTO_LIMIT, use_cache
from mmfm.infra import disk, nodes, store
from support.latent_fills import ALONE, SHARD, Fake, open_cache
from support.places import ROOT
from support.tiny import CHANNELS, GRID, SIZE, write_images, write_listing

N = 20
SCRIPT = ROOT / "tests" / "support" / "latent_fills.py"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(latent_cache, "_SHARD_IMAGES", SHARD)
    monkeypatch.setattr(latent_cache, "_POLL", 0.01)


@pytest.fixture
def listing(tmp_path) -> Path:
    return write_listing(tmp_path / "listing.safetensors", write_images(tmp_path / "images", N))


def fill(cache, listing, encode, views=1, batch_size=4) -> int:
    return cache.fill(listing, encode, ALONE, stage="extract", views=views, batch_size=batch_size)


def read_all(cache, listing, views=1) -> torch.Tensor:
    images = data.Listing.open(listing)
    reader = cache.reader(images, views)
    return torch.stack(
        [torch.cat([p.flatten(1) for p in reader(torch.arange(len(images)), v)], 1) for v in range(views)]
    )


def contents(cache) -> dict[str, str]:
    return {path.name: store.file_digest(path) for path in cache.path.glob("view*.safetensors")}


@pytest.fixture
def whole(tmp_path, listing):
    """A cache of both views, filled without disturbance."""
    cache = open_cache(tmp_path / "whole")
    assert fill(cache, listing, Fake(), views=2) == 2 * N
    return cache


def command(listing, cache, *how, world=1) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    return [sys.executable, *launch, str(SCRIPT), str(listing), str(cache.path.parent), *how]


def environment() -> dict[str, str]:
    paths = [str(ROOT / "tests"), str(ROOT / "src")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_latents_are_the_encoders_to_the_last_bit(tmp_path, listing, tiny_encoder):
    encoder, cache = load_encoder("dinov2", tiny_encoder, SIZE), open_cache(tmp_path / "cache")
    fill(cache, listing, encoder, views=2)
    images = next(data.image_batches(listing, SIZE, [range(N)]))[1]
    reader = cache.reader(data.Listing.open(listing), 2)
    order = torch.tensor([7, 0, 19, 7, 3])
    flips = torch.tensor([True, False, True, False, True])
    latent, token = reader(order, flips)
    assert latent.dtype == token.dtype == torch.float32
    for row, (image, flip) in enumerate(zip(order.tolist(), flips.tolist(), strict=True)):
        shard, place = divmod(image, SHARD)
        first = shard * SHARD + place // 4 * 4  # batches of 4 that end with the shard
        batch = images[first : min(first + 4, (shard + 1) * SHARD)]
        expected = encoder(data.to_float(batch.flip(-1) if flip else batch, torch.device("cpu")))
        assert torch.equal(latent[row], expected.latent[image - first])
        assert torch.equal(token[row], expected.global_token[image - first])


def test_mirror_images_are_encoded(listing, whole, tiny_encoder, tmp_path):
    cache = open_cache(tmp_path / "cache")
    fill(cache, listing, load_encoder("dinov2", tiny_encoder, SIZE), views=2)
    reader = cache.reader(data.Listing.open(listing), 2)
    (plain, _), (mirrored, _) = reader(torch.arange(N), 0), reader(torch.arange(N), 1)
    assert not torch.isclose(plain.flip(-1), mirrored, atol=1e-3).flatten(1).all(1).any()


def test_the_second_view_is_encoded_alone(tmp_path, listing, whole):
    cache, fake = open_cache(tmp_path / "cache"), Fake()
    assert fill(cache, listing, fake) == fake.seen == N
    assert cache.missing(data.Listing.open(listing), 2).tolist() == [[False] * N, [True] * N]
    assert fill(cache, listing, fake, views=2) == N and fake.seen == 2 * N
    assert fill(cache, listing, fake, views=2) == 0 and fake.seen == 2 * N
    assert contents(cache) == contents(whole)


def test_added_images_encode_the_added_ones_only(tmp_path, listing, whole):
    write_images(tmp_path / "more", N + 7, seed=1)
    for number in (1, 8, 9, 20, 21, 22, 23, 24, 25, 26):  # the first three replace images, the others are new
        path = f"class{number % 2}/{number:04d}.png"
        shutil.copy(tmp_path / "more" / path, tmp_path / "images" / path)
    more = write_listing(tmp_path / "more.safetensors", tmp_path / "images")
    images, old = data.Listing.open(more), data.Listing.open(listing)
    known = {(old.relative_path(i), int(old.sizes[i])) for i in range(N)}
    new = [(images.relative_path(i), int(images.sizes[i])) not in known for i in range(len(images))]
    assert sum(new) == 10  # the files that were replaced have other sizes
    fake, before = Fake(), contents(whole)
    assert whole.missing(images).tolist() == [new]
    assert fill(whole, more, fake, views=2) == fake.seen == 20
    after = contents(whole)
    assert before.items() <= after.items()
    assert len(after) - len(before) == 2 * 3  # the last range as a whole, and the other 7, however scattered, by 6
    fresh = open_cache(tmp_path / "fresh")
    fill(fresh, more, Fake(), views=2)
    assert torch.equal(read_all(whole, more, 2), read_all(fresh, more, 2))


def test_a_fill_that_fails_is_resumed_with_the_same_shards(tmp_path, listing, whole, capsys):
    cache = open_cache(tmp_path / "cache")
    with pytest.raises(RuntimeError, match="stopped"):
        fill(cache, listing, Fake(fail_after=30), views=2)
    done = contents(cache)
    assert done and done.items() < contents(whole).items()
    fake = Fake()
    assert fill(cache, listing, fake, views=2) == fake.seen == 2 * (N - SHARD * len(done) // 2)
    assert "resuming at" in capsys.readouterr().err
    assert contents(cache) == contents(whole)


def test_a_killed_fill_is_resumed_with_the_same_shards(tmp_path, listing, whole):
    cache = open_cache(tmp_path / "cache")
    killed = subprocess.run(command(listing, cache, "30"), env=environment(), capture_output=True)
    assert killed.returncode == -9
    done = contents(cache)
    assert done.items() < contents(whole).items()
    (cache.path / ".view0-0.partial-999999999.safetensors").touch()
    assert fill(cache, listing, Fake(), views=2) == 2 * N - SHARD * len(done)
    assert contents(cache) == contents(whole)
    names = {path.name for path in cache.path.iterdir()}
    assert names == {*contents(whole), "about.json", "lock"}
    assert store.read_json(cache.path / "about.json") == cache.key.about()


@pytest.mark.parametrize(
    ("name", "world", "saved"), [("SIGINT", 1, 12), ("SIGTERM", 1, 12), ("SIGUSR1", 1, 12), ("SIGTERM", 2, 24)]
)
def test_a_fill_that_is_asked_to_stop_finishes_its_shards(tmp_path, listing, whole, name, world, saved):
    """The signal comes within the first pair of shards of every process."""
    cache = open_cache(tmp_path / "cache")
    line = command(listing, cache, name, world=world)
    stopped = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert "KeyboardInterrupt" in stopped.stderr and stopped.returncode != 0
    assert f"asked to stop: {saved} of 40 images are saved" in stopped.stderr
    assert SHARD * len(contents(cache)) == saved and contents(cache).items() < contents(whole).items()
    assert {path.name for path in cache.path.iterdir()} == {*contents(cache), "about.json", "lock"}
    assert fill(cache, listing, Fake(), views=2) == 2 * N - saved
    assert contents(cache) == contents(whole)


def test_a_request_to_stop_with_the_last_shard_is_not_forgotten(tmp_path, listing, monkeypatch):
    cache, fake = open_cache(tmp_path / "cache"), Fake()

    def encode(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if fake.seen == N - 2:
            signal.raise_signal(signal.SIGTERM)
        return fake(images)

    with pytest.raises(KeyboardInterrupt):
        fill(cache, listing, encode)
    assert fill(cache, listing, fake) == 0 and fake.seen == N
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_two_processes_make_the_same_files(tmp_path, listing, whole):
    cache = open_cache(tmp_path / "cache")
    finished = subprocess.run(command(listing, cache, world=2), env=environment(), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert sorted(re.findall(r"encoded \d+ of \d+", finished.stdout)) == ["encoded 16 of 40", "encoded 24 of 40"]
    assert contents(cache) == contents(whole)


def test_a_folder_that_only_the_main_process_sees_is_refused_before_anything_is_encoded(tmp_path, listing):
    line = command(listing, open_cache(Path("cache")), "apart", world=2)
    refused = subprocess.run(line, env={**environment(), "TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    assert refused.returncode != 0
    # torchrun ends the others with the first that fails, before or after they say the same.
    told = re.findall(r"rank \d: (.*) can't see 'cache/.*'.* latents\.folder", refused.stderr)
    assert set(told) == {f"ValueError: {nodes.name()}"}, refused.stderr
    assert not list(tmp_path.glob("**/view*")) and not list(tmp_path.glob("**/.seen-*"))


def test_of_two_jobs_the_second_waits_and_encodes_nothing(tmp_path, listing, whole):
    cache = open_cache(tmp_path / "cache")
    line, options = command(listing, cache, "slow"), {"env": environment(), "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    jobs = [subprocess.Popen(line, **options, **pipes) for _ in range(2)]
    said = [job.communicate(timeout=600) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    encoded = sorted(int(re.search(r"encoded (\d+)", out)[1]) for out, _ in said)
    assert sum(encoded) == 2 * N
    assert contents(cache) == contents(whole)


def test_a_job_that_waits_says_so_once_and_encodes_the_rest(tmp_path, listing, monkeypatch, capsys):
    monkeypatch.setattr(latent_cache, "_SPELL", 0.05)
    cache, fake = open_cache(tmp_path / "cache"), Fake()
    cache.path.mkdir(parents=True)
    handle, seen = open(cache.path / "lock", "w"), []  # noqa: SIM115 - closed after a while
    handle.write("process 1 on elsewhere")
    handle.flush()
    fcntl.flock(handle, fcntl.LOCK_EX)

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        seen.append(fake.seen)
        if len(seen) == 20:
            handle.close()

    monkeypatch.setattr(latent_cache, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    fill(cache, listing, fake)
    assert seen == [0] * 20 and fake.seen == N
    assert re.findall("waiting for .*", capsys.readouterr().err) == [
        f"waiting for a job that fills '{cache.path}' (process 1 on elsewhere)"
    ]


def test_without_locks_it_goes_on_and_removes_nothing(tmp_path, listing, whole, monkeypatch):
    def flock(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    cache = open_cache(tmp_path / "cache")
    cache.path.mkdir(parents=True)
    (cache.path / ".other.partial-1.safetensors").touch()
    fill(cache, listing, Fake(), views=2)
    assert contents(cache) == contents(whole) and (cache.path / ".other.partial-1.safetensors").exists()


def test_the_same_images_twice_are_harmless(tmp_path, listing, whole):
    shard = next(whole.path.glob("view0-*"))
    shutil.copy(shard, shard.with_name("view0-ffff.safetensors"))
    before = read_all(whole, listing, 2)
    shard.unlink()
    assert torch.equal(read_all(whole, listing, 2), before)


@pytest.mark.parametrize("size", [0, 5, 200, -4])
def test_a_truncated_shard_is_named(listing, whole, size):
    path = next(whole.path.glob("view1-*"))
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    for act in (lambda: whole.reader(data.Listing.open(listing), 2), lambda: fill(whole, listing, Fake(), views=2)):
        with pytest.raises(ValueError, match=rf"{path.name}.* truncated .*delete it and run the same command again"):
            act()
    path.unlink()
    assert fill(whole, listing, Fake(), views=2) in (SHARD, N % SHARD)


def test_a_shard_that_goes_while_the_reader_is_open_is_named(listing, whole):
    reader = whole.reader(data.Listing.open(listing))
    first = whole.path.glob("view0-*")
    for path in first:
        os.truncate(path, 100)
    with pytest.raises(ValueError, match=r"view0-.*\.safetensors.* delete it"):
        reader(torch.arange(N))


def test_a_shard_of_another_cache_is_refused(tmp_path, listing, whole):
    other = open_cache(tmp_path / "other", encoder_digest="other")
    fill(other, listing, Fake())
    foreign = next(other.path.glob("view0-*"))
    shutil.copy(foreign, whole.path)
    with pytest.raises(ValueError, match=foreign.name):
        whole.missing(data.Listing.open(listing))


@pytest.mark.parametrize(
    "change", [{"encoder_digest": "x"}, {"image_size": 64}, {"input_size": 64}, {"device": "cuda"},
               {"latent_shape": (CHANNELS, GRID, 2)}],
)  # fmt: skip
def test_keys_do_not_meet(whole, listing, change):
    other = open_cache(whole.path.parent, **change)
    assert other.path != whole.path and other.missing(data.Listing.open(listing)).all()


def test_a_folder_of_another_cache_is_refused(tmp_path, listing):
    cache = open_cache(tmp_path / "cache")
    store.write_json(cache.path / "about.json", replace(cache.key, device="cuda").about())
    with pytest.raises(ValueError, match=r"about\.json' describes another cache"):
        fill(cache, listing, Fake())


def test_an_incomplete_cache_is_not_read(whole, tmp_path):
    more = write_listing(tmp_path / "more.safetensors", write_images(tmp_path / "more", N + 3))
    with pytest.raises(ValueError, match="3 of 23 latents are missing"):
        whole.reader(data.Listing.open(more))


def test_values_that_are_not_finite_are_not_stored(tmp_path, listing):
    def encode(images):
        latent, token = Fake()(images)
        latent[2, 0, 0, 0] = float("nan")
        return latent, token

    cache = open_cache(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"NaN or Inf for image 2 '.*class0/0004\.png'"):
        fill(cache, listing, encode)
    assert not contents(cache)


def test_disk_is_asked_for(tmp_path, listing, monkeypatch):
    cache = open_cache(tmp_path / "cache")
    monkeypatch.setattr(disk, "free", lambda path: cache.bytes_needed(N) - 1)
    with pytest.raises(
        ValueError, match=r"extract still has about .* set latents\.folder to a larger disk, or latents\.cache to off"
    ):
        fill(cache, listing, Fake())
    assert not contents(cache)


def test_the_size_that_is_asked_for_is_written(whole):
    written = sum(path.stat().st_size for path in whole.path.glob("*.safetensors"))
    assert whole.bytes_needed(N, 2) == 2 * N * 4 * CHANNELS * (GRID * GRID + 1) + 2 * N * 16
    assert written - 1000 * len(contents(whole)) < whole.bytes_needed(N, 2) < written


@pytest.mark.parametrize(
    "choice, total, missing, expected",
    [
        ("off", 1, 1, False),
        ("on", 2 * AUTO_LIMIT, 2 * AUTO_LIMIT, True),
        ("auto", AUTO_LIMIT, 500, True),
        ("auto", AUTO_LIMIT + 1, 0, False),
        ("auto", 600, 501, False),
    ],
)
def test_auto_stays_small(monkeypatch, tmp_path, choice, total, missing, expected):
    monkeypatch.setattr(disk, "free", lambda path: 1000)
    assert use_cache(choice, total, lambda: missing, tmp_path) is expected


def test_nothing_is_written_elsewhere(tmp_path, listing, monkeypatch):
    (tmp_path / "work" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    fill(open_cache(tmp_path / "cache"), listing, Fake())
    assert [path.name for path in Path().rglob("*")] == ["results"]


def test_an_index_of_a_million_images(tmp_path):
    """1.28 million rows: all are found where they were put, others are not, and no row costs a Python object."""
    n, half = 1_280_000, 640_000
    generator = np.random.default_rng(0)
    keys = generator.integers(0, 256, (n, 16), np.uint8)
    keys[: n // 2, 15] = 0  # NumPy's strings must not confuse a trailing zero with the end
    keys = keys.view("S16").ravel()
    key = replace(open_cache(tmp_path).key, latent_shape=(1, 1, 1))
    for start in (0, half):
        values = np.arange(start, start + half, dtype=np.float32)
        latents, tokens = values.reshape(-1, 1, 1, 1), values.reshape(-1, 1)
        latent_shards.write_shard(tmp_path, key, 0, keys[start : start + half], latents, tokens)
    index = latent_shards.Index.read(tmp_path, key, 0)
    assert sum(part.nbytes for part in (index.keys, index.shards, index.rows)) == 24 * n
    order = generator.permutation(n)
    reader = latent_shards.LatentReader(key, [index], keys[order], torch.device("cpu"))
    sample = torch.arange(0, n, 1000)
    assert torch.equal(reader(sample)[0].flatten(), torch.from_numpy(order[::1000]).float())
    shards, rows = index.find(generator.integers(0, 256, (1000, 16), np.uint8).view("S16").ravel())
    assert (shards == -1).all() and (rows == -1).all()


def test_keys_tell_folders_paths_and_sizes_apart(tmp_path):
    def keys(paths, sizes, root=tmp_path):
        file = tmp_path / "listing.safetensors"
        data.write_listing(file, root, "train", ["a"], paths, np.zeros(len(paths)), np.array(sizes))
        return latent_shards.image_keys(data.Listing.open(file)).tolist()

    paths = [f"a/{i}\udcff.png" for i in range(70_000)]  # names that are not UTF-8, more than a block
    found = keys(paths, range(70_000))
    assert len(set(found)) == 70_000 and keys(paths[::-1], range(70_000)[::-1]) == found[::-1]
    assert keys(paths[:2], [5, 1])[0] != found[0] and keys(paths[:2], [5, 1])[1] == found[1]
    (tmp_path / "link").symlink_to(tmp_path)
    assert keys(paths[:2], range(2), tmp_path / "link") == found[:2]
    assert not set(keys(paths[:2], range(2), tmp_path / "other")) & set(found)
    assert keys(["b/c"], [1], tmp_path / "a") == keys(["a/b/c"], [1]), "the full path counts, not where the root ends"
