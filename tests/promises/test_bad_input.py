"""Mistakes of users: each ends with one line that names the thing and the remedy, and loses nothing."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from mmfm import config, data
from mmfm.autoencoder.decoder import Decoder, DecoderConfig, save_decoder
from mmfm.cli.__main__ import main
from mmfm.data import tokens
from mmfm.infra import store
from mmfm.models.dit import DiT, DiTConfig
from mmfm.models.weights import save_ema
from support.checkout import link_workflow
from support.places import DETECTOR
from support.tiny import GRID, SECTIONS, SIZE, Pipeline, write_encoder, write_images, write_listing

MORE = {
    "data": {"root": "unused", "holdout": 0, "seed": 0, "unreadable": "error", "workers": 0},
    "sample": {**SECTIONS["sample"], "n_images": 4, "time_points": 3, "shard_size": 4},
    "fid": {"detector": "fashion", "weights": "unused", "reference": "train", "batch_size": 8, "workers": 0},
}  # fmt: skip


class Files:
    """Good inputs of every stage in a folder of their own, to be spoilt one by one."""

    def __init__(self, pipeline: Pipeline, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.encoder, self.images = folder / "encoder", folder / "images"
        shutil.copytree(pipeline.encoder, self.encoder)
        self.images = pipeline.root.parent / "unused"
        for name in ("listing.train.safetensors", "stats.pt", "stats.json", "gmm.safetensors", "decoder.safetensors"):
            shutil.copy(pipeline.root / name, folder / name)
        shutil.copytree(pipeline.spatial_gmm, folder / "spatial_gmm.zarr")
        listing = data.Listing.open(self["listing.train.safetensors"])
        labels = (np.arange(len(listing)) % 4).astype(np.int32)
        gmm = store.map_arrays(self["gmm.safetensors"])[1]
        about = {"gmm_digest": gmm["digest"], "listing_digest": listing.digest}
        arrays = {"labels": labels, "counts": np.bincount(labels)}
        store.write_arrays(self["assignment.safetensors"], arrays, about)
        shutil.copy(self["assignment.safetensors"], self["moments.safetensors"])
        rows = np.random.default_rng(0).normal(size=(len(listing), 32)).astype(np.float32)
        write_tokens(self["tokens.zarr"], rows)
        model = DiT(DiTConfig(GRID, 1, 32, (32, 32), (1, 1), (2, 2), 0, 0.0), generator=torch.Generator())
        provenance = {"setting": "gmm", "stats_digest": store.file_digest(self["stats.pt"]), "seed": 0}
        save_ema(self["ema.safetensors"], model, provenance)

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def command(self, stage: str, *overrides: str, **options: Path) -> list[str]:
        """Return the command of a stage; ``options`` replace files by their option's name."""
        out, encoder = self.out, {"encoder_weights": self.encoder}
        listing, stats, gmm = self["listing.train.safetensors"], self["stats.pt"], self["gmm.safetensors"]
        spatial, decoder = self["spatial_gmm.zarr"], self["decoder.safetensors"]
        files = {
            "list_images": {"root": self.images, "train": out / "t.safetensors", "heldout": out / "h.safetensors"},
            "extract": {"listing": listing, **encoder, "out_tokens": out / "t.zarr", "out_moments": out / "m"},
            "fit_gmm": {"tokens": self["tokens.zarr"], "out_dir": out},
            "spatial_gmm": {"listing": listing, **encoder, "stats": stats, "gmm": gmm,
                            "assignment": self["assignment.safetensors"], "out": out / "s.zarr"},
            "train_decoder": {"listing": listing, **encoder, "out_dir": out},
            "train": {"setting": "mode", "listing": listing, **encoder, "stats": stats, "gmm": gmm,
                      "spatial_gmm": spatial, "decoder": decoder, "out_dir": out},
            "sample": {"ema": self["ema.safetensors"], "stats": stats, "decoder": decoder, **encoder,
                       "spatial_gmm": spatial, "out_dir": out},
            "latent_stats": {"moments": self["moments.safetensors"], "out": out / "s.pt", "out_json": out / "s.json"},
            "fid_reference": {"train_listing": listing, "detector_weights": DETECTOR, "out": out / "r.safetensors"},
        }[stage] | options  # fmt: skip
        sections = {name: {**SECTIONS, **MORE}[name] for name in config.STAGES[stage].sections}
        if "latents" in sections:  # another test's latents would hide what is wrong with an image
            sections["latents"] = {"cache": "auto", "folder": str(out.with_name("latents"))}
        line = [stage, "--settings", json.dumps(sections), *overrides]
        return line + [str(word) for name, value in files.items() for word in (f"--{name.replace('_', '-')}", value)]


def write_tokens(path: Path, rows: np.ndarray) -> None:
    shutil.rmtree(path, ignore_errors=True)
    array = tokens.create(path, len(rows), rows.shape[1], 8, np.zeros(len(rows), np.int32))
    for start in range(0, len(rows), 8):
        array[start : start + 8] = rows[start : start + 8]
    tokens.finish(path, {"digest": store.array_digest(rows), "listing_digest": "l"})


@pytest.fixture
def files(tiny_pipeline: Pipeline, tmp_path: Path) -> Files:
    return Files(tiny_pipeline, tmp_path)


@pytest.fixture
def refused(capfd):
    """Run a command that must fail with one line holding the given words."""

    def check(line: list[str], *words: str) -> None:
        capfd.readouterr()
        assert main(line) == 2
        said = capfd.readouterr().err.splitlines()
        errors = [text for text in said if text.startswith(f"{line[0]}: error: ")]
        # Progress and notices of the stage may stand before it, but nothing that explains the mistake a second time.
        assert len(errors) == 1 and said[-1] == errors[0], said
        assert not [text for text in said if "Traceback" in text or "  File " in text], said
        missing = [word for word in words if word not in errors[0]]
        assert not missing, f"{missing} not in: {errors[0]}"

    return check


# --- configuration ---


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("gmm.n_componets=3", ["gmm.n_componets", "did you mean 'n_components'"]),
        ("gmn.n_components=3", ["gmn", "did you mean 'gmm'"]),
        ("gmm.n_components=many", ["'gmm.n_components'", "whole number", "'many'"]),
        ("gmm.tol=small", ["'gmm.tol' must be a number", "'small'"]),
        ("gmm.n_components=0", ["'gmm.n_components' is 0", "at least 1"]),
        ("gmm.precision=float16", ["'gmm.precision'", "float32, float64"]),
        ("gmm.n_components=[", ["gmm.n_components=["]),
    ],
)
def test_configuration(files, refused, override, words):
    refused(files.command("fit_gmm", override), *words)


@pytest.mark.parametrize(
    ("text", "words"), [("gmm: [", ["bad.yaml"]), ("gmm: {n_components: {}", ["bad.yaml"]), ("[1]", ["bad.yaml"])]
)
def test_configuration_file(files, refused, text, words, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    line = ["fit_gmm", "--config", str(tmp_path / "bad.yaml"), "--tokens", "x", "--out-dir", "y"]
    refused(line, *words)


def test_settings_that_are_no_json(refused):
    refused(["fit_gmm", "--settings", "{", "--tokens", "x", "--out-dir", "y"], "--settings", "JSON")


# --- images ---


def test_image_folder(files, refused, tmp_path):
    absent = tmp_path / "absent"
    refused(files.command("list_images", root=absent), "data.root", str(absent), "is not a folder")
    (tmp_path / "empty" / "cats").mkdir(parents=True)
    refused(files.command("list_images", root=tmp_path / "empty"), "no images in", "cats", "add some or remove it")
    (tmp_path / "nothing").mkdir()
    refused(files.command("list_images", root=tmp_path / "nothing"), "no images in", "nothing")
    images = write_images(tmp_path / "few", 6)
    refused(files.command("list_images", "data.holdout=6", root=images), "data.holdout is 6", "only 6 images")
    limited = files.command("list_images", "data.holdout=1", "data.limit.images=0.1", root=images)
    refused(limited, "data.holdout 1 takes all", "leaves of class", "lower data.holdout or raise data.limit.images")


def test_folder_of_held_out_images(files, refused, tmp_path):
    images = write_images(tmp_path / "images", 6)

    def given(folder: Path, *overrides: str) -> list[str]:
        return files.command("list_images", f"data.heldout_root={folder}", *overrides, root=images)

    other = write_images(tmp_path / "other", 4, seed=1)
    both = given(other, "data.holdout=2")
    refused(both, "'data.holdout' is 2 and 'data.heldout_root' is ", str(other), "set 'data.holdout' to 0")
    absent = tmp_path / "absent"
    refused(given(absent), f"data.heldout_root '{absent}' is not a folder")
    (tmp_path / "nothing").mkdir()
    refused(given(tmp_path / "nothing"), "no images in", "nothing")
    (tmp_path / "link").symlink_to(images)
    for folder, relation in ((images, "is"), (tmp_path / "link", "is"), (images / "class0", "lies in"),
                             (tmp_path, "contains")):  # fmt: skip
        refused(given(folder), f"data.heldout_root '{folder}' {relation} data.root '{images}'", "use data.holdout")
    refused(given(other / "class0"), "class0' has no class folders, but", "(class0, ...)", "the layout of data.root")
    (other / "class1").rename(other / "classX")
    refused(given(other), "class folder 'classX' (1 such), which data.root", "lacks; rename or remove it")
    assert not list(files.out.glob("*")), "refused before a listing is written"


def spoil(path: Path, how: str) -> None:
    if how == "truncated":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif how == "float":
        Image.fromarray(np.zeros((32, 32), np.float32)).save(path, format="TIFF")
    else:
        path.write_bytes({"empty": b"", "text": b"no image at all"}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "float"])
def test_unreadable_image(files, refused, tmp_path, how, capfd):
    """An error that names it; or, by choice, left out with a count, and the rows are those of the others."""
    images = write_images(tmp_path / "images", 20)
    spoilt = images / "class1" / "0007.png"
    spoil(spoilt, how)
    listing = write_listing(tmp_path / "listing.safetensors", images)
    for stage, option in (("extract", "listing"), ("fid_reference", "train_listing"), ("train_decoder", "listing")):
        refused(files.command(stage, **{option: listing}), str(spoilt), "replace or remove it")
    assert main(files.command("list_images", "data.unreadable=skip", root=images)) == 0
    said = capfd.readouterr()
    assert "1 unreadable image left out" in said.out and str(spoilt) in said.err
    found = data.Listing.open(files.out / "t.safetensors")
    paths = [found.relative_path(i) for i in range(len(found))]
    whole = sorted(str(path.relative_to(images)) for path in images.rglob("*.png") if path != spoilt)
    assert paths == whole and found.labels.tolist() == [int(path[5]) for path in whole]
    assert store.map_arrays(files.out / "t.safetensors")[1]["skipped"] == 1
    assert main(files.command("extract", listing=files.out / "t.safetensors")) == 0


def test_skipping_shared_by_processes_is_the_same(tmp_path):
    images = write_images(tmp_path / "images", 12)
    spoil(images / "class0" / "0004.png", "truncated")
    paths = data.scan(images)[1]
    assert data.find_readable(images, paths, 2).tolist() == data.find_readable(images, paths).tolist()


def test_class_without_readable_images(files, refused, tmp_path):
    images = write_images(tmp_path / "images", 4)
    for path in (images / "class1").iterdir():
        spoil(path, "text")
    refused(files.command("list_images", "data.unreadable=skip", root=images), "class1", "repair or remove")


def test_an_image_replaced_or_removed_since_the_listing(files, refused, tmp_path):
    images = write_images(tmp_path / "images", 20)
    listing = write_listing(tmp_path / "listing.safetensors", images)
    Image.new("RGB", (300, 200)).save(images / "class0" / "0002.png")
    refused(files.command("extract", listing=listing), "0002.png", "when it was listed", "list the images again")
    (images / "class0" / "0002.png").unlink()
    refused(files.command("extract", listing=listing), "0002.png", "list the images again")


def test_a_changed_folder_has_another_digest_and_extraction_starts_anew(files, tmp_path):
    images = write_images(tmp_path / "images", 20)
    digests = []
    for n in (20, 21):
        write_images(images, n)
        assert main(files.command("list_images", root=images)) == 0
        assert main(files.command("extract", listing=files.out / "t.safetensors")) == 0
        listing, found = data.Listing.open(files.out / "t.safetensors"), tokens.TokenStore.open(files.out / "t.zarr")
        assert len(listing) == len(found) == n and found.listing_digest == listing.digest
        digests.append(listing.digest)
    assert digests[0] != digests[1]


GREY = np.linspace(0, 255, 24, dtype=np.uint8).reshape(4, 6)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)


def test_images_of_other_kinds_are_converted(tmp_path):
    """By their pixel values; 8-bit ones exactly."""
    grey = np.repeat(GREY[..., None], 3, axis=-1)

    def read(image: Image.Image, name: str = "x.png", **options) -> np.ndarray:
        image.save(tmp_path / name, **options)
        return np.asarray(data.read_image(tmp_path / name))

    np.testing.assert_array_equal(read(Image.fromarray(COLOUR)), COLOUR)
    np.testing.assert_array_equal(read(Image.fromarray(GREY)), grey)
    np.testing.assert_array_equal(read(Image.fromarray(GREY).convert("P")), grey)
    # 16 bits: the range is that of the format, also where all values are small.
    np.testing.assert_array_equal(read(Image.fromarray(GREY.astype(np.uint16) * 257)), grey)
    np.testing.assert_array_equal(read(Image.fromarray(GREY.astype(np.uint16) * 257), "x.tif"), grey)
    np.testing.assert_array_equal(read(Image.fromarray(GREY.astype(np.uint16))), np.round(grey / 257))
    # Transparency lies over white.
    alpha = np.full((4, 6), 255, np.uint8)
    alpha[:, :3] = 0
    over_white = np.where(alpha[..., None] == 255, COLOUR, 255)
    np.testing.assert_array_equal(read(Image.fromarray(np.dstack([COLOUR, alpha]))), over_white)
    half = Image.fromarray(np.dstack([COLOUR, np.full((4, 6), 128, np.uint8)]))
    assert np.abs(read(half) - (COLOUR * (128 / 255) + 255 * (127 / 255))).max() <= 1
    # Four inks without a profile: white minus the inks.
    inks = np.dstack([255 - COLOUR, np.zeros((4, 6), np.uint8)])
    np.testing.assert_array_equal(read(Image.fromarray(inks, mode="CMYK"), "x.tif"), COLOUR)
    # A JPEG taken on its side: stored so, with the turn in its tags.
    side = np.repeat(np.repeat(COLOUR, 16, axis=0), 16, axis=1)
    tags = Image.Exif()
    tags[0x0112] = 6
    turned = read(Image.fromarray(side), "x.jpg", exif=tags, quality=100, subsampling=0)
    assert turned.shape == (96, 64, 3)
    assert np.abs(turned.astype(int) - np.rot90(side, -1)).mean() < 3


def test_an_image_smaller_than_the_crop_is_enlarged(tmp_path):
    small = data.center_crop(Image.fromarray(COLOUR), 32)
    assert small.size == (32, 32)
    whole = Image.fromarray(COLOUR).resize((48, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(small), np.asarray(whole)[:, 8:40])


def test_flat_folder_is_one_class(files, tmp_path):
    images = write_images(tmp_path / "flat", 6, classes=1) / "class0"
    assert main(files.command("list_images", root=images)) == 0
    found = data.Listing.open(files.out / "t.safetensors")
    assert found.classes == ("class0",) and found.labels.tolist() == [0] * 6


# --- inputs of stages ---


def truncate(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_fewer_images_than_components(files, refused):
    refused(
        files.command("fit_gmm", "gmm.n_components=41"),
        "gmm.n_components, or .k in",
        "is 41",
        "only 40 images",
        "or less",
    )


@pytest.mark.parametrize("stage", ["extract", "spatial_gmm", "train_decoder", "train", "sample"])
def test_missing_encoder(files, refused, stage, tmp_path):
    refused(files.command(stage, encoder_weights=tmp_path / "absent"), "absent", "folder")
    (files.encoder / "preprocessor_config.json").unlink()
    refused(files.command(stage), "preprocessor_config.json", "is missing")


@pytest.mark.parametrize(
    ("stage", "option", "name"),
    [
        ("extract", "listing", "listing.train.safetensors"),
        ("fit_gmm", "tokens", "tokens.zarr"),
        ("latent_stats", "moments", "moments.safetensors"),
        ("spatial_gmm", "assignment", "assignment.safetensors"),
        ("spatial_gmm", "gmm", "gmm.safetensors"),
        ("train", "stats", "stats.pt"),
        ("train", "spatial_gmm", "spatial_gmm.zarr"),
        ("sample", "ema", "ema.safetensors"),
        ("sample", "decoder", "decoder.safetensors"),
        ("fid_reference", "detector_weights", "detector.safetensors"),
    ],
)
@pytest.mark.parametrize("how", ["missing", "truncated", "foreign", "empty"])
def test_damaged_input(files, refused, stage, option, name, how):
    path = files[name]
    if name == "detector.safetensors":
        shutil.copy(DETECTOR, path)
    if how == "missing":
        path = files["absent"] / name
    elif path.is_dir():
        if how == "truncated":
            truncate(largest(path))
        elif how == "foreign":
            shutil.rmtree(path)
            zarr.open_group(path, mode="w").create_array("other", data=np.zeros(3))
        else:
            shutil.rmtree(path)
            path.mkdir()
    elif how == "truncated":
        truncate(path)
    elif how == "foreign":
        store.write_arrays(path, {"other": np.zeros(3)}, {})
    else:
        path.write_bytes(b"")
    refused(files.command(stage, **{option: path}), name)


def test_damaged_encoder(files, refused):
    truncate(files.encoder / "model.safetensors")
    refused(files.command("extract"), str(files.encoder), "cannot be read")


def test_truncated_checkpoint_is_passed_over(files, caplog):
    """The newest is damaged: training goes on from the one before, and loses nothing but its steps."""
    line = files.command("train", "train.epochs=1")
    assert main(line) == 0
    first = store.map_arrays(files.out / "ema.safetensors")[1]["digest"]
    (state,) = files.out.glob("state-*")
    truncate(max(state.glob("step-*")) / "model.safetensors")
    (files.out / "ema.safetensors").unlink()
    shutil.rmtree(state / "finished")
    assert main(line) == 0
    assert "skipping checkpoint" in caplog.text and "model.safetensors" in caplog.text
    assert store.map_arrays(files.out / "ema.safetensors")[1]["digest"] == first


# --- inputs that do not belong together ---


def other_listing(files: Files) -> Path:
    images = write_images(files["others"], 40, seed=5)
    return write_listing(files["other_listing.safetensors"], images)


def other_encoder(files: Files) -> Path:
    return write_encoder(files["other_encoder"], seed=1)


def other_mixture(files: Files) -> Path:
    arrays, about = store.map_arrays(files["gmm.safetensors"])
    path = files["other_gmm.safetensors"]
    store.write_arrays(path, {name: np.array(array) * (2 if name == "means" else 1) for name, array in arrays.items()},
                       about)  # fmt: skip
    return path


def other_decoder(files: Files) -> Path:
    sizes = DecoderConfig(48, 32, 64, 2, 1, SIZE // GRID, GRID * GRID)
    save_decoder(Decoder(sizes, generator=torch.Generator()), files["other_decoder.safetensors"])
    return files["other_decoder.safetensors"]


def other_stats(files: Files) -> Path:
    content = torch.load(files["stats.pt"], weights_only=True)
    torch.save({name: value + 1 for name, value in content.items()}, files["other.pt"])
    return files["other.pt"]


@pytest.mark.parametrize(
    ("stage", "option", "make", "words"),
    [
        ("spatial_gmm", "listing", other_listing, ["another listing", "run extract and latent_stats"]),
        ("train", "listing", other_listing, ["another listing", "run extract and latent_stats"]),
        ("spatial_gmm", "encoder_weights", other_encoder, ["encoder", "run extract"]),
        ("train", "encoder_weights", other_encoder, ["another encoder", "run extract and latent_stats"]),
        ("spatial_gmm", "gmm", other_mixture, ["assignment.safetensors", "another mixture", "run fit_gmm"]),
        ("train", "gmm", other_mixture, ["spatial_gmm.zarr", "another mixture", "run spatial_gmm"]),
        ("sample", "stats", other_stats, ["trained with another set of latent statistics", "run train"]),
        ("sample", "decoder", other_decoder, ["other_decoder", "48 channels", "32"]),
    ],
)
def test_inputs_that_do_not_belong_together(files, refused, stage, option, make, words):
    refused(files.command(stage, **{option: make(files)}), *words)
    assert not files.out.exists() or not list(files.out.glob("*.*"))


def test_weights_of_another_setting(files, refused):
    model = DiT(DiTConfig(GRID, 1, 32, (32, 32), (1, 1), (2, 2), 9, 0.0), generator=torch.Generator())
    save_ema(files["ema.safetensors"], model, {"setting": "mode", "seed": 0})
    refused(files.command("sample"), "9 modes", "has 4", "mixture they were trained with")


def test_a_checkpoint_of_other_settings_is_never_taken_up(files):
    assert main(files.command("train", "train.epochs=1")) == 0
    assert main(files.command("train", "train.epochs=1", "train.lr=0.01")) == 0
    assert len(list(files.out.glob("state-*"))) == 2


# --- numbers ---


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tokens_that_are_not_finite(files, refused, value):
    rows = np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32)
    rows[17, 3] = value
    write_tokens(files["tokens.zarr"], rows)
    refused(files.command("fit_gmm"), "17", "run extract again")


def test_a_loss_that_is_not_finite(files, refused):
    """A learning rate far too high: the line names the step, and no checkpoint holds what is broken."""
    line = files.command("train", "train.lr=1.0e+30", "train.clip_norm=0.0", "train.checkpoint_every=1")
    refused(line, "the weights are NaN, Inf or too large", "The last checkpoint is intact", "lower the learning rate")
    from safetensors.torch import load_file

    for path in files.out.glob("state-*/step-*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


# --- the machine ---


def test_results_that_cannot_be_written(files, refused, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    if os.getuid():
        folder.chmod(0o500)
    elif subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    files.out = folder / "out"
    try:
        for stage in ("list_images", "extract", "fit_gmm", "train", "sample"):
            line = files.command(stage, **({"root": write_images(tmp_path / "i", 4)} if stage == "list_images" else {}))
            refused(line, str(folder), "can't be written", "make it writable")
    finally:
        if not os.getuid():
            subprocess.run(["umount", "-l", str(folder)], check=True)


# --- through Snakemake ---


@pytest.fixture
def snakemake(tmp_path):
    """Call the workflow in a folder of its own with an overlay; return what it says."""
    link_workflow(tmp_path)

    def call(overlay: str, *arguments: str, **variables: str) -> list[str]:
        (tmp_path / "overlay.yaml").write_text(overlay)
        line = [sys.executable, "-m", "snakemake", *arguments, "--cores", "1", "--configfile", "overlay.yaml"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode != 0
        return (done.stdout + done.stderr).splitlines()

    return call


@pytest.mark.parametrize(
    ("overlay", "words"),
    [
        ("encoders: {dinov2: {weights: absent/encoder}}", ["encoders.dinov2.weights", "absent/encoder", "`hf:`"]),
        ("fid: {weights: absent.pth}", ["'fid.weights'", "absent.pth", "fid_reference --help"]),
        ("gmm: {tol: 1e-3}", ["'gmm.tol' must be a number", "write 1.0e-3"]),
        ("gpus: 1", ["'gpus' is 1, but only 0 are available", "set it to auto"]),
        ("data: {root: photos}", ["'encoders', 'image.size', ", "'train.epochs' are not set", "`mmfm init FOLDER`"]),
        ("encoders: {dinov2: {input_size: 33}}", ["'encoders.dinov2.input_size' is 33", "take 32 or 40"]),
        ("encoders: {dinov2: {family: mae}}", ["holds a 'dinov2_with_registers' model", "to dinov2"]),
        ("encoders: {dinov2: {input_size: 64}}", ["'decoder.weights' is ", "64 tokens of 96 channels", "`train`"]),
        ("image: {size: 64}", ["'fid.detector' fashion takes images of 32 x 32", "set 'fid.detector' to"]),
        ("train: {model: B}", ["no 'B' in 'models'", "tiny"]),
        ("fid: {detector: inception, weights: ''}", ["'fid.weights' is empty", "download"]),
        ("fid: {encoder: siglip2}", ["no 'siglip2' in 'encoders'", "dinov2"]),
        ("data: {heldout_root: others}", ["'data.holdout' is 2000 and 'data.heldout_root' is 'others'", "to 0"]),
        ("data: {holdout: 0, heldout_root: nowhere}", ["'data.heldout_root' is 'nowhere', which is not a folder"]),
    ],
)
def test_workflow(snakemake, overlay, words):
    said = snakemake(overlay, "results/fid/dinov2_mode.txt", "-n")
    (error,) = (line for line in said if all(word in line for word in words))
    assert error.startswith("Error: "), said
    assert not any("raceback" in line or "  File " in line or "WorkflowError" in line for line in said), said


@pytest.mark.parametrize("target", ["memorisation/dinov2_mode.png", "gmm/dinov2/k64/heldout.json"])
def test_what_needs_held_out_images_names_both_keys(snakemake, target):
    said = snakemake("data: {holdout: 0}", f"results/{target}", "-n")
    (error,) = (line for line in said if line.startswith("Error: "))
    assert "there are no held-out images" in error and "'data.holdout'" in error and "'data.heldout_root'" in error


def test_a_stages_mistake_is_one_line_through_snakemake(snakemake):
    said = snakemake("data: {holdout: 20000}", "results/list_images/listing.train.safetensors")
    assert sum("list_images: error: data.holdout is 20000, but " in line for line in said) == 1, said
    assert not any("most recent call last" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("network", [True, False])
def test_an_encoder_that_cannot_be_fetched(snakemake, network, tmp_path):
    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port if network else 9}"
        said = snakemake(
            "encoders: {dinov2: {weights: 'hf:facebook/no-such-model'}}",
            "published/models/facebook/no-such-model/config.json",
            HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "cache"), NO_PROXY="127.0.0.1",
        )  # fmt: skip
        server.shutdown()
    errors = [line for line in said if line.startswith("fetch: error: ")]
    assert len(errors) == 1, said
    assert "'facebook/no-such-model' (revision 'main') " in errors[0]
    assert ("check its name" if network else "an encoder, its `weights`) to a folder that has the files") in errors[0]
