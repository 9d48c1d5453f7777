"""Copies of training images are found and named; images of the same distribution raise no alarm."""

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from mmfm.evaluation.memorisation import draw, memorisation
from mmfm.evaluation.neighbours import nearest


def sets(n: int = 400, m: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Generated (n, 8), held-out (m, 8) and training features (500, 8) of one distribution, float32."""
    generator = np.random.default_rng(0)
    return tuple(generator.normal(size=(count, 8)).astype(np.float32) for count in (n, m, 500))


def test_distances_and_nearest_images_of_one_distribution():
    generated, heldout, training = sets()
    found = memorisation(generated, heldout, training)
    everything = np.linalg.norm(generated[:, None].astype(np.float64) - training, axis=2)
    assert np.array_equal(found.nearest, everything.argmin(1)) and np.allclose(found.generated, everything.min(1))
    real = np.linalg.norm(heldout[:, None].astype(np.float64) - training, axis=2).min(1)
    assert np.allclose(found.heldout, real)
    assert found.closer == pytest.approx((found.generated[:, None] < real).mean(), abs=1e-12)
    assert 0.45 < found.closer < 0.55 and found.close < 0.03 and found.warnings == ()


def test_training_features_are_read_in_blocks_and_compared_once():
    class Stored:
        """A file of features that takes consecutive rows only, and few of them."""

        def __init__(self, rows):
            self.rows, self.shape, self.ndim = rows, rows.shape, 2

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, rows):
            assert isinstance(rows, slice)
            return self.rows[rows]

    queries, _, training = sets(50)
    training[[3, 321]] = queries[7]  # the first of equal rows counts
    stored, pairs = Stored(training), []
    distances, indices = nearest(queries, stored, torch.device("cpu"), block=16, advance=pairs.append)
    everything = np.linalg.norm(queries[:, None].astype(np.float64) - training, axis=2)
    assert np.allclose(distances, everything.min(1)) and np.array_equal(indices, everything.argmin(1))
    assert indices[7] == 3 and distances[7] == 0
    assert sum(pairs) == 50 * 500 and max(pairs) == 16 * 16


def test_false_alarms_are_rare():
    generator = np.random.default_rng(1)
    alarms = 0
    for _ in range(100):
        parts = [generator.normal(size=(count, 4)).astype(np.float32) for count in (200, 100, 300)]
        alarms += bool(memorisation(*parts, doubt=1e-2).warnings)
    assert alarms <= 5


def test_a_few_copies_among_many_are_found():
    generated, heldout, training = sets(400, 1000)
    generated[:20] = training[100:120] + 1e-3
    found = memorisation(generated, heldout, training)
    assert len(found.warnings) == 1 and found.close >= 0.05
    assert "generated images (5" in found.warnings[0] and "closer to a training image than 99%" in found.warnings[0]
    assert set(found.closest(20)) == set(range(20)) and set(found.nearest[:20]) == set(range(100, 120))
    assert found.generated[found.closest(20)].tolist() == sorted(found.generated)[:20]


def test_images_that_are_closer_on_the_whole_are_named():
    generated, heldout, training = sets()
    found = memorisation(generated * np.float32(0.8), heldout, training)
    assert found.closer > 0.6 and "in 6" in found.warnings[0] and "50% are expected" in found.warnings[0]


def test_images_that_are_further_away_raise_no_alarm():
    generated, heldout, training = sets()
    found = memorisation(generated * 2, heldout, training)
    assert found.closer < 0.3 and found.warnings == ()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda g, h, t: (g, h[:0], t), "held-out images are .* at least 2 rows"),
        (lambda g, h, t: (g * np.nan, h, t), "generated images contain NaN"),
        (lambda g, h, t: (g, h, t * 0), "training images are all equal"),
        (lambda g, h, t: (g, h[:, :4], t), "have 8, 4 and 8 features; use one detector"),
    ],
)
def test_refuses_what_can_not_be_compared(change, message):
    with pytest.raises(ValueError, match=message):
        memorisation(*change(*sets(20, 20)))


def test_the_figure_shows_pairs_and_distances(tmp_path, monkeypatch):
    generated, heldout, training = sets()
    found = memorisation(generated, heldout, training)
    pictures = np.random.default_rng(2).integers(0, 256, (2, 6, 3, 16, 16), np.uint8)
    found.generated[found.closest(2)] = (0.55, 0.561)
    written = []
    set_xticks = Axes.set_xticks
    monkeypatch.setattr(Axes, "set_xticks", lambda axes, *a, **b: written.append(a[1]) or set_xticks(axes, *a, **b))
    draw(tmp_path / "memorisation.png", found, *pictures)
    assert len({len(text.partition(".")[2]) for text in written[0]}) == 1, "as many digits each"
    drawn = np.asarray(Image.open(tmp_path / "memorisation.png").convert("RGB"))
    assert drawn.shape[0] > 500 and drawn.std() > 20
