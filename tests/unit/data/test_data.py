"""Listing, splits, reading and cropping of images."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from mmfm import data
from mmfm.cli.__main__ import main
from mmfm.data import loader
from mmfm.data.fashion_mnist import pad_to_rgb
from mmfm.data.moments import CovarianceMoments
from mmfm.data.survey import survey
from mmfm.infra import image_files
from support.tiny import write_images


@pytest.fixture
def folder(tmp_path):
    for name, count in (("cats", 5), ("dogs", 7)):
        (tmp_path / name / "deep").mkdir(parents=True)
        for i in range(count):
            where = tmp_path / name / ("deep" if i % 2 else "")
            Image.fromarray(np.full((10 + i, 12, 3), i * 10, np.uint8)).save(where / f"{count - i:02d}.png")
        (tmp_path / name / "notes.txt").write_text("no image")
    return tmp_path


def write(folder, path, split="train"):
    classes, paths, labels, sizes = data.scan(folder)
    return data.write_listing(path, folder, split, classes, paths, labels, sizes), paths


def test_listing_round_trip(folder, tmp_path):
    digest, paths = write(folder, tmp_path / "l.safetensors")
    listing = data.Listing.open(tmp_path / "l.safetensors")
    assert len(listing) == 12 and listing.classes == ("cats", "dogs") and listing.digest == digest
    assert [listing.relative_path(i) for i in range(12)] == paths
    assert paths[:5] == sorted(paths[:5]) and paths[5:] == sorted(paths[5:])
    assert listing.labels.tolist() == [0] * 5 + [1] * 7
    assert listing.sizes[3] == listing.path(3).stat().st_size


def test_digest_notices_a_changed_folder(folder, tmp_path):
    before, _ = write(folder, tmp_path / "a.safetensors")
    again, _ = write(folder, tmp_path / "b.safetensors")
    (folder / "cats" / "05.png").rename(folder / "cats" / "99.png")
    after, _ = write(folder, tmp_path / "c.safetensors")
    assert before == again != after


def test_parts_are_read_in_batches_of_their_own(folder, tmp_path):
    write(folder, tmp_path / "l.safetensors")
    parts = [range(3, 8), np.array([9, 0, 11]), range(0), [5]]
    read = data.batches_of_parts(tmp_path / "l.safetensors", 8, parts, 2)
    found = [[batch.flatten(1)[:, 0].tolist() for batch in batches] for batches in read]
    (_, whole), *_ = data.image_batches(tmp_path / "l.safetensors", 8, [range(12)])
    pixel = whole.flatten(1)[:, 0].tolist()
    wanted = [[[3, 4], [5, 6], [7]], [[9, 0], [11]], [], [[5]]]
    assert found == [[[pixel[i] for i in batch] for batch in part] for part in wanted]
    assert len(set(pixel)) > 6


def test_shards_are_few_and_not_small():
    assert [len(part) for part in data.shards(25, 10, 4)] == [10, 10, 5]
    assert [len(part) for part in data.shards(25, 5, 4)] == [7, 7, 7, 4]
    assert data.shards(0, 10, 4) == []


def test_flat_folder_is_one_class(folder):
    classes, paths, labels, _ = data.scan(folder / "cats" / "deep")
    assert classes == ["deep"] and len(paths) == 2 and set(labels.tolist()) == {0}


def test_hidden_folders_are_ignored_everywhere(folder):
    """Thumbnails of a file manager, in the root of a flat folder, of one with classes, and in a class."""
    for root in (folder, folder / "cats" / "deep"):
        before = data.scan(root)
        for place in (root, folder / "cats"):
            (place / ".thumbnails").mkdir(exist_ok=True)
            (place / ".thumbnails" / "a.png").write_bytes(b"small")
        ignored = Counter()
        found = data.scan(root, ignored)
        assert found[:2] == before[:2] and ignored["hidden"] == 1
        looked = survey(root)
        assert list(looked.paths) == found[1] and looked.ignored["hidden"] >= 1
        assert image_files.count(root)[0] == len(found[1])


def test_images_beside_class_folders_are_refused(folder):
    (folder / "cats" / "05.png").rename(folder / "loose.png")
    with pytest.raises(ValueError, match=r"both class folders \(cats.*loose\.png"):
        data.scan(folder)


def test_errors_name_the_folder(folder, tmp_path):
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        data.scan(folder)
    with pytest.raises(FileNotFoundError, match=r"data.root '.*absent'"):
        data.scan(tmp_path / "absent")


def test_limited_images_are_those_of_the_published_draws():
    """One RandomState for everything, written out: the classes if they are limited, then the images of each."""
    labels = np.array([0] * 5 + [1] * 2 + [2] * 9 + [3] * 4)
    draws = np.random.RandomState(42)
    rows = [draws.choice(np.arange(first, stop), n, replace=False) for first, stop, n in
            ((0, 5, 2), (5, 7, 1), (7, 16, 4), (16, 20, 2))]  # fmt: skip
    assert np.flatnonzero(data.choose_limited(labels, 0.5, 1.0, 42)).tolist() == sorted(np.concatenate(rows))
    draws = np.random.RandomState(7)
    kept = sorted(draws.choice(4, 2, replace=False))
    rows = [
        draws.choice(np.flatnonzero(labels == k), max(1, len(labels[labels == k]) // 4), replace=False) for k in kept
    ]
    assert np.flatnonzero(data.choose_limited(labels, 0.25, 0.6, 7)).tolist() == sorted(np.concatenate(rows))
    whole = data.choose_limited(labels, 1.0, 0.6, 7)
    assert whole.tolist() == [label in kept for label in labels]
    assert data.choose_limited(labels, 0.01, 0.01, 0).sum() == 1, "at least one class, and one image of it"


def test_a_limit_comes_before_holding_out_and_keeps_the_labels(tmp_path, capsys):
    images = write_images(tmp_path / "images", 24, classes=3)

    def listed(*keys: str) -> tuple[data.Listing, data.Listing]:
        out = [tmp_path / "train.safetensors", tmp_path / "heldout.safetensors"]
        line = ["list_images", "--settings", json.dumps({"data": {"root": "x", "holdout": 0, "seed": 0,
                "unreadable": "error", "workers": 0}}), *keys, "--root", str(images)]  # fmt: skip
        assert main([*line, "--train", str(out[0]), "--heldout", str(out[1])]) == 0
        return tuple(data.Listing.open(path) for path in out)

    def paths(listing: data.Listing) -> list[str]:
        return [listing.relative_path(i) for i in range(len(listing))]

    everything = listed()[0]
    chosen = data.choose_limited(everything.labels, 0.5, 0.7, 3)
    wanted = [path for path, keep in zip(paths(everything), chosen, strict=True) if keep]
    limit = ("data.limit.images=0.5", "data.limit.classes=0.7", "data.limit.seed=3")
    alone = listed(*limit)[0]
    assert paths(alone) == wanted and len(wanted) == 8 and alone.digest != everything.digest
    assert alone.labels.tolist() == everything.labels[chosen].tolist() and alone.classes == everything.classes
    assert "data.limit keeps 8 of 24 images in 2 classes" in capsys.readouterr().out
    train, heldout = listed(*limit, "data.holdout=3")
    held = data.choose_heldout(wanted, 3, 0)
    assert paths(train) == [path for path, out in zip(wanted, held, strict=True) if not out]
    assert paths(heldout) == [path for path, out in zip(wanted, held, strict=True) if out]


def listed(root, tmp_path, *keys):
    """Return the listings of training and held-out images."""
    out = [tmp_path / "train.safetensors", tmp_path / "heldout.safetensors"]
    values = {"root": "x", "holdout": 0, "seed": 0, "unreadable": "error", "workers": 0}
    line = ["list_images", "--settings", json.dumps({"data": values}), *keys, "--root", str(root)]
    assert main([*line, "--train", str(out[0]), "--heldout", str(out[1])]) == 0
    return [data.Listing.open(path) for path in out]


def paths_of(listing):
    return [listing.relative_path(i) for i in range(len(listing))]


def test_a_folder_of_held_out_images_has_the_training_classes(tmp_path):
    """Some classes may be missing, so a class's number there is not its number in the training folder."""
    images = write_images(tmp_path / "images", 12, classes=3)
    others = write_images(tmp_path / "others", 9, classes=3, seed=1)
    shutil.rmtree(others / "class0")
    plain = listed(images, tmp_path)[0]
    train, heldout = listed(images, tmp_path, f"data.heldout_root={others}")
    assert train.digest == plain.digest and len(train) == 12, "no image is taken from training"
    assert heldout.root == others and heldout.split == "heldout" and heldout.classes == train.classes
    assert heldout.labels.tolist() == [1] * 3 + [2] * 3
    assert paths_of(heldout)[0] == "class1/0001.png" and heldout.path(0).is_file()
    limited, of_kept = listed(
        images, tmp_path, f"data.heldout_root={others}", "data.limit.classes=0.7", "data.limit.seed=3"
    )
    kept = set(limited.labels.tolist())
    assert len(kept) == 2 and 0 in kept, "the seed keeps a class that is not held out, and one that is"
    assert set(of_kept.labels.tolist()) == kept - {0} and len(of_kept) == 3


def test_folders_without_classes_need_not_have_the_same_name(tmp_path):
    images, others = (write_images(tmp_path / name, 3, classes=1, seed=i) for i, name in enumerate("ab"))
    train, heldout = listed(images / "class0", tmp_path, f"data.heldout_root={others / 'class0'}")
    (others / "class0").rename(others / "elsewhere")
    again = listed(images / "class0", tmp_path, f"data.heldout_root={others / 'elsewhere'}")[1]
    assert len(train) == len(heldout) == 3 and again.digest == heldout.digest
    assert again.classes == ("class0",) and again.labels.tolist() == [0, 0, 0]


def test_damaged_held_out_images_are_left_out_if_asked(tmp_path):
    images, others = (write_images(tmp_path / name, 6, seed=i) for i, name in enumerate("ab"))
    (others / "class1" / "0003.png").write_bytes(b"no image")
    train, heldout = listed(images, tmp_path, f"data.heldout_root={others}", "data.unreadable=skip")
    assert (len(train), len(heldout)) == (6, 5)


def test_heldout_images_are_chosen_by_path():
    paths = [f"c/{i:05d}.png" for i in range(1000)]
    chosen = data.choose_heldout(paths, 200, seed=0)
    assert chosen.sum() == 200
    fewer = data.choose_heldout(paths[:-1], 200, seed=0)
    assert (chosen[:-1] != fewer).sum() <= 1
    assert (chosen != data.choose_heldout(paths, 200, seed=1)).any()
    with pytest.raises(ValueError, match=r"data\.holdout"):
        data.choose_heldout(paths, 1000, seed=0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16", "P", "1", "LA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB" if mode in ("RGBA", "CMYK") else "L")
        image = image.quantize(256) if mode == "P" else image.convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    read = data.read_image(path)
    assert read.mode == "RGB"
    if mode != "1":
        assert np.abs(np.asarray(read, int) - grey[..., None]).max() <= 4


@pytest.mark.parametrize(("mode", "clear", "kept"), [("P", 0, 1), ("L", 30, 60), ("RGB", (9, 8, 7), (60, 50, 40))])
def test_a_colour_that_is_declared_transparent_becomes_white(tmp_path, mode, clear, kept):
    image = Image.new(mode, (2, 1))
    if mode == "P":
        image.putpalette([10, 20, 30, 60, 50, 40])
    image.putdata([clear, kept])
    image.save(tmp_path / "x.png", transparency=clear)
    read = np.asarray(data.read_image(tmp_path / "x.png"))
    assert read[0].tolist() == [[255] * 3, [60] * 3 if mode == "L" else [60, 50, 40]]


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert data.read_image(tmp_path / "x.jpg").size == (10, 20)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_unreadable_image_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    if content is None:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.png"):
        data.read_image(path)


@pytest.mark.parametrize("size", [(64, 64), (31, 90), (500, 333), (20, 16), (129, 128)])
def test_crop_has_the_size(size):
    assert data.center_crop(Image.new("RGB", size), 32).size == (32, 32)


def test_crop_takes_the_centre():
    array = np.zeros((32, 64, 3), np.uint8)
    array[:, 16:48] = 255
    assert np.asarray(data.center_crop(Image.fromarray(array), 32)).min() == 255


def crop_of_adm(image, size):
    """ADM's rule by its numbers: how often the shorter side holds the size says how often the image is halved."""
    for _ in range((min(image.size) // size).bit_length() - 1):
        image = image.resize([side // 2 for side in image.size], Image.Resampling.BOX)
    ratio = size / min(image.size)
    pixels = np.asarray(image.resize([round(side * ratio) for side in image.size], Image.Resampling.BICUBIC))
    first_row, first_column = (int((side - size) / 2) for side in pixels.shape[:2])  # an odd margin's half is cut off
    return pixels[first_row : first_row + size, first_column : first_column + size]


@pytest.mark.parametrize(
    "size",
    [
        (16, 16), (19, 16), (16, 19), (23, 16), (16, 23), (20, 18), (31, 31), (31, 38), (32, 32), (32, 39), (39, 32),
        (33, 34), (63, 70), (64, 64), (65, 131), (14, 11), (12, 8),
    ],
)  # fmt: skip
def test_crop_is_adms(size):
    """Margins of both parities, both sides of where an image is halved once and once more, and one that is doubled."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise)
    np.testing.assert_array_equal(np.asarray(data.center_crop(image, 16)), crop_of_adm(image, 16))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_come_in_order(folder, tmp_path, workers):
    write(folder, tmp_path / "l.safetensors")
    wanted = [[3, 1], [11], [0, 5, 7]]
    batches = list(data.image_batches(tmp_path / "l.safetensors", 8, wanted, workers))
    assert [indices.tolist() for indices, _ in batches] == wanted
    images = batches[2][1]
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.uint8
    listing = data.Listing.open(tmp_path / "l.safetensors")
    expected = np.asarray(data.center_crop(data.read_image(listing.path(5)), 8))
    np.testing.assert_array_equal(images[1].permute(1, 2, 0).numpy(), expected)


def test_unreadable_images_are_told_from_readable_ones(tmp_path):
    write_images(tmp_path, 3, classes=1)
    paths = data.scan(tmp_path)[1]
    broken = tmp_path / paths[1]
    broken.write_bytes(broken.read_bytes()[:60])
    assert data.find_readable(tmp_path, paths).tolist() == [True, False, True]


def test_one_row_has_a_population_variance_and_two_an_unbiased_one():
    rows = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    found = CovarianceMoments.zeros(2).update(rows[:1])
    with pytest.raises(ValueError, match="1 rows seen, 2 needed"):
        found.covariance()
    found.update(rows[1:])
    assert found.covariance().tolist() == [[2, 0], [0, 0]]


@pytest.mark.parametrize("shape, dtype", [((2, 28, 28), "float32"), ((28, 28), "uint8"), ((2, 28, 27), "uint8")])
def test_arrays_that_are_no_garments_are_refused(shape, dtype):
    with pytest.raises(ValueError, match=r"28"):
        pad_to_rgb(np.zeros(shape, dtype))


def test_a_small_shared_memory_is_named_before_workers_start(folder, tmp_path, monkeypatch):
    write(folder, tmp_path / "l.safetensors")
    monkeypatch.setattr(loader, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(loader.disk, "free", lambda path: 64 << 20)
    monkeypatch.setattr(loader.cores, "given", lambda: 16)
    batches = [list(range(40))] * 2
    with pytest.raises(
        ValueError, match=r"16 image-reading processes read up to 0\.4 GB ahead .* 0\.1 GB are free; lower"
    ):
        data.image_batches(tmp_path / "l.safetensors", 224, batches, workers=16)
    assert len(list(data.image_batches(tmp_path / "l.safetensors", 8, [[0], [1]], workers=0))) == 2


def test_no_more_reading_processes_than_the_job_has_cores(folder, tmp_path, monkeypatch):
    write(folder, tmp_path / "l.safetensors")
    monkeypatch.setattr(loader.cores, "given", lambda: 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    asked = []
    monkeypatch.setattr(loader, "_require_shared_memory", lambda workers, size: asked.append(workers))

    def stand_in(*arguments, num_workers, **keys):
        asked.append(num_workers)
        return []

    monkeypatch.setattr(loader.torch.utils.data, "DataLoader", stand_in)
    data.image_batches(tmp_path / "l.safetensors", 8, [[0], [1]], workers=8)
    assert asked == [1, 1]
