"""The Frechet distance against closed forms, scipy, and its own properties."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm.evaluation.frechet import frechet_distance


def gaussian(seed: int, d: int, rank: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and covariance (d, d) of the given rank (default: full, well-conditioned)."""
    generator = np.random.default_rng(seed)
    factor = generator.normal(size=(d, rank or 4 * d))
    return generator.normal(size=d), factor @ factor.T / factor.shape[1]


def test_closed_form_of_commuting_covariances():
    """For covariances with the same eigenvectors it is |dm|^2 + sum (sqrt(a) - sqrt(b))^2 over the eigenvalues."""
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.normal(size=(12, 12)))[0]
    a, b = generator.uniform(0, 5, (2, 12))
    a[:3], b[2:5] = 0, 0
    mean = generator.normal(size=(2, 12))
    expected = ((mean[0] - mean[1]) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(mean[0], basis * a @ basis.T, mean[1], basis * b @ basis.T)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("d", [2, 17, 60])
def test_equals_the_matrix_square_root(d):
    (m1, s1), (m2, s2) = gaussian(1, d), gaussian(2, d)
    root = scipy.linalg.sqrtm(s1 @ s2)
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * np.real(root))
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-9)


def test_equals_the_eigenvalues_of_the_symmetric_form():
    (m1, s1), (m2, s2) = gaussian(3, 20), gaussian(4, 20, rank=7)
    root = scipy.linalg.sqrtm(s1).real
    eigenvalues = np.linalg.eigvalsh(root @ s2 @ root).clip(0)
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.sqrt(eigenvalues).sum()
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-6)


def test_a_singular_covariance_is_exactly_at_no_distance_from_itself():
    mean, covariance = gaussian(5, 300, rank=40)
    assert frechet_distance(mean, covariance, mean, covariance) < 1e-9


def test_equal_gaussians_and_a_shift():
    """Equals are at 0 to 1e-6, and a shift adds its square, for standard deviations from 1e-3 to 10."""
    generator = np.random.default_rng(6)
    basis = np.linalg.qr(generator.normal(size=(200, 200)))[0]
    covariance = basis * np.geomspace(1e-6, 100, 200) @ basis.T
    mean, shift = generator.normal(size=(2, 200))
    assert frechet_distance(mean, covariance, mean, covariance) < 1e-6
    assert frechet_distance(mean + shift, covariance, mean, covariance) == pytest.approx(shift @ shift, rel=1e-9)


def test_equals_torch_fidelity():
    import mmfm.infra.torchvision_ops  # noqa: F401  # isort: skip
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    from mmfm.data.moments import CovarianceMoments

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn((900, 64), generator=generator, dtype=torch.float64) * spread + 3 for spread in (1.0, 1.3))
    statistics = [fid_features_to_statistics(part) for part in (a, b)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    ours = [CovarianceMoments.zeros(64).update(part) for part in (a, b)]
    found = frechet_distance(ours[0].mean, ours[0].covariance(), ours[1].mean, ours[1].covariance())
    assert found == pytest.approx(expected, rel=1e-9) and found > 1


def test_full_rank_needs_no_eigenvectors(monkeypatch):
    """They take most of the time at 2048 dimensions."""
    (m1, s1), (m2, s2) = gaussian(1, 40), gaussian(2, 40)
    expected = frechet_distance(m1, s1, m2, s2)
    monkeypatch.delattr(torch.linalg, "eigh")
    assert frechet_distance(m1, s1, m2, s2) == expected


@pytest.mark.parametrize("missing", [1, 2, 150])
def test_a_missing_dimension_is_no_full_rank(missing):
    """Cholesky's last pivot is rounding there, of either sign; its root of 1e-8 must not enter the distance."""
    for seed in range(5):
        basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(200, 200)))[0]
        values = np.r_[np.zeros(missing), np.linspace(1, 2, 200 - missing)]
        whole = basis * np.linspace(1, 2, 200) @ basis.T
        expected = ((np.sqrt(values) - np.sqrt(np.linspace(1, 2, 200))) ** 2).sum()
        mean = np.zeros(200)
        assert frechet_distance(mean, basis * values @ basis.T, mean, whole) == pytest.approx(expected, abs=1e-10)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), d=st.integers(1, 12), data=st.data())
def test_it_is_a_symmetric_distance(seed, d, data):
    """Symmetric, not negative, 0 between equals, and its root obeys the triangle inequality, at any ranks."""
    a, b, c = (gaussian(3 * seed + i, d, data.draw(st.integers(1, 2 * d))) for i in range(3))
    ab, ba = frechet_distance(*a, *b), frechet_distance(*b, *a)
    assert ab == pytest.approx(ba, rel=1e-9, abs=1e-9)
    assert ab >= 0 and frechet_distance(*a, *a) < 1e-9
    assert np.sqrt(ab) <= np.sqrt(frechet_distance(*a, *c)) + np.sqrt(frechet_distance(*c, *b)) + 1e-6


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), d=st.integers(1, 10), scale=st.floats(1e-3, 1e3))
def test_rotation_shift_and_scale(seed, d, scale):
    """A rotation and a shift of both leave it as it is; a scale of the data multiplies it by the scale's square."""
    (m1, s1), (m2, s2) = gaussian(seed, d), gaussian(seed + 1, d)
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    expected = scale**2 * frechet_distance(m1, s1, m2, s2)
    found = frechet_distance(scale * q @ m1 + 1, scale**2 * q @ s1 @ q.T, scale * q @ m2 + 1, scale**2 * q @ s2 @ q.T)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9 * scale**2)


def test_accepts_tensors_of_lower_precision():
    (m1, s1), (m2, s2) = gaussian(7, 6), gaussian(8, 6)
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (m1, s1, m2, s2)]
    assert frechet_distance(*tensors) == pytest.approx(frechet_distance(m1, s1, m2, s2), rel=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m, s: (m, -s), "not a covariance"),
        (lambda m, s: (m, s + np.triu(np.ones_like(s), 1)), "asymmetry"),
        (lambda m, s: (m * np.nan, s), "NaN"),
        (lambda m, s: (m[1:], s[1:, 1:]), "the same D"),
    ],
)
def test_refuses_what_is_no_gaussian(change, message):
    mean, covariance = gaussian(9, 5)
    with pytest.raises(ValueError, match=message):
        frechet_distance(mean, covariance, *change(mean, covariance))


def test_rounding_of_float32_is_no_fault_and_more_than_that_is():
    """Asymmetry and negative eigenvalues of 1e-7 of the scale pass at any scale; those of 1e-5 do not."""
    mean, covariance = gaussian(11, 6, rank=4)
    values, vectors = np.linalg.eigh(covariance)
    for scale in (1e-6, 1.0, 1e6):
        for share, refused in ((1e-7, False), (1e-5, True)):
            askew = scale * covariance
            askew[0, 1] += share * np.abs(askew).max()
            below = scale * (covariance - share * values[-1] * np.outer(vectors[:, 0], vectors[:, 0]))
            for matrix in (askew, (below + below.T) / 2):
                if refused:
                    with pytest.raises(ValueError, match="is not a covariance"):
                        frechet_distance(mean, matrix, mean, scale * covariance)
                else:
                    assert frechet_distance(mean, matrix, mean, scale * covariance) < 1e-5 * scale
    assert frechet_distance(mean, np.zeros((6, 6)), mean, np.zeros((6, 6))) == 0
