"""The picture of the worst modes."""

import numpy as np
from PIL import Image

from mmfm.data import Listing
from mmfm.evaluation import mode_sheet
from mmfm.evaluation.mode_quality import ModeQuality
from support.tiny import SIZE


def quality(n: np.ndarray, returned: np.ndarray) -> ModeQuality:
    ones = np.ones(len(n))
    return ModeQuality(
        n, returned, ones, ones, 0.9, (ones * [i % 2 for i in range(len(n))]).astype(int), ones, ones, ones
    )


def test_the_worst_are_those_of_the_ranking_and_the_best_are_certain():
    n, returned = np.full(20, 40), 2 * np.arange(20)
    n[19], returned[19] = 5, 5  # all of few images: less certain than 34 of 40
    found = mode_sheet.chosen(quality(n, returned))
    assert found == {"worst": list(range(8)), "best": [18, 17]}
    assert mode_sheet.chosen(quality(n[:3], returned[:3])) == {"worst": [0, 1, 2]}
    assert mode_sheet.chosen(quality(n // 10, returned // 20)) == {}


def test_frames_say_whether_an_image_returned():
    training, generated = np.zeros((8, SIZE, SIZE, 3), np.uint8), [np.full((SIZE, SIZE, 3), 7, np.uint8)] * 2
    strip = mode_sheet._strip(training, generated, np.array([True, False]))
    step, frame = strip.shape[0], mode_sheet._FRAME
    lefts = [8 * step + mode_sheet._BETWEEN + i * step for i in range(3)]
    assert [tuple(strip[10, left]) for left in lefts] == [mode_sheet.RETURNED, mode_sheet.STRAYED, (255, 255, 255)]
    assert (strip[frame : 64 + frame, lefts[1] + frame : lefts[1] + 64 + frame] == 7).all(), "twice as large as it is"
    assert (strip[frame : 64 + frame, frame : 64 + frame] == 0).all() and (strip[:, 0] == 255).all()


def test_long_names_of_classes_are_cut():
    found = quality(np.full(3, 6), np.array([2, 3, 6]))
    label = mode_sheet._label(1, found, "88% American Staffordshire terrier, pit bull terrier")
    assert (
        label == "mode 1: 88% American Staffordshir…\n3 of 6 return (expected 100%)\ndistance 1.00 (real images 1.00)"
    )
    assert mode_sheet._label(2, found, "90% shirt").startswith("mode 2: 90% shirt\n6 of 6 return\ndistance 1.00")


def test_the_picture_has_a_row_for_each_mode(tmp_path, tiny_pipeline):
    """More rows make it higher; without a ranked mode, it says so instead of being empty."""
    listing, draw = Listing.open(tiny_pipeline.listing), np.random.default_rng(0)
    images, modes = draw.integers(0, 255, (60, SIZE, SIZE, 3)).astype(np.uint8), np.arange(60) % 10
    nearest = {k: np.array([k, k + 10]) for k in range(10)} | {1: np.array([], np.int64)}
    sizes = {}
    for shown, count in ((10, 6), (2, 6), (10, 1)):
        found = quality(np.full(shown, count), np.minimum(np.arange(shown), count))
        path = tmp_path / f"{shown}.{count}.png"
        mode_sheet.draw(path, found, listing, nearest, {0: "50% boot"}, ["DejaVu Sans"], images, modes, modes == 0)
        with Image.open(path) as picture:
            sizes[shown, count] = picture.size
    assert sizes[10, 6][1] > 2 * sizes[2, 6][1] > 0 and sizes[10, 1][1] > 50
