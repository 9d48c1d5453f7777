"""Mixture densities, posteriors and draws against SciPy and scikit-learn."""

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from sklearn.mixture import GaussianMixture

from mmfm.config.choices import COVARIANCES
from mmfm.infra import rng
from mmfm.mixture.gaussian import Mixture, draw_from_weights, draw_modes


def random_mixture(seed=0, k=5, c=4, covariance_type="diag", spread=1.0, offset=0.0):
    generator = np.random.default_rng(seed)
    weights, means = generator.dirichlet(np.ones(k)), generator.normal(offset, spread, (k, c))
    if covariance_type in ("diag", "spherical"):
        variances = generator.uniform(0.1, 2.0, (k, c) if covariance_type == "diag" else (k,))
    else:
        factors = generator.normal(size=(k, c, c))
        variances = factors @ factors.swapaxes(1, 2) + 0.2 * np.eye(c)
        variances = variances[0] if covariance_type == "tied" else variances
    return Mixture(weights, means, variances, covariance_type)


def covariance_of(mixture, k):
    """Covariance (c, c) of a component."""
    if mixture.covariance_type in ("diag", "spherical"):
        return np.diag(np.broadcast_to(mixture.variances[k].numpy(), (mixture.dimension,)))
    return (mixture.variances if mixture.covariance_type == "tied" else mixture.variances[k]).numpy()


def scipy_log_joint(mixture, x):
    columns = []
    for k in range(mixture.n_components):
        covariance = covariance_of(mixture, k)
        density = stats.multivariate_normal.logpdf(x, mixture.means[k].numpy(), covariance)
        columns.append(np.log(mixture.weights[k].item()) + np.atleast_1d(density))
    return np.stack(columns, 1)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 6),
    c=st.integers(1, 5),
    covariance_type=st.sampled_from(list(COVARIANCES)),
    offset=st.sampled_from([0.0, -50.0, 1e4]),
)
def test_densities_match_scipy(seed, k, c, covariance_type, offset):
    mixture = random_mixture(seed, k, c, covariance_type, offset=offset)
    x = np.random.default_rng(seed + 1).normal(offset, 2.0, (7, c))
    expected = scipy_log_joint(mixture, x)
    np.testing.assert_allclose(mixture.log_joint(torch.from_numpy(x)), expected, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(mixture.log_prob(torch.from_numpy(x)), special.logsumexp(expected, 1), rtol=1e-7)
    proba = mixture.predict_proba(torch.from_numpy(x))
    np.testing.assert_allclose(proba, special.softmax(expected, 1), atol=1e-7)
    assert torch.equal(mixture.predict(torch.from_numpy(x)), proba.argmax(1))


@pytest.mark.parametrize("covariance_type", ["diag", "spherical"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_posterior_matches_scikit_learn_at_width_768(covariance_type, dtype, tolerance):
    # Tokens off the origin by 20 standard deviations: without centring, float32 would be off by whole nats.
    generator = np.random.default_rng(0)
    means = 20 + 0.08 * generator.normal(size=(200, 768))
    tokens = (means[generator.integers(200, size=300)] + generator.normal(size=(300, 768))).astype(np.float32)
    variances = generator.uniform(0.8, 1.2, (200, 768) if covariance_type == "diag" else 200)
    mixture = Mixture(np.full(200, 1 / 200), means, variances)
    expected = mixture.to_sklearn().predict_proba(tokens.astype(np.float64))
    assert 0.2 < expected.max(1).mean() < 0.95  # soft, so that errors show
    error = np.abs(mixture.posterior(torch.from_numpy(tokens), dtype).numpy() - expected).max()
    assert error < tolerance


def test_posterior_ignores_autocast_and_low_precision_and_restores_it():
    mixture, x = random_mixture(k=8, c=64, spread=0.3), torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    expected = mixture.posterior(x)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(mixture.posterior(x), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_scikit_learn_round_trip(covariance_type):
    data = np.random.default_rng(0).normal(size=(200, 3))
    model = GaussianMixture(4, covariance_type=covariance_type, random_state=0).fit(data)
    mixture = Mixture.from_sklearn(model)
    x = torch.from_numpy(data)
    assert mixture.n_parameters == model._n_parameters()
    assert mixture.score(x) == pytest.approx(model.score(data), rel=1e-9)
    assert mixture.bic(x) == pytest.approx(model.bic(data), rel=1e-9)
    assert mixture.aic(x) == pytest.approx(model.aic(data), rel=1e-9)
    np.testing.assert_allclose(mixture.posterior(x.float()), model.predict_proba(data), atol=1e-4)
    np.testing.assert_allclose(mixture.predict_proba(torch.from_numpy(data)), model.predict_proba(data), atol=1e-9)
    np.testing.assert_allclose(mixture.to_sklearn().predict_proba(data), model.predict_proba(data), atol=1e-12)


@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_file_round_trip(tmp_path, covariance_type):
    mixture = random_mixture(covariance_type=covariance_type)
    digest = mixture.save(tmp_path / "gmm.safetensors", {"listing_digest": "abc"})
    again = Mixture.load(tmp_path / "gmm.safetensors")
    for name in ("weights", "means", "variances"):
        assert torch.equal(getattr(again, name), getattr(mixture, name))
    assert again.covariance_type == covariance_type
    assert (again.metadata["digest"], again.metadata["listing_digest"]) == (digest, "abc")


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "gmm.safetensors"
    random_mixture().save(path, {})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="truncated"):
        Mixture.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variances": np.array([[1.0, 1.0], [1.0, 0.0]])}, "component 1 .* not positive"),
        ({"variances": np.ones((2, 2)), "weights": np.array([0.5, 0.6])}, "sum to 1.1"),
        ({"variances": np.ones((2, 3))}, "can't have"),
        ({"variances": np.stack([np.eye(2), -np.eye(2)]), "covariance_type": "full"}, "component 1 .* not positive"),
        ({"variances": np.ones((2, 2)), "covariance_type": "round"}, "must be one of diag, spherical, tied, full"),
    ],
)
def test_impossible_mixtures_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**{"weights": np.array([0.5, 0.5]), "means": np.zeros((2, 2)), **change})


@settings(max_examples=50, deadline=None)
@given(
    p=st.lists(st.sampled_from([0.0, 1e-30, 0.1, 0.25, 1.0, 3.0]), min_size=1, max_size=6).filter(sum),
    u=st.sampled_from([1e-17, 0.1, 0.25, 0.5, 0.999, 1 - 2**-53, 1.0]),
)
def test_draws_invert_the_cdf_and_never_meet_probability_zero(p, u):
    posterior, uniforms = torch.tensor([p], dtype=torch.float64), torch.tensor([u], dtype=torch.float64)
    mode = draw_modes(posterior, uniforms)
    cdf = np.cumsum(p)
    assert p[mode] > 0
    assert mode == draw_from_weights(posterior[0], uniforms)
    if u < 1 - 1e-10:
        assert (cdf[mode] - p[mode]) / cdf[-1] - 1e-12 <= u <= cdf[mode] / cdf[-1] + 1e-12


def test_draws_have_the_right_frequencies():
    p = torch.tensor([0.05, 0.0, 0.6, 0.35])
    uniforms = rng.uniform(0, "test", torch.arange(20000))
    for modes in (draw_modes(p.expand(20000, 4), uniforms), draw_from_weights(p, uniforms)):
        frequency = torch.bincount(modes, minlength=4) / 20000
        assert (frequency - p).abs().max() < 0.012


@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_samples_have_the_mixtures_moments_and_are_keyed_by_number(covariance_type):
    mixture = random_mixture(seed=3, k=3, c=2, covariance_type=covariance_type)
    x, modes = mixture.sample(20000, seed=7)
    for k in range(3):
        own = x[modes == k]
        variance = mixture.diagonal()[k]
        assert ((own.mean(0) - mixture.means[k]).abs() < 5 * (variance / len(own)).sqrt()).all()
        assert ((own.var(0) / variance - 1).abs() < 5 * (2 / len(own)) ** 0.5).all()
        scale = np.sqrt(np.outer(variance, variance) * 2 / len(own))
        assert (np.abs(np.cov(own.T) - covariance_of(mixture, k)) < 5 * scale).all()
    later, later_modes = mixture.sample(10, seed=7, first=500)
    assert torch.equal(later, x[500:510])
    assert torch.equal(later_modes, modes[500:510])


@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_a_mixture_that_nobody_holds_is_gone_at_once(covariance_type):
    """A fit makes one an iteration, with its tables: those of the last must not wait for the garbage collector."""
    mixture = random_mixture(0, 4, 3, covariance_type)
    for dtype in (torch.float32, torch.float64):
        mixture.log_joint(torch.zeros(2, 3), dtype)
    held = weakref.ref(mixture)
    gc.disable()
    try:
        del mixture
        assert held() is None
    finally:
        gc.enable()
