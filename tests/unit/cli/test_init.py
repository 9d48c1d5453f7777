"""`mmfm init`: the file it writes, what it prints, and what it refuses."""

import json
import shutil
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from mmfm import config
from mmfm.cli import init
from mmfm.cli.__main__ import main
from mmfm.workflow import checks, suggestion, this_cpu
from support.encoders import write_timm
from support.places import DEFAULTS, DEMO, ROOT


@pytest.fixture
def photos(tmp_path):
    """A flat folder of 80 small images and a broken one."""
    folder = tmp_path / "My Photos (2)"
    folder.mkdir()
    for i in range(80):
        Image.fromarray(np.full((40, 50, 3), 3 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "moving.gif").write_bytes(b"no image")
    return folder


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """In the checkout, without waiting for a measurement, and without what this machine has or can reach."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(this_cpu, "measured_rate", lambda: 4e11)
    monkeypatch.setattr(init.torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("HF_HUB_CACHE", "/nowhere")

    def unreachable(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(init.urllib.request, "urlopen", unreachable)


def run(*arguments):
    return main(["init", *map(str, arguments)])


def test_what_is_written_and_said(photos, tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    assert run(photos, "--out", out) == 0
    said = capsys.readouterr().out
    for expected in ("81 images in one class", "1 .gif", "broken.jpg", "median 40", "80 RGB; all are read as RGB\n"):
        assert expected in said, expected
    assert "\n  encoder  resources/demo/encoder: a TOY, made for the demo" in said
    loaded = config.load([DEFAULTS, out])
    assert loaded.run == "my-photos-2" and loaded.data.root == str(photos) and loaded.data.unreadable == "skip"
    for name, encoder in loaded.encoders.items():
        checks.encoder(name, encoder)
    checks.images(loaded.data.root)
    checks.detector(loaded)
    last = said.strip().splitlines()[-1].strip()
    assert last == f"snakemake results/my-photos-2/comparison.txt --configfile {out}"
    text = out.read_text()
    assert last in text and "minutes on" in text and "a TOY" in text
    with Image.open(tmp_path / "mine.png") as sheet:
        assert sheet.width > 700


def test_what_becomes_of_transparency_is_said(photos, tmp_path, capsys):
    Image.new("RGBA", (40, 50), (255, 0, 0, 99)).save(photos / "clear.png")
    assert run(photos, "--out", tmp_path / "mine.yaml") == 0
    assert "80 RGB, 1 RGBA; all are read as RGB, transparency over white\n" in capsys.readouterr().out


def test_nothing_is_overwritten_without_force(photos, tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    out.write_text("mine")
    assert run(photos, "--out", out) == 2
    assert "is there already; give --force" in capsys.readouterr().err and out.read_text() == "mine"
    assert run(photos, "--out", out, "--force") == 0
    assert "data:" in out.read_text()


def test_three_images_are_too_few(photos, tmp_path, capsys):
    for path in sorted(photos.glob("*.png"))[3:]:
        path.unlink()
    assert run(photos, "--out", tmp_path / "mine.yaml") == 2
    said = capsys.readouterr()
    assert "has 3 readable images; at least 64 are needed" in said.err
    assert "4 images in one class, " in said.out
    assert said.out.splitlines()[0].endswith(" kB")
    assert f"at least {suggestion.FEWEST_IMAGES} pictures" in (ROOT / "docs" / "your-own-data.md").read_text()
    assert not (tmp_path / "mine.yaml").exists()


def test_what_a_listing_would_refuse_is_said_at_once(photos, tmp_path, capsys):
    (photos / "more").mkdir()
    assert run(photos, "--out", tmp_path / "mine.yaml") == 2
    assert "both class folders and images of its own" in capsys.readouterr().err
    assert run(photos / "absent", "--out", tmp_path / "mine.yaml") == 2
    assert "absent' is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "0"], "an image size of 0 is too small"),
        (["--size", "-5"], "an image size of -5 is too small"),
        (["--size", "30"], "30 is not a multiple of 4; take 28 or 32"),
        (["--encoder", "nope"], "'nope' has no config.json"),
    ],
)
def test_arguments_are_refused_before_the_folder_is_looked_at(
    photos, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.setattr(init.surveys, "survey", lambda _: pytest.fail("looked at"))
    assert run(photos, "--out", tmp_path / "mine.yaml", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_nothing_can_be_written_to_is_named(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(init.surveys, "survey", lambda _: pytest.fail("looked at"))
    monkeypatch.setattr(init.os, "access", lambda folder, mode: str(folder) != str(tmp_path))
    assert run(photos, "--out", tmp_path / "new" / "mine.yaml") == 2
    said = capsys.readouterr().err
    assert said == f"init: error: nothing can be written to '{tmp_path}'; make it writable, or give another --out\n"


def test_all_faults_of_a_folder_are_named_at_once_and_nothing_is_opened(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(init.surveys.Image, "open", lambda _: pytest.fail("opened"))
    for name in ("one", "two"):
        (photos / name).mkdir()
    assert run(photos, "--out", tmp_path / "mine.yaml") == 2
    said = capsys.readouterr()
    assert "images of its own ('0.png', '1.png', '10.png', '11.png', '12.png' and 76 more); move" in said.err
    assert f"no images in '{photos / 'one'}', '{photos / 'two'}' (looked for" in said.err and "remove them" in said.err
    assert "  looked  " not in said.out


def test_a_size_that_does_not_fit_is_doubted_not_refused(photos, tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    assert run(photos, "--out", out, "--size", 4096) == 0
    doubt = "this machine has the time for at most 128 and smaller images (median 40) are enlarged"
    assert f"  WARNING  images of 4096 pixels as asked for, but {doubt}\n" in capsys.readouterr().out
    assert f"# as asked for, but {doubt}\n" in out.read_text()
    assert run(photos, "--out", out, "--size", 32, "--force") == 0
    assert "WARNING" not in capsys.readouterr().out


def test_which_encoder_is_taken(tmp_path, monkeypatch):
    assert init.choose_encoder(None).weights == str(init.TOY)
    for size in ("base", "small"):
        folder = tmp_path / f"models--facebook--dinov2-{size}" / "snapshots" / "abc"
        shutil.copytree(DEMO / "encoder", folder)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    found = init.choose_encoder(None)
    assert "dinov2-small" in found.weights and (found.width, found.patch, found.family) == (96, 8, "dinov2")
    named = init.choose_encoder(str(DEMO / "encoder"))
    assert named.weights == str(DEMO / "encoder") and named.reason == "as asked for"


def test_an_encoder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        init.choose_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 768}))
    with pytest.raises(ValueError, match="'bert' model without patches; give a vision transformer"):
        init.choose_encoder(str(tmp_path))
    with pytest.raises(ValueError, match=r"'hf:some/model' can't be looked up \(no network\)"):
        init.choose_encoder("hf:some/model")


def test_a_model_of_the_hub(monkeypatch):
    about = {"model_type": "siglip", "vision_config": {"hidden_size": 768, "patch_size": 16, "num_hidden_layers": 12}}
    monkeypatch.setattr(init, "hub_config", lambda name: about)
    found = init.choose_encoder("hf:google/siglip2-base-patch16-256")
    assert (found.family, found.weights, found.width) == ("siglip2", "hf:google/siglip2-base-patch16-256", 768)


def test_a_folder_named_like_a_number_gives_a_run_named_in_text(photos, tmp_path):
    folder = photos.rename(tmp_path / "64")
    assert run(folder, "--out", tmp_path / "mine.yaml", "--encoder", DEMO / "encoder") == 0
    assert config.load([DEFAULTS, tmp_path / "mine.yaml"]).run == "64"


def test_elsewhere_than_in_the_checkout(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(photos) == 2
    assert "run it in the folder of the Snakefile" in capsys.readouterr().err


def test_any_vision_transformer_is_taken_with_its_librarys_family(tmp_path):
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
    found = init.choose_encoder(str(write_timm(tmp_path / "timm", "vit_small_patch16_224", **sizes)))
    assert (found.family, found.width, found.depth, found.patch) == ("timm", 32, 2, 8)
    about = {"model_type": "dinov3_vit", "hidden_size": 48, "num_hidden_layers": 3, "patch_size": 16}
    with mock.patch.object(init, "hub_config", return_value=about):
        found = init.choose_encoder("hf:some/model")
    assert (found.family, found.width, found.depth, found.patch) == ("hf", 48, 3, 16)
