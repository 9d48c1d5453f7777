"""Any number of processes makes the same; one that fails takes the others with it and says why.

47 images are a multiple of no batch, shard or number of processes.
"""

from pathlib import Path

import numpy as np
import pytest

from mmfm.infra import store
from support.stage_commands import arrays, digests

WORLDS = (2, 3)


def caches(folder: Path) -> dict[str, dict]:
    """Return the keys of a run without a latent cache, and of one that fills a cache of its own."""
    return {"off": {"cache": "off"}, "own": {"cache": "on", "folder": str(folder)}}


@pytest.mark.parametrize("cache", ["off", "own"])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["extract", "spatial_gmm", "fid_reference", "reconstruction"])
def test_stages_that_deal_whole_units_make_the_same_bits(stages, tmp_path, name, world, cache):
    if name in ("fid_reference", "reconstruction") and cache == "own":
        pytest.skip("it needs no latents")
    stages[name].run(tmp_path / "out", world=world, latents=caches(tmp_path / "latents")[cache])
    assert digests(tmp_path / "out") == digests(stages[name].made)
    assert (tmp_path / "latents").exists() == (cache == "own")


@pytest.mark.parametrize("name", ["train_decoder", "train"])
def test_training_is_the_same_with_and_without_a_cache(stages, tmp_path, name):
    """Processes apart, to the last bit: latents of a shuffled batch are those of the listing's order."""
    for cache, keys in caches(tmp_path / "latents").items():
        stages[name].run(tmp_path / cache, latents=keys)
        assert digests(tmp_path / cache) == digests(stages[name].made)


@pytest.mark.parametrize("world", WORLDS)
def test_the_mixture_is_the_same_to_rounding(stages, tmp_path, world):
    stages["fit_gmm"].run(tmp_path / "out", world=world)
    ours, expected = arrays(tmp_path / "out"), arrays(stages["fit_gmm"].made)
    for name in expected:
        if name.startswith("assignment"):
            np.testing.assert_array_equal(ours[name], expected[name])
        else:
            np.testing.assert_allclose(ours[name], expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["train_decoder", "train"])
def test_training_takes_the_same_steps(stages, tmp_path, name, world):
    """And the processes fill the cache together."""
    stage = stages[name]
    stage.run(tmp_path / "out", world=world, latents=caches(tmp_path / "latents")["own"])
    for column in ("loss", "grad_norm", "lr"):
        assert stage.history(tmp_path / "out", column) == pytest.approx(stage.history(stage.made, column), rel=1e-4)
    ours, expected = arrays(tmp_path / "out"), arrays(stage.made)
    for name in expected:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["train_decoder", "train"])
def test_micro_batches_change_no_loss(stages, tmp_path, name):
    stage, section = stages[name], {"train_decoder": "decoder", "train": "train"}[name]
    for micro_batch in (2, 3):
        out = tmp_path / str(micro_batch)
        stage.run(out, world=2 if micro_batch == 3 else 1, **{section: {"micro_batch": micro_batch}})
        assert stage.history(out, "loss") == pytest.approx(stage.history(stage.made, "loss"), rel=1e-4)


@pytest.mark.parametrize("world", WORLDS)
def test_images_are_the_same_to_a_level(stages, tmp_path, world):
    stages["sample"].run(tmp_path / "out", world=world)
    (ours,), (expected,) = (arrays(out).values() for out in (tmp_path / "out", stages["sample"].made))
    difference = np.abs(ours.astype(int) - expected)
    assert ours.shape == expected.shape and difference.max() <= 1 and (difference > 0).mean() <= 1e-3


@pytest.mark.parametrize("world", WORLDS)
def test_the_distance_is_the_same(stages, tmp_path, world):
    stages["fid"].run(tmp_path / "out", world=world)
    ours, expected = (store.read_json(out / "fid.json") for out in (tmp_path / "out", stages["fid"].made))
    assert ours["frechet_distance"] == pytest.approx(expected["frechet_distance"], rel=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_modes_are_judged_the_same(stages, tmp_path, world):
    """Processes take whole batches, so the bits are the same; the picture, too."""
    stage = stages["mode_quality"]
    stage.run(tmp_path / "out", world=world)
    for name in ("modes.json", "modes.txt", "modes.png"):
        assert (tmp_path / "out" / name).read_bytes() == (stage.made / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("extract", "moments.safetensors"), ("fit_gmm", "assignment.safetensors"), ("spatial_gmm", "report.json"),
        ("train_decoder", "history.jsonl"), ("train", "history.jsonl"), ("sample", "images.npz"),
        ("fid_reference", "reference.safetensors"), ("fid", "fid.json"), ("mode_quality", "modes.json"),
    ],
)  # fmt: skip
def test_what_the_main_process_cannot_write_ends_all(stages, tmp_path, name, output):
    """Otherwise the others would wait for it, on GPUs for hours."""
    (tmp_path / "out" / output).mkdir(parents=True)
    command = stages[name].start(tmp_path / "out", world=2)
    assert command.wait() != 0
    errors = command.errors.read_text()
    assert all(f"rank {rank}: IsADirectoryError" in errors for rank in range(2)), errors


def test_an_image_that_one_process_cannot_read_ends_all(stages, tmp_path):
    listing = stages["extract"].inputs["--listing"]
    image = sorted((listing.parent / "images").rglob("*.png"))[-1]
    content = image.read_bytes()
    image.write_bytes(content[:100])
    try:
        command = stages["extract"].start(tmp_path / "out", world=2, latents=caches(tmp_path / "latents")["own"])
        assert command.wait() != 0
        assert image.name in command.errors.read_text()
    finally:
        image.write_bytes(content)
    stages["extract"].run(tmp_path / "out", world=2, latents=caches(tmp_path / "latents")["own"])
    assert digests(tmp_path / "out") == digests(stages["extract"].made)
