"""The kernel distance against the definition and torch-fidelity."""

import numpy as np
import pytest
import torch

from mmfm.evaluation import kid
from mmfm.evaluation.kid import kernel_distance


def features(seed: int, n: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (n, 16)).astype(np.float32)


def test_equals_torch_fidelity_in_double_precision():
    import mmfm.infra.torchvision_ops  # noqa: F401  # isort: skip
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = features(0, 300, 0.3), features(1, 250)
    exact = [torch.from_numpy(part).double() for part in (a, b)]
    expected = kid_features_to_metric(*exact, kid_subsets=20, kid_subset_size=100, rng_seed=2020, verbose=False)
    mean, deviation = kernel_distance(a, b, 20, 100)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)
    assert mean > 3 * deviation > 0
    assert kernel_distance(torch.from_numpy(a), torch.from_numpy(b), 20, 100) == (mean, deviation)


def test_the_defaults_are_torch_fidelitys():
    from torch_fidelity.defaults import DEFAULTS

    assert (
        DEFAULTS["kid_subsets"], DEFAULTS["kid_subset_size"], DEFAULTS["rng_seed"],
    ) == (kid.SUBSETS, kid.SUBSET_SIZE, kid.SEED)  # fmt: skip


def test_equals_the_definition_on_whole_sets():
    a, b = features(2, 40, 0.5), features(3, 40)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x.astype(np.float64) @ y) / 16 + 1) ** 3

    within = sum(kernel(s[i], s[j]) for s in (a, b) for i in range(40) for j in range(40) if i != j) / (40 * 39)
    between = sum(kernel(x, y) for x in a for y in b) / 40**2
    assert kernel_distance(a, b, 3, 40) == (pytest.approx(within - 2 * between, rel=1e-9), pytest.approx(0, abs=1e-9))


def test_equal_distributions_are_at_no_distance_on_average():
    """Unbiased: within three standard errors of 0, whereas the biased estimate is far above."""
    a, b = features(4, 2000), features(5, 2000)
    mean, deviation = kernel_distance(a, b, 50, 100)
    assert abs(mean) < 3 * deviation / 50**0.5
    assert kernel_distance(a + np.float32(0.5), b, 50, 100)[0] > 10 * deviation


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a, b: (a * np.nan, b), "generated images contain NaN"),
        (lambda a, b: (a, b * 0), "real images are all equal"),
        (lambda a, b: (a[:99], b), "subsets of 100 images, but there are 99 generated and 200 real"),
        (lambda a, b: (a, b[:, :8]), "16 features and real ones 8"),
    ],
)
def test_refuses_what_has_no_distance(change, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(*change(features(6, 200), features(7, 200)), subsets=2, subset_size=100)
