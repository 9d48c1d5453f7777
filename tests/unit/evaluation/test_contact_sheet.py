"""The contact sheet: which modes, which images, and a picture that says it."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mmfm.cli import fit_gmm
from mmfm.data import Listing, tokens
from mmfm.evaluation import contact_sheet
from mmfm.infra import store
from mmfm.mixture.gaussian import Mixture
from support.tiny import write_images, write_listing

GENERATOR = np.random.default_rng(0)


def test_modes_are_chosen_by_size():
    counts = np.array([5, 0, 90, 7, 7, 30, 1, 2, 3, 4, 0, 8, 60])
    assert contact_sheet.choose_modes(counts, 2) == {
        "largest modes": [2, 12],
        "modes of median size": [3, 4],  # of 11 with images, largest first: 2 12 5 11 [3 4] 0 9 8 7 6
        "smallest modes": [7, 6],
    }
    assert len(contact_sheet.choose_modes(counts, 3)) == 3
    assert len(contact_sheet.choose_modes(np.ones(9, int), 3)) == 1
    assert contact_sheet.choose_modes(counts, 4) == {"all modes with images": [2, 12, 5, 11, 3, 4, 0, 9, 8, 7, 6]}


@pytest.mark.parametrize("covariance_type", ["diag", "spherical"])
def test_the_nearest_images_are_the_likeliest_of_the_mode(covariance_type):
    values = GENERATOR.normal(size=(200, 3)).astype(np.float32)
    means = GENERATOR.normal(size=(5, 3))
    variances = GENERATOR.uniform(0.1, 2, (5, 3) if covariance_type == "diag" else 5)
    mixture = Mixture(np.full(5, 0.2), means, variances)
    labels = np.where(np.arange(200) < 180, GENERATOR.integers(4, size=200), 4).astype(np.int32)
    labels[7] = 4
    read = []

    def rows(start, stop):
        read.append(start)
        return values[start:stop]

    found = contact_sheet.nearest_images(rows, labels, mixture, [4, 1], 30)
    density = mixture.log_joint(torch.from_numpy(values)).numpy()
    for k in (1, 4):
        own = np.flatnonzero(labels == k)
        np.testing.assert_array_equal(found[k], own[np.argsort(-density[own, k])][: contact_sheet.COLUMNS])
    read.clear()
    contact_sheet.nearest_images(rows, labels, mixture, [4], 30)
    assert read == [0, 180]  # blocks without an image of the mode are not read


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sheet")
    listing = write_listing(folder / "listing.safetensors", write_images(folder / "images", 40))
    return listing, GENERATOR.normal(size=(40, 3)).astype(np.float32)


@pytest.mark.parametrize("k", [1, 4, 12])
def test_the_picture_is_drawn_for_few_and_many_modes(images, tmp_path, k):
    listing, values = images
    labels = np.minimum(np.arange(40), k - 1).astype(np.int32)  # all but the last have one image
    mixture = Mixture(np.full(k, 1 / k), np.zeros((k, 3)), np.ones((k, 3)))
    path = tmp_path / "modes.png"
    contact_sheet.draw(path, Listing.open(listing), lambda a, b: values[a:b], labels, mixture, 16)
    with Image.open(path) as picture:
        assert picture.width > 64 * min(12, 40 - k + 1) and picture.height > 64 * min(k, 9)


def test_the_command_draws_the_sheet_beside_the_fit(images, tmp_path):
    listing, values = images
    labels = Listing.open(listing).labels
    tokens.create(tmp_path / "t.zarr", 40, 3, 40, labels)[:] = values
    tokens.finish(tmp_path / "t.zarr", {"digest": "t", "listing_digest": Listing.open(listing).digest})
    given = ["--config", "config/config.yaml", "--tokens", str(tmp_path / "t.zarr"), "--listing", str(listing)]
    assert fit_gmm.main([*given, "--out-dir", str(tmp_path / "gmm"), "gmm.n_components=3"]) == 0
    with Image.open(tmp_path / "gmm" / "modes.png") as picture:
        assert picture.width > 400
    report = store.read_json(tmp_path / "gmm" / "report.json")
    assert report["silhouette_images"] == 40 and -1 <= report["silhouette"] <= 1
    assert report["effective_number_by_counts"] == pytest.approx(np.exp(report["entropy_of_counts"]))


def test_tokens_of_another_listing_are_refused(images, tmp_path, monkeypatch):
    class Tokens:
        path, digest, attributes = "t", "t", {"listing_digest": "other"}

    monkeypatch.setattr("mmfm.data.tokens.TokenStore.open", lambda path: Tokens())
    given = ["--config", "config/config.yaml", "--tokens", "t", "--listing", str(images[0]), "--out-dir", str(tmp_path)]
    with pytest.raises(ValueError, match="was made from another listing than"):
        fit_gmm.main(given)


def test_the_mixture_does_not_wait_for_a_picture_of_damaged_images(images, tmp_path):
    listing, values = images
    listed = Listing.open(listing)
    tokens.create(tmp_path / "t.zarr", 40, 3, 40, listed.labels)[:] = values
    tokens.finish(tmp_path / "t.zarr", {"digest": "t", "listing_digest": listed.digest})
    moved = tmp_path / "moved"
    listed.root.rename(moved)
    given = ["--config", "config/config.yaml", "--tokens", str(tmp_path / "t.zarr"), "--listing", str(listing)]
    given += ["--out-dir", str(tmp_path / "gmm"), "gmm.n_components=3"]
    try:
        with pytest.raises((ValueError, OSError), match="cannot read image"):
            fit_gmm.main(given)
    finally:
        moved.rename(listed.root)
    made = (tmp_path / "gmm" / "gmm.safetensors").read_bytes()
    assert not (tmp_path / "gmm" / "modes.png").exists()
    assert fit_gmm.main(given) == 0
    assert (tmp_path / "gmm" / "modes.png").is_file() and (tmp_path / "gmm" / "gmm.safetensors").read_bytes() == made


def test_a_row_says_size_weight_and_commonest_class(images):
    listed = Listing.open(images[0])
    labels = np.where(listed.labels == 1, 1, 0).astype(np.int32)
    labels[np.flatnonzero(listed.labels == 0)[:5]] = 1
    labels[np.flatnonzero(listed.labels == 0)[5]] = 2
    counts = np.bincount(labels)
    mixture = Mixture(np.array([0.25, 0.625, 0.125]), np.zeros((3, 3)), np.ones((3, 3)))
    said = [
        contact_sheet._label(k, counts, labels, listed.labels, listed.classes, mixture).split("\n") for k in range(3)
    ]
    assert said == [
        ["mode 0", "14 images, weight 25.00%", "100% class0"],
        ["mode 1", "25 images, weight 62.50%", "80% class1"],
        ["mode 2", "1 image, weight 12.50%", "100% class0"],
    ]


def test_a_row_shows_the_images_in_order_and_white_after_them(images):
    listed = Listing.open(images[0])
    row = contact_sheet.cropped_row(listed, np.array([7, 3]), 4, 24)
    assert row.shape == (4, 3, 24, 24) and (row[2:] == 255).all()
    for shown, image in zip(row, (7, 3), strict=False):
        with Image.open(listed.path(image)) as picture:
            whole = np.asarray(picture.convert("RGB").resize((24, 24), Image.Resampling.BOX), float)
        assert np.abs(shown.transpose(1, 2, 0) - whole).mean() < 8


def test_densities_do_not_depend_on_their_blocks(monkeypatch):
    values = GENERATOR.normal(size=(23, 3)).astype(np.float32)
    mixture = Mixture(np.full(2, 0.5), GENERATOR.normal(size=(2, 3)), np.ones((2, 3)))
    modes = GENERATOR.integers(2, size=23)
    monkeypatch.setattr(contact_sheet, "_DENSITY_ROWS", 5)
    joint = mixture.log_joint(torch.from_numpy(values)).numpy()
    np.testing.assert_allclose(contact_sheet._own_density(mixture, values, modes), joint[np.arange(23), modes])


def test_a_sheet_without_classes_names_none(images):
    listed = Listing.open(images[0])
    mixture = Mixture(np.ones(1), np.zeros((1, 3)), np.ones((1, 3)))
    label = contact_sheet._label(0, np.array([len(listed)]), np.zeros(40, int), listed.labels, ["all"], mixture)
    assert label.split("\n") == ["mode 0", "40 images, weight 100.00%"]


def test_classes_in_any_script_are_drawn_without_warnings(tmp_path, images):
    """Where no installed font has the characters, the class is shown by its number."""
    listed = Listing.open(images[0])
    listed = dataclasses.replace(listed, classes=tuple(f"\U0010fffd{name}" for name in listed.classes))
    mixture = Mixture(np.ones(1), np.zeros((1, 3)), np.ones((1, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contact_sheet.draw(tmp_path / "modes.png", listed, lambda a, b: images[1][a:b], np.zeros(40, int), mixture, 40)


@pytest.mark.parametrize("size, shown", [(24, 24), (130, 96)])
def test_images_are_shown_whole_and_not_larger_than_they_are(tmp_path, monkeypatch, size, shown):
    """Six modes of one image each; of groups by size, each row is its mode's image."""
    listing = Listing.open(write_listing(tmp_path / "l.safetensors", write_images(tmp_path / "images", 6, size=size)))
    sheets, figures = [], []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    grid = contact_sheet.image_grid
    monkeypatch.setattr(contact_sheet, "image_grid", lambda images, n: sheets.append((images, n)) or grid(images, n))
    mixture = Mixture(np.full(6, 1 / 6), np.zeros((6, 3)), np.ones((6, 3)))
    rows = np.zeros((6, 3), np.float32)
    contact_sheet.draw(tmp_path / "modes.png", listing, lambda a, b: rows[a:b], np.arange(6), mixture, 4)
    ((images, columns),) = sheets
    assert images.shape == (6, 3, shown, shown) and columns == 1
    for image in range(6):
        assert (images[image] == contact_sheet.cropped_row(listing, np.array([image]), 1, shown)[0]).all()
    (axes,) = figures[0].axes
    beside = axes.get_yticks() * 6 / axes.images[0].get_array().shape[0]
    assert np.floor(beside).tolist() == list(range(6)), "each label is beside its row"
    assert [label.get_text().split("\n")[0] for label in axes.get_yticklabels()] == [f"mode {k}" for k in range(6)]
