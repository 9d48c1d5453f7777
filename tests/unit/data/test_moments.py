"""Exact moments against NumPy in extended circumstances: large offsets, any cutting, any order of merging."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from mmfm.data.moments import CovarianceMoments, Moments


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=5), offset=st.sampled_from([0.0, 1e4, -3e6]))
def test_any_cutting_gives_numpys_moments(cuts, offset):
    data = np.random.default_rng(0).normal(offset, 2.0, (60, 3, 2))
    moments = Moments.zeros((3, 2))
    for part in np.split(data, sorted(cuts)):
        moments.update(part)
    assert moments.count == 60
    np.testing.assert_allclose(moments.mean, data.mean(0), rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(moments.variance(), data.var(0), rtol=1e-8)
    np.testing.assert_allclose(moments.unbiased_variance(), data.var(0, ddof=1), rtol=1e-8)


def test_float32_data_with_a_large_mean_keeps_a_positive_variance():
    # E[x^2] - mean^2 in float32 gives a negative variance here.
    data = (1e4 + np.random.default_rng(1).normal(0, 1e-2, (5000, 4))).astype(np.float32)
    moments = Moments.zeros((4,)).update(torch.from_numpy(data))
    np.testing.assert_allclose(moments.variance(), data.astype(np.float64).var(0), rtol=1e-10)


def test_merging_is_the_same_as_updating_and_leaves_the_other_alone():
    data = np.random.default_rng(2).normal(5, 1, (40, 7))
    parts = [CovarianceMoments.zeros(7).update(part) for part in np.split(data, [3, 4, 25])]
    before = parts[1].mean.clone()
    merged = CovarianceMoments.zeros(7)
    for part in parts:
        merged.merge(part)
    np.testing.assert_allclose(merged.covariance(), np.cov(data.T), rtol=1e-12)
    np.testing.assert_allclose(merged.variance(), data.var(0), rtol=1e-12)
    np.testing.assert_allclose(merged.unbiased_variance(), data.var(0, ddof=1), rtol=1e-12)
    assert torch.equal(parts[1].mean, before)
    assert torch.equal(merged.covariance(), merged.covariance().T)


def test_an_update_leaves_the_batch_alone():
    batch = torch.full((3, 2), 2.0, dtype=torch.float64)
    Moments.zeros((2,)).update(batch)
    CovarianceMoments.zeros(2).update(batch)
    assert torch.equal(batch, torch.full((3, 2), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("empty", [Moments.zeros((4,)), CovarianceMoments.zeros(4)])
def test_serialisation_round_trip(empty):
    moments = empty.update(np.random.default_rng(3).normal(size=(9, 4)))
    again = type(moments).from_arrays(load(save(moments.to_arrays())))
    assert again.count == 9
    assert torch.equal(again.mean, moments.mean)
    assert torch.equal(again.m2, moments.m2)


def test_too_little_data_and_wrong_shapes_are_refused():
    moments = Moments.zeros((2,)).update(np.zeros((0, 2)))
    with pytest.raises(ValueError, match="0 rows seen, 1 needed"):
        moments.variance()
    with pytest.raises(ValueError, match="1 rows seen, 2 needed"):
        CovarianceMoments.zeros(2).update(np.zeros((1, 2))).covariance()
    with pytest.raises(ValueError, match=r"rows have shape \(3,\), but the moments so far have \(2,\)"):
        moments.update(np.zeros((5, 3)))


def test_two_rows_are_enough_for_a_covariance_and_one_is_not():
    rows = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    moments, one = CovarianceMoments.zeros(2).update(rows), CovarianceMoments.zeros(2).update(rows[:1])
    np.testing.assert_allclose(moments.covariance(), np.cov(rows.numpy(), rowvar=False))
    np.testing.assert_allclose(moments.unbiased_variance(), [2, 8])
    for wanted in (one.covariance, one.unbiased_variance):
        with pytest.raises(ValueError, match="1 rows seen, 2 needed"):
            wanted()
