"""Precision, recall, density and coverage against plain loops, torch-fidelity and closed cases; nearest neighbours."""

import numpy as np
import pytest
import torch

from mmfm.evaluation.manifold import Manifold, manifold
from mmfm.evaluation.neighbours import kth_nearest, nearest

CPU = torch.device("cpu")


def clouds(n: int = 150, m: int = 120, d: int = 12, shift: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """Generated (n, d) and real (m, d) features, float32, that overlap in part."""
    generator = np.random.default_rng(0)
    return generator.normal(shift, 0.8, (n, d)).astype(np.float32), generator.normal(0, 1, (m, d)).astype(np.float32)


def plain(generated: np.ndarray, real: np.ndarray, k: int, k_density: int) -> Manifold:
    """Apply the definitions, one pair at a time, in float64."""

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(((a.astype(np.float64) - b) ** 2).sum()))

    def radius(i: int, points: np.ndarray, k: int) -> float:
        return sorted(distance(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    def share(points: np.ndarray, centres: np.ndarray) -> float:
        radii = [radius(i, centres, k) for i in range(len(centres))]
        return np.mean([any(distance(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points])

    radii = [radius(i, real, k_density) for i in range(len(real))]
    inside = np.array([[distance(g, c) < r for c, r in zip(real, radii, strict=True)] for g in generated])
    density, coverage = inside.sum() / (k_density * len(generated)), inside.any(0).mean()
    return Manifold(share(generated, real), share(real, generated), density, coverage)


@pytest.mark.parametrize("k, k_density", [(3, 5), (1, 2)])
def test_equals_the_definitions(k, k_density):
    generated, real = clouds()
    expected = plain(generated, real, k, k_density)
    assert 0.1 < expected.precision < 0.99 and 0.1 < expected.recall < 0.99 and 0.1 < expected.coverage < 0.99
    assert expected.precision != expected.recall
    found = manifold(generated, real, k, k_density)
    assert vars(found) == pytest.approx(vars(expected), abs=1e-12)


def test_precision_and_recall_equal_torch_fidelity():
    """To the last image: no pair of distances is within float32's rounding here."""
    import mmfm.infra.torchvision_ops  # noqa: F401  # isort: skip
    from torch_fidelity.metric_prc import prc_features_to_metric

    generated, real = (torch.from_numpy(part) for part in clouds(400, 300, 16, 0.6))
    expected = prc_features_to_metric(generated, real, prc_neighborhood=3, save_cpu_ram=False, verbose=False)
    found = manifold(generated, real)
    assert 0.1 < found.precision < 0.99 and 0.1 < found.recall < 0.99
    assert found.precision == pytest.approx(expected["precision"], abs=1e-6)
    assert found.recall == pytest.approx(expected["recall"], abs=1e-6)


def test_does_not_depend_on_the_block_or_the_container():
    generated, real = clouds()
    whole = manifold(generated, real)
    for block in (7, 50, 149):
        assert manifold(generated, real, block=block) == whole
    assert manifold(torch.from_numpy(generated), torch.from_numpy(real), block=33) == whole


def test_a_large_common_mean_does_not_cancel():
    """Features around 1000, whose squared norms are a million times the distances: the differences are what counts."""
    generated, real = clouds()
    far = [np.round(part * 64) / 64 + 1000 for part in (generated, real)]  # exact in float32
    near = [part - 1000 for part in far]
    assert manifold(far[0].astype(np.float32), far[1].astype(np.float32)) == manifold(*near)


def test_equal_sets_and_sets_far_apart():
    real = clouds()[1]
    same = manifold(real.copy(), real)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert same.density == pytest.approx(1, abs=0.01)
    assert manifold(real + 100, real) == Manifold(0, 0, 0, 0)


def test_one_repeated_mode_has_precision_without_recall():
    _, real = clouds()
    collapsed = real[:1] + 1e-3 * np.random.default_rng(1).normal(size=(100, 12)).astype(np.float32)
    found = manifold(collapsed, real)
    assert found.precision == 1 and found.recall <= 0.02 and found.coverage < 0.2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda g, r: (g * np.nan, r), "generated images contain NaN"),
        (lambda g, r: (g, np.where(r > 2, np.inf, r)), "real images contain NaN or Inf"),
        (lambda g, r: (g * 0 + 1, r), "generated images are all equal"),
        (lambda g, r: (g, r * 0), "real images are all equal"),
        (lambda g, r: (g[:3], r), "at least 4 rows"),
        (lambda g, r: (g, r[:5]), "at least 6 rows"),
        (lambda g, r: (g, r[:, :5]), "12 features and real ones 5; use one detector"),
        (lambda g, r: (g[0], r), "at least 4 rows"),
    ],
)
def test_refuses_what_has_no_manifold(change, message):
    with pytest.raises(ValueError, match=message):
        manifold(*change(*clouds()))


def test_nearest_rows_and_their_distances():
    generated, real = clouds()
    everything = np.linalg.norm(generated[:, None].astype(np.float64) - real, axis=2)
    for block in (11, 4096):
        distances, indices = nearest(generated, real, CPU, block)
        assert np.array_equal(indices.numpy(), everything.argmin(1))
        assert np.allclose(distances.numpy(), everything.min(1), rtol=1e-12)
    ordered = np.sort(np.linalg.norm(real[:, None].astype(np.float64) - real, axis=2), 1)[:, 1:4]
    assert np.allclose(kth_nearest(real, 3, CPU, 17).sqrt().numpy(), ordered, rtol=1e-5)


def test_a_copy_is_at_distance_zero_from_the_first_of_its_originals():
    real = np.concatenate([clouds()[1] + 50] * 2)
    distances, indices = nearest(real[[130, 7]], real, CPU, 64)
    assert distances.tolist() == [0, 0] and indices.tolist() == [10, 7]


def test_too_few_rows_have_no_neighbours():
    with pytest.raises(ValueError, match="3 images have no 3 neighbours each; give at least 4"):
        kth_nearest(clouds()[1][:3], 3, CPU)
