"""Likelihoods of training and held-out tokens, and what their gap says."""

import numpy as np
import pytest
import torch

from mmfm.config.choices import COVARIANCES
from mmfm.evaluation.heldout import MeanLikelihood, gap_warnings, mean_likelihood
from mmfm.mixture.gaussian import Mixture


@pytest.fixture
def mixture() -> Mixture:
    return Mixture(np.array([0.3, 0.7]), np.array([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]]), np.full((2, 3), 0.5))


def tokens(n: int) -> torch.Tensor:
    return torch.randn((n, 3), generator=torch.Generator().manual_seed(0)) + 1


def test_mean_and_standard_error_do_not_depend_on_batches(mixture):
    values = mixture.log_prob(tokens(50)).numpy()
    for batch in (1, 7, 50):
        found = mean_likelihood(mixture, tokens(50).split(batch))
        assert found.mean == pytest.approx(values.mean(), rel=1e-12) and found.count == 50
        assert found.standard_error == pytest.approx(values.std(ddof=1) / 50**0.5, rel=1e-9)
    assert mean_likelihood(mixture, [tokens(1)]).standard_error == 0
    assert mean_likelihood(mixture, [tokens(2)]).standard_error > 0
    assert mean_likelihood(mixture, [tokens(50)]).mean == pytest.approx(mixture.score(tokens(50)), rel=1e-12)


def test_refuses_what_has_no_likelihood(mixture):
    with pytest.raises(ValueError, match=r"there are no tokens .* set data\.holdout"):
        mean_likelihood(mixture, [])
    with pytest.raises(ValueError, match=r"tokens are \(4, 2\), but the mixture has 3 dimensions"):
        mean_likelihood(mixture, [tokens(4)[:, :2]])
    with pytest.raises(ValueError, match="NaN or Inf"):
        mean_likelihood(mixture, [tokens(4) * torch.nan])


def test_a_gap_beyond_chance_and_few_images_are_named(mixture):
    training = MeanLikelihood(-5.0, 0.1, 1000)
    assert gap_warnings(mixture, training, MeanLikelihood(-5.4, 0.1, 100)) == []
    assert gap_warnings(mixture, training, MeanLikelihood(-4.0, 0.1, 100)) == []
    (line,) = gap_warnings(mixture, training, MeanLikelihood(-6.0, 0.1, 100))
    assert line.startswith("the mixture is 1.0 nats per image better on its training images")
    assert line.endswith(
        "it over-fits; fewer modes, gmm.shrinkage, or tied covariances (gmm.covariance_type) narrow the gap"
    )
    (line,) = gap_warnings(mixture, MeanLikelihood(-5.0, 0.1, 60), MeanLikelihood(-5.0, 0.1, 100))
    assert line.startswith("30 training images a mode are few for 3 dimensions")


@pytest.mark.parametrize("kind", COVARIANCES)
def test_the_remedy_is_possible_with_the_covariances(kind):
    """Shrinkage is refused for all but diag, and nothing is advised that is there already."""
    covariances = {"spherical": np.ones(2), "tied": np.eye(3), "full": np.stack([np.eye(3)] * 2)}
    mixture = Mixture(np.full(2, 0.5), np.zeros((2, 3)), covariances.get(kind, np.ones((2, 3))), kind)
    (line,) = gap_warnings(mixture, MeanLikelihood(-5.0, 0.1, 1000), MeanLikelihood(-6.0, 0.1, 100))
    assert "fewer modes" in line and f" {kind} " not in line.partition("over-fits")[2]
    assert ("gmm.shrinkage" in line) == (kind == "diag")
