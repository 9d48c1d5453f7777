"""The command ``memorisation``: copies among generated images are found; files that don't belong together are not."""

import json
import shutil

import numpy as np
import pytest
import zarr
from PIL import Image

from mmfm.cli.__main__ import main
from mmfm.data import Listing, read_image
from mmfm.data.tokens import TokenStore
from mmfm.infra import npz, store
from mmfm.stages.memorisation import PAIRS
from support.mixtures import run_processes
from support.tiny import settings, write_encoder, write_images, write_listing

TRAIN, HELDOUT, COPIES, OTHERS = 40, 30, 20, 20


def pixels(folder, n, seed):
    """Return images (n, S, S, 3) uint8 of a folder that is written for this."""
    listing = Listing.open(write_listing(folder / "listing.safetensors", write_images(folder / "images", n, seed=seed)))
    return listing, np.stack([np.asarray(read_image(listing.path(i))) for i in range(n)])


def write_generated(folder, images):
    folder.mkdir(exist_ok=True)
    np.savez(folder / "images.npz", arr_0=images)
    digest = store.array_digest(npz.map_array(folder / "images.npz"))
    store.write_json(folder / "samples.json", {"images_digest": digest})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tokens of training and held-out images, and generated images of which the first half are training images."""
    return make(tmp_path_factory.mktemp("memorisation"))


def make(root, *overrides):
    write_encoder(root / "encoder")
    training = pixels(root / "train", TRAIN, 0)[1]
    pixels(root / "heldout", HELDOUT, 1)
    for name in ("train", "heldout"):
        line = ["extract", "--settings", settings(("image", "encoder", "latents", "extract"))]
        line += ["--listing", f"{root}/{name}/listing.safetensors", "--encoder-weights", f"{root}/encoder"]
        line += ["--out-tokens", f"{root}/{name}/t.zarr", "--out-moments", f"{root}/{name}/m", *overrides]
        assert main(line) == 0
    write_generated(root, np.concatenate([training[10 : 10 + COPIES], pixels(root / "new", OTHERS, 2)[1]]))
    return root


def command(root, out, **files):
    given = {"images": "images.npz", "samples": "samples.json", "train": "train/t.zarr", "heldout": "heldout/t.zarr",
             "listing": "train/listing.safetensors", "encoder-weights": "encoder"} | files  # fmt: skip
    line = [part for name, path in given.items() for part in (f"--{name}", str(root / path))]
    return ["memorisation", *line, "--out-png", f"{out}.png", "--out-json", f"{out}.json", "--batch-size", "7"]


def test_generated_images_are_cropped_as_extract_has_cropped_the_files(tmp_path):
    """Copies are found at distance 0; the encoder's own resizing of 32 pixels to 24 would move them away."""
    root = make(tmp_path, "extract.crop=encoder", "encoder.input_size=24")
    assert main(command(root, tmp_path / "m")) == 0
    assert all(pair["distance"] < 1e-3 for pair in store.read_json(tmp_path / "m.json")["closest_pairs"])


def test_copies_are_found_drawn_and_named(made, tmp_path, capsys):
    assert main(command(made, tmp_path / "m")) == 0
    found = store.read_json(tmp_path / "m.json")
    assert (found["n_generated"], found["n_heldout"], found["n_train"]) == (COPIES + OTHERS, HELDOUT, TRAIN)
    listing, pairs = Listing.open(made / "train" / "listing.safetensors"), found["closest_pairs"]
    assert len(pairs) == PAIRS
    assert all(pair["train"] == 10 + pair["generated"] and pair["generated"] < COPIES for pair in pairs)
    assert all(pair["distance"] < 1e-3 and pair["path"] == listing.relative_path(pair["train"]) for pair in pairs)
    assert found["close"] == 0.5 and found["distances"]["generated"]["0.9"] > 0.1, "the other half are no copies"
    real = TokenStore.open(made / "heldout" / "t.zarr").read(0, HELDOUT).astype(np.float64)
    tokens = TokenStore.open(made / "train" / "t.zarr").read(0, TRAIN)
    nearest = np.linalg.norm(real[:, None] - tokens, axis=2).min(1)
    assert found["distances"]["heldout"]["0.5"] == pytest.approx(np.median(nearest))
    warning = found["warnings"][-1]
    assert "20 of 40 generated images (50.0%) are closer to a training image than 99%" in warning
    said = capsys.readouterr()
    assert f"WARNING: {warning}" in said.out and "image 0 is " in said.out
    assert "memorisation: 2,800 pairs done" in said.err, "progress counts (40 + 30) * 40 pairs"
    assert np.asarray(Image.open(tmp_path / "m.png").convert("RGB")).std() > 20


def test_two_processes_find_the_same(made, tmp_path):
    assert main(command(made, tmp_path / "one")) == 0
    program = "import sys; from mmfm.cli.__main__ import main; sys.exit(main(sys.argv[1:]))"
    run_processes(program, command(made, tmp_path / "two"), tmp_path)
    one, two = (store.read_json(tmp_path / f"{name}.json") for name in ("one", "two"))
    # A process sees other batches, so that the distance of a copy, which is nearly 0, differs by rounding.
    assert one["distances"]["generated"]["0.5"] == pytest.approx(two["distances"]["generated"]["0.5"], rel=1e-5)
    assert one["closer"] == two["closer"] and one["warnings"] == two["warnings"]


def test_files_that_do_not_belong_together(made, tmp_path, capsys):
    def refused(*words, **files):
        assert main(command(made, tmp_path / "m", **files)) == 2
        (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("memorisation: error:"))
        assert all(word in error for word in words), error
        assert error.endswith("(see docs/metrics.md#memorisation)") and not (tmp_path / "m.json").exists()

    (tmp_path / "other.json").write_text(json.dumps({"images_digest": "0" * 64}))
    refused("does not describe the images", "run sample again", samples=tmp_path / "other.json")
    refused("was made from another listing", listing="heldout/listing.safetensors")
    refused("was made from another encoder", **{"encoder-weights": write_encoder(tmp_path / "encoder", seed=3)})
    refused("no token store at", "run extract", heldout="absent.zarr")
    for name, value, words in (("settings", {"a": 1}, "with another settings"), ("settings", None, "do not say how")):
        stores = {part: shutil.copytree(made / part / "t.zarr", tmp_path / f"{part}{value}.zarr")
                  for part in ("train", "heldout")}  # fmt: skip
        for part in ("heldout",) if value else stores:
            zarr.open_group(stores[part], mode="r+").attrs[name] = value
        refused(words, **stores)
    write_generated(tmp_path / "single", npz.map_array(made / "images.npz")[:1])
    single = {"images": tmp_path / "single" / "images.npz", "samples": tmp_path / "single" / "samples.json"}
    refused("generated images are (1, 32), but at least 2", **single)
