"""How modes are judged by the images generated from them."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom

from mmfm.evaluation import mode_quality
from mmfm.evaluation.mode_quality import MIN_IMAGES, ModeQuality, Placed, Real, limits, log_joint, place, place_real
from mmfm.mixture.gaussian import Mixture

K, C = 5, 3


def mixture(kind: str = "diag", spread: float = 1.0) -> Mixture:
    """Return a mixture whose modes overlap; the closer, the smaller ``spread``."""
    draw = np.random.default_rng(3)
    factors = draw.normal(size=(K, C, C))
    full = factors @ factors.transpose(0, 2, 1) + np.eye(C)
    variances = {
        "full": full,
        "tied": full[0],
        "diag": full.diagonal(0, 1, 2).copy(),
        "spherical": full[:, 0, 0].copy(),
    }
    return Mixture(np.array([0.1, 0.4, 0.2, 0.25, 0.05]), spread * draw.normal(size=(K, C)), variances[kind], kind)


def quality(
    n: list[int], returned: list[int], distance: list[float] | None = None, expected: float = 0.9
) -> ModeQuality:
    k = len(n)
    ones, distances = np.ones(k), np.ones(k) if distance is None else np.array(distance)
    return ModeQuality(
        np.array(n), np.array(returned), distances, ones, expected, ones.astype(int), ones, ones, ones / k
    )


@pytest.mark.parametrize("kind", ["diag", "spherical", "tied", "full"])
def test_distances_are_those_of_the_modes_own_covariance(kind):
    """Against the definition; the modes are given, or the likeliest."""
    model = mixture(kind)
    x = torch.from_numpy(np.random.default_rng(4).normal(size=(40, C))).float()
    modes = torch.arange(40) % K
    covariances = {
        "full": lambda k: model.variances[k],
        "tied": lambda k: model.variances,
        "diag": lambda k: torch.diag(model.variances[k]),
        "spherical": lambda k: model.variances[k] * torch.eye(C).double(),
    }[kind]
    likeliest = model.predict(x)
    for given, own in ((modes, modes), (None, likeliest)):
        found = place(model, log_joint(model, x), given)
        np.testing.assert_array_equal(found.nearest, likeliest)
        for i, k in enumerate(own.tolist()):
            off = x[i].double() - model.means[k]
            expected = float(off @ torch.linalg.solve(covariances(k), off)) / C
            assert found.distance[i] == pytest.approx(expected, rel=1e-9)


def test_tokens_of_another_encoder_are_refused():
    with pytest.raises(ValueError, match=r"tokens have 4 dimensions, the mixture 3"):
        log_joint(mixture(), torch.zeros(2, 4))


def test_limits_are_clopper_and_pearsons_and_hold_for_any_share():
    n = np.arange(1, 16)
    for size in n:
        hits = np.arange(size + 1)
        low, high = limits(hits, np.full(size + 1, size))
        assert (low[0], high[-1]) == (0, 1)
        np.testing.assert_allclose(low[1:], beta.ppf(0.025, hits[1:], size - hits[1:] + 1))
        np.testing.assert_allclose(high[:-1], beta.ppf(0.975, hits[:-1] + 1, size - hits[:-1]))
        for share in np.linspace(0.05, 0.95, 19):
            assert binom.pmf(hits[high < share], size, share).sum() <= 0.025
            assert binom.pmf(hits[low > share], size, share).sum() <= 0.025
    assert limits(np.array([0]), np.array([0])) == (0, 1)


def test_a_perfect_flow_returns_as_often_as_expected():
    """Real images x of mode k, drawn as training pairs them: x from the data, then k from its posterior."""
    model, draw = mixture(spread=0.7), np.random.default_rng(5)
    data, _ = model.sample(30_000, seed=6)
    x, decoded = data.float(), (data + 0.4 * torch.from_numpy(draw.normal(size=data.shape))).float()
    real, posteriors = place_real(model, log_joint(model, x), log_joint(model, decoded))
    modes = torch.multinomial(model.posterior(x, torch.float64), 1, generator=torch.Generator().manual_seed(7)).squeeze(
        1
    )
    generated = place(model, log_joint(model, decoded), modes)
    found = ModeQuality.of(model.weights.numpy(), modes.numpy(), generated, real, posteriors)
    np.testing.assert_allclose(found.share, found.expected, atol=0.03)
    assert found.summary()["share"] == pytest.approx(found.expected_of_all, abs=0.01)
    assert 0.3 < found.expected_of_all < 0.8, "modes overlap and decoding loses something, or the test shows nothing"
    assert found.expected_of_all < (real.decoded.nearest == real.original.nearest).mean(), (
        "posteriors are not clear-cut"
    )
    assert found.summary()["chance"] == pytest.approx(0.1**2 + 0.4**2 + 0.2**2 + 0.25**2 + 0.05**2)


def test_images_are_counted_by_the_mode_that_they_started_from():
    modes, nearest = np.array([0, 0, 0, 2, 2]), np.array([0, 1, 0, 2, 0])
    real = Real(
        Placed(np.array([0, 0, 1]), np.array([1.0, 3.0, 5.0])), Placed(np.array([0, 1, 1]), np.array([2.0, 4.0, 9.0])),
        np.array([0.9, 0.2, 0.7]),
    )  # fmt: skip
    generated = Placed(nearest, np.array([1.0, 2.0, 6.0, 4.0, 8.0]))
    found = ModeQuality.of(np.array([0.5, 0.3, 0.2]), modes, generated, real, np.array([1.8, 1.1, 0.1]))
    assert found.n.tolist() == [3, 0, 2] and found.returned.tolist() == [2, 0, 1]
    np.testing.assert_allclose(found.distance, [3.0, np.nan, 6.0])
    np.testing.assert_allclose(found.expected, [0.9 / 1.8, 0.9 / 1.1, np.nan])
    assert found.expected_of_all == pytest.approx(0.6) and found.n_real.tolist() == [2, 1, 0]
    np.testing.assert_allclose(found.real_distance, [2.0, 5.0, np.nan])
    np.testing.assert_allclose(found.decoded_distance, [3.0, 9.0, np.nan])
    total = found.summary()
    assert (total["returned"], total["share"], total["distance"]) == (3, 0.6, pytest.approx(21 / 5))
    assert total["modes_without_images"] == 1 and total["ranked_modes"] == 0
    columns = json.loads(json.dumps(found.columns(), allow_nan=False))
    assert columns["share"] == [0.666667, None, 0.5] and columns["shortfall"] == [None] * 3
    assert columns["share_high"][1] is None and columns["expected"][2] is None


def test_few_images_make_no_mode_bad():
    """More images that stray rank worse, and below the minimum none does; ties go by distance."""
    found = quality([MIN_IMAGES - 1, 15, 6, 6, 40, 6], [0, 0, 0, 0, 36, 5], [9.0, 2.0, 3.0, 4.0, 1.0, 1.0])
    assert found.ranking().tolist() == [1, 3, 2, 4, 5]
    assert np.isnan(found.shortfall[0])
    assert (found.shortfall > 0).tolist() == [False, True, True, True, False, False]
    assert found.summary()["poor_modes"] == 3
    assert limits(np.array([0]), np.array([6]))[1] == pytest.approx(0.459, abs=1e-3), "as docs/metrics.md says"
    assert limits(np.array([0]), np.array([15]))[1] == pytest.approx(0.218, abs=1e-3)


def test_modes_that_are_as_expected_are_hardly_ever_poor():
    """With six images a mode, and shares of the best and the worst kind."""
    for share in (0.3, 0.68, 0.99):
        n = np.full(8192, 6)
        hits = np.random.default_rng(8).binomial(n, share)
        found = quality(n.tolist(), hits.tolist(), expected=share)
        assert (
            found.summary()["poor_modes"]
            <= 1.2 * found.summary()["poor_by_chance"]
            == pytest.approx(1.2 * 0.025 * 8192)
        )
    assert mode_quality.CONFIDENCE == 0.975
