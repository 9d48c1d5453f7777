"""What a look at a folder finds, and what listing it says of the same files."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mmfm import data
from mmfm.cli.__main__ import main
from mmfm.data import survey as surveys
from mmfm.data.survey import survey
from mmfm.infra import image_files, store


@pytest.fixture
def odd(tmp_path):
    """Two classes, nested and with all sorts of other files: 7 images, one of them broken, and a dangling link."""
    root = tmp_path / "my phötos"
    for i, name in enumerate(
        ("cats/a b.png", "cats/Ünï/x.JPG", "cats/long.png", "dogs/1.png", "dogs/2.png", "dogs/L.png")
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (400, 40) if "long" in name else (30 + i, 50)
        Image.new("L" if "L" in name else "RGB", size, i * 40).save(path)
    (root / "dogs" / "broken.jpeg").write_bytes(b"no image")
    (root / "dogs" / "gone.png").symlink_to(root / "nowhere.png")
    for name in ("cats/moving.gif", "cats/notes.txt", "dogs/more.txt", "cats/.DS_Store", "README"):
        (root / name).write_text("no image")
    (root / ".git").mkdir()
    return root


def test_an_odd_folder_is_described_not_refused(odd):
    found = survey(odd)
    assert found.classes == {"cats": 3, "dogs": 4} and not found.loose and not found.refusal()
    assert found.extensions == {".png": 5, ".jpg": 1, ".jpeg": 1}
    assert found.ignored == {".txt": 2, "hidden": 2, ".gif": 1, "without extension": 1}
    assert len(found.broken) == 1 and "broken.jpeg" in found.broken[0] and found.count == 6
    assert len(found.lost) == 1 and "gone.png" in found.lost[0] and "dangling" in found.lost[0]
    assert found.opened == 7 and found.decoded == 6 and found.modes == {"RGB": 5, "L": 1} and found.long == 1
    assert sorted(found.shorter.tolist()) == [30, 31, 33, 34, 35, 40] and found.seconds > 0


def test_listing_the_same_folder(odd, tmp_path, capfd):
    """Dangling links and broken images are errors that name them, or left out and named; ignored files are counted."""
    command = ["list_images", "--config", "config/config.yaml", "--root", str(odd)]
    command += ["--train", str(tmp_path / "t.safetensors"), "--heldout", str(tmp_path / "h.safetensors")]
    assert main([*command, "data.holdout=1"]) == 2
    assert "gone.png' can't be accessed (a dangling link); repair or remove it" in capfd.readouterr().err
    assert main([*command, "data.holdout=1", "data.unreadable=skip"]) == 0
    said = capfd.readouterr()
    ignored = "2 .txt, 1 .gif, 1 hidden, 1 without extension (to use the .gif pictures, convert them to PNG)"
    assert f"ignored files: {ignored}" in said.out
    assert "2 unreadable images left out" in said.out and "gone.png': a dangling link" in said.err
    assert len(data.Listing.open(tmp_path / "t.safetensors")) == 5
    assert store.map_arrays(tmp_path / "t.safetensors")[1]["skipped"] == 2


def test_a_locked_folder_is_lost_or_named(odd, monkeypatch):
    scandir = image_files.os.scandir

    def locked(path):
        if str(path).endswith("Ünï"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(image_files.os, "scandir", locked)
    lost = []
    assert len(data.scan(odd, Counter(), lost)[1]) == 6 and len(lost) == 2 and "permission denied" in str(lost)
    assert any("Ünï" in what for what in survey(odd).lost)
    with pytest.raises(ValueError, match="can't be accessed"):
        data.scan(odd)


def test_copies_are_counted(odd):
    (odd / "dogs" / "copy").mkdir()
    (odd / "dogs" / "copy" / "1.png").write_bytes((odd / "dogs" / "1.png").read_bytes())
    assert survey(odd).copies == 1


def test_what_a_listing_would_refuse(odd):
    (odd / "cats" / "a b.png").rename(odd / "loose.png")
    found = survey(odd)
    assert "loose.png" in found.refusal() and "move the images" in found.refusal() and not found.opened
    with pytest.raises(ValueError, match="loose"):
        data.scan(odd)
    (odd / "loose.png").unlink()
    (odd / "birds").mkdir()
    assert "birds" in survey(odd).refusal()


def test_an_empty_folder_is_named_itself(tmp_path):
    (tmp_path / "photos").mkdir()
    assert survey(tmp_path / "photos").refusal().startswith(f"no images in '{tmp_path / 'photos'}' (")


def test_a_flat_folder_is_one_class(odd):
    found = survey(odd / "dogs")
    assert found.classes == {"dogs": 4} and not found.refusal()


def test_of_many_images_some_are_opened(odd, monkeypatch):
    monkeypatch.setattr(surveys, "MOST_OPENED", 3)
    found = survey(odd, seconds=0)
    assert found.opened == 3 and found.decoded == 0 and len(found.paths) == 7


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        survey(tmp_path / "absent")


def test_pictures_leave_out_what_is_broken(odd):
    shown = surveys.pictures(survey(odd), side=16)
    assert shown.shape == (6, 3, 16, 16) and shown.dtype == np.uint8


def test_a_quick_count(odd):
    count, size = image_files.count(odd)
    assert count == 8 and size > 0  # by name alone: the broken one and the link are images too
    assert image_files.count(odd, most=5) is None and image_files.count(odd, seconds=-1) is None
    assert image_files.count(odd / "absent") is None and image_files.count(odd / ".git") is None
