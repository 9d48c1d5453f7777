"""The Inception Score against closed cases, the formula, and torch-fidelity."""

import itertools
import math

import numpy as np
import pytest
import torch

from mmfm.evaluation.inception_score import InceptionScore, inception_score


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    """float32 (1000, 30): confident in some classes more than in others, in an order that matters to the splits."""
    generator = torch.Generator().manual_seed(0)
    return (
        3 * torch.randn((1000, 30), generator=generator) + torch.linspace(-2, 2, 1000)[:, None] * torch.arange(30) / 9
    )


def test_certain_and_equally_frequent_classes_score_their_number():
    assert inception_score(1000 * torch.eye(7).repeat(5, 1)) == (pytest.approx(7, rel=1e-12), 0)


def test_equal_images_score_1():
    assert inception_score(torch.randn(5).repeat(40, 1))[0] == pytest.approx(1, abs=1e-12)


def test_the_evaluators_formula(logits):
    """Splits of a fixed size; the last, smaller one counts as much as the others."""
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    scores = []
    for start in range(0, 1000, 300):
        part = p[start : start + 300]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    found = inception_score(logits, 300)
    assert found == (pytest.approx(np.mean(scores), rel=1e-12), pytest.approx(np.std(scores), rel=1e-9))
    assert np.std(scores) > 0.1


@pytest.mark.parametrize("splits", [1, 10])
def test_equals_torch_fidelity(logits, splits):
    import mmfm.infra.torchvision_ops  # noqa: F401  # isort: skip
    from torch_fidelity.metric_isc import isc_features_to_metric

    expected = isc_features_to_metric(logits, splits, shuffle=False)
    mean, deviation = inception_score(logits, 1000 // splits)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert deviation == pytest.approx(expected["inception_score_std"], rel=1e-9, abs=1e-12)


def test_does_not_depend_on_batches_or_processes(logits):
    whole = inception_score(logits, 128)
    for batch in (1, 50, 128, 999):
        score = InceptionScore(split_size=128)
        for part in logits.split(batch):
            score.update(part)
        assert score.result() == pytest.approx(whole, rel=1e-12)
    for shares in (2, 3):
        starts = [1000 * i // shares for i in range(shares + 1)]
        parts = [InceptionScore(a, 128).update(logits[a:b]) for a, b in itertools.pairwise(starts)]
        merged = parts[0]
        for part in parts[1:]:
            merged.merge(part)
        assert merged.result() == pytest.approx(whole, rel=1e-12)


def test_a_probability_that_rounds_to_zero_counts_as_zero():
    assert math.isfinite(inception_score(torch.tensor([[1e4, 0.0], [1e4, 1.0]]))[0])


def test_refuses_what_has_no_score(logits):
    with pytest.raises(ValueError, match="NaN or Inf"):
        inception_score(logits * torch.inf)
    with pytest.raises(ValueError, match=r"\(30,\), but they must be \(images, classes\)"):
        inception_score(logits[0])
    with pytest.raises(ValueError, match="there are none"):
        inception_score(logits[:0])
    with pytest.raises(ValueError, match="splits have 10 and 20 images"):
        InceptionScore(0, 10).merge(InceptionScore(10, 20))
