"""What a configuration's files say about themselves, before anything runs."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from mmfm import config
from mmfm.config.choices import ENCODER_FAMILIES
from mmfm.workflow import checks
from support.places import DEFAULTS, DEMO

CONFIGURATION = config.load([DEFAULTS])
DECODER = DEMO / "decoder" / "decoder.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of the demo's encoder."""
    return Path(shutil.copytree(DEMO / "encoder", tmp_path / "encoder"))


def entry(folder: Path, **keys) -> config.Encoder:
    return dataclasses.replace(CONFIGURATION.encoders["dinov2"], **{"weights": str(folder), **keys})


def test_the_demo_passes(folder):
    checks.encoder("dinov2", entry(folder))
    checks.decoder("dinov2", CONFIGURATION, DECODER)
    checks.detector(CONFIGURATION)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"family": "mae"}, "'encoders.mine.weights' holds a 'dinov2_with_registers' model.*set .* to dinov2"),
        ({"input_size": 35}, r"'encoders.mine.input_size' is 35.*patch size 8; take 32 or 40"),
        ({"input_size": 7}, r"'encoders.mine.input_size' is 7.*; take 8$"),
    ],
)
def test_an_entry_that_does_not_fit_its_folder(folder, keys, message):
    with pytest.raises(ValueError, match=message):
        checks.encoder("mine", entry(folder, **keys))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_file_of_the_encoder_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=re.escape(name)):
        checks.encoder("mine", entry(folder))


def test_what_to_write_into_a_missing_processor(folder):
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r'\{"image_mean": \[0.485') as error:
        checks.encoder("mine", entry(folder))
    (folder / "preprocessor_config.json").write_text("{" + str(error.value).split("{")[1].split("}")[0] + "}")
    checks.encoder("mine", entry(folder))


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_an_unreadable_config_of_the_encoder(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        checks.encoder("mine", entry(folder))


def test_no_folder_of_the_encoder(tmp_path):
    with pytest.raises(ValueError, match=r"no such folder.*`hf:`"):
        checks.encoder("mine", entry(tmp_path / "absent"))


def test_a_decoder_of_another_encoder(folder):
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "hidden_size": 384}))
    changed = dataclasses.replace(CONFIGURATION, encoders={"dinov2": entry(folder)})
    with pytest.raises(ValueError, match=r"16 tokens of 96 channels.*16 tokens of 384 channels.*`train`"):
        checks.decoder("dinov2", changed, DECODER)


def test_a_decoder_that_was_trained_with_another_encoder(folder):
    mine = dataclasses.replace(CONFIGURATION, encoders={"dinov2": entry(folder)})
    checks.decoder("dinov2", mine, DECODER)
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match=r"was trained with another encoder than 'dinov2' in '.*`train`"):
        checks.decoder("dinov2", mine, DECODER)
    (folder / "model.safetensors").unlink()
    checks.decoder("dinov2", mine, DECODER)


def test_a_detector_of_another_size():
    with pytest.raises(ValueError, match=r"32 x 32 pixels, but 'image.size' is 64.*inception"):
        checks.detector(config.load([DEFAULTS], ["image.size=64"]))


def test_images_that_are_no_folder(tmp_path):
    checks.images(str(tmp_path))
    with pytest.raises(ValueError, match=r"'data.root' is '.*photos', which is not a folder"):
        checks.images(str(tmp_path / "photos"))


def test_home_is_expanded_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    keys = ["data.root=~/photos", "fid.weights=~/weights.pth", "encoders.dinov2.weights=~/dinov2", "run=~x"]
    loaded = config.load([DEFAULTS], ["image.size=64", *keys, *required()])
    assert loaded.data.root == "/home/someone/photos" and loaded.fid.weights == "/home/someone/weights.pth"
    assert loaded.encoders["dinov2"].weights == "/home/someone/dinov2" and loaded.run == "~x"


def required() -> list[str]:
    """Values of the keys that have no default."""
    values = {
        "encoders.dinov2.family": "dinov2", "encoders.dinov2.input_size": 64, "gmm.n_components": 4,
        "decoder.horizon": 3, "decoder.steps": 3, "train.model": "tiny", "train.epochs": 1, "fid.detector": "inception",
    }  # fmt: skip
    return [f"{name}={value}" for name, value in values.items()]


def test_a_model_that_is_not_configured():
    with pytest.raises(ValueError, match=r"no 'B' in 'models'; configured: tiny"):
        config.load([DEFAULTS], ["train.model=B"])


def test_every_family_knows_what_it_can_load():
    for family in ENCODER_FAMILIES.values():
        assert set(family.model_types) == set(getattr(family.load(), "model_classes", ()))


def test_statistics_of_another_shape_are_refused_without_pytorch(folder, tmp_path):
    """By the shapes in the file; what else the file names is not run."""
    given = tmp_path / "stat.pt"
    loaded = dataclasses.replace(CONFIGURATION, encoders={"mine": entry(folder)})
    fits = torch.ones(96, 4, 4)
    for content in ({"mean": None, "var": fits}, {"mean": fits, "var": fits}, {"mean": fits}, {"other": 3}, [1]):
        torch.save(content, given)
        checks.statistics("mine", loaded, given)
    torch.save({"mean": None, "var": torch.ones(768, 16, 16)}, given)
    with pytest.raises(
        ValueError, match=r"stat.pt', statistics of latents \(768, 16, 16\), .*'mine' gives \(96, 4, 4\);"
    ):
        checks.statistics("mine", loaded, given)

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"mean": Evil(), "var": fits}, given)
    checks.statistics("mine", loaded, given)
    given.write_bytes(b"PK no archive")
    checks.statistics("mine", loaded, given)
    assert not (tmp_path / "touched").exists()
