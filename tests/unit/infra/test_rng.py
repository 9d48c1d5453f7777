"""Keyed random numbers: distribution, independence, and freedom from order."""

import numpy as np
import pytest
import torch
from scipy import stats

from mmfm.infra import rng


def test_a_draw_depends_on_its_index_alone():
    index = torch.arange(100)
    whole = rng.normal(3, "noise", index, (2, 5))
    parts = torch.cat([rng.normal(3, "noise", part, (2, 5)) for part in (index[:7], index[7:60], index[60:])])
    assert torch.equal(whole, parts)
    shuffled = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rng.normal(3, "noise", index[shuffled], (2, 5)), whole[shuffled])


def test_seeds_and_purposes_give_other_numbers():
    index = torch.arange(1000)
    draws = [rng.uniform(s, p, index) for s, p in ((0, "a"), (1, "a"), (0, "b"))]
    for i in range(3):
        for j in range(i):
            assert abs(np.corrcoef(draws[i], draws[j])[0, 1]) < 0.1


@pytest.mark.parametrize("shape", [(), (7,), (3, 4)])
def test_distributions(shape):
    index = torch.arange(20000)
    assert stats.kstest(rng.uniform(1, "u", index, shape).flatten(), "uniform").pvalue > 1e-3
    if shape:
        normal = rng.normal(1, "n", index, shape)
        assert normal.dtype == torch.float32 and normal.shape == (20000, *shape)
        assert stats.kstest(normal.flatten(), "norm").pvalue > 1e-3


def test_uniforms_are_never_0_or_1(monkeypatch):
    bits = torch.tensor([[0], [-1]])  # none set, all set
    monkeypatch.setattr(rng, "_bits", lambda *ignored: bits)
    smallest, largest = rng.uniform(0, "u", torch.arange(2))
    assert 0 < smallest < 1e-15 and 1 - 1e-15 < largest < 1


def test_columns_and_rows_are_uncorrelated():
    normal = rng.normal(5, "n", torch.arange(20000), (8,)).double()
    columns = torch.corrcoef(normal.T) - torch.eye(8)
    assert columns.abs().max() < 0.03
    neighbours = torch.corrcoef(torch.stack((normal[:-1, 0], normal[1:, 0])))[0, 1]
    assert abs(neighbours) < 0.03


def test_known_values_do_not_move():
    """Samples of a published run must stay the same in every later version."""
    normal = rng.normal(0, "noise", torch.tensor([0, 1]), (3,))
    expected = torch.tensor(KNOWN)
    assert torch.allclose(normal, expected, atol=1e-6)


KNOWN = [[-0.5771947, 0.164747, 0.5266878], [-0.6471529, -2.4513237, 0.0085251]]


def test_permutation_is_keyed():
    first = rng.permutation(0, "epoch", 0, 1000)
    assert torch.equal(first, rng.permutation(0, "epoch", 0, 1000))
    assert not torch.equal(first, rng.permutation(0, "epoch", 1, 1000))
    assert torch.equal(first.sort().values, torch.arange(1000))
