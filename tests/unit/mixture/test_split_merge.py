"""Clusters that are merged and split: what it is worth, and which moves are made."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from mmfm.mixture import kmeans, split_merge
from mmfm.mixture.moments import hard_moments
from mmfm.mixture.split_merge import SHRINKAGE, ClusterMoments, redistribute
from mmfm.mixture.streaming import Rows
from support.mixtures import ALONE, clustered


def rows_of(data, block_rows=512):
    return Rows(lambda a, b: data[a:b], len(data), 64, ALONE, block_rows=block_rows)


def clusters_of(data, labels, k):
    rows, centres = rows_of(data), torch.from_numpy(np.stack([data[labels == i].mean(0) for i in range(k)]))
    return ClusterMoments(hard_moments(rows, centres, torch.from_numpy(labels.astype(np.int32)), "diag"), len(data))


def brute_force(data, labels, pool):
    """Log-likelihood of every cluster by its definition, without the constants that no move changes."""
    found = []
    for k in range(labels.max() + 1):
        own = data[labels == k].astype(np.float64)
        variance = (len(own) * own.var(0) + SHRINKAGE * pool) / (len(own) + SHRINKAGE)
        density = norm(own.mean(0), np.sqrt(variance)).logpdf(own).sum() + 0.5 * own.size * np.log(2 * np.pi)
        found.append(density + len(own) * np.log(len(own) / len(data)))
    return np.array(found)


def test_the_likelihood_of_clusters_follows_from_their_moments():
    data = clustered(300, c=4, k=6, offset=30.0)
    labels = np.arange(300) % 6
    clusters = clusters_of(data, labels, 6)
    found = clusters.classification_likelihood(clusters.count, clusters.variances)
    np.testing.assert_allclose(found, brute_force(data, labels, clusters.pool.numpy()), rtol=1e-9)


def test_the_cheapest_merge_is_that_of_all_pairs():
    data = clustered(300, c=3, k=8, offset=10.0)
    labels = np.arange(300) % 8
    labels[:150] = np.minimum(labels[:150], 5)
    clusters = clusters_of(data, labels, 8)
    apart = brute_force(data, labels, clusters.pool.numpy())
    partners, losses = clusters.cheapest_merges()
    for i in range(8):
        every = {}
        for j in set(range(8)) - {i}:
            merged = np.where(labels == i, j, labels)
            merged = np.unique(merged, return_inverse=True)[1]
            every[j] = apart.sum() - brute_force(data, merged, clusters.pool.numpy()).sum()
        best = min(every, key=every.get)
        assert int(partners[i]) == best
        assert float(losses[i]) == pytest.approx(every[best], rel=1e-6)


def test_clusters_that_choose_each_other_cost_the_same():
    data = clustered(900, c=5, k=12, offset=10.0)
    partners, losses = clusters_of(data, np.arange(900) % 12, 12).cheapest_merges()
    mutual = [i for i in range(12) if partners[partners[i]] == i]
    assert mutual and all(losses[i] == losses[partners[i]] for i in mutual)


def test_a_cluster_moves_to_where_one_is_missing():
    data = clustered(1000, c=4, k=5, spread=30.0)
    truth = np.random.default_rng(0)  # as in `clustered`
    truth.normal(0.0, 30.0, (5, 4)), truth.uniform(0.5, 1.5, (5, 4))
    labels = truth.integers(5, size=1000)
    own = [data[labels == k] for k in range(5)]
    # Two centres share a cluster, and one has two clusters: no step of Lloyd's algorithm leads out of this.
    centres = np.stack(
        [own[0][:9].mean(0), own[0][9:].mean(0), np.vstack(own[1:3]).mean(0), *[o.mean(0) for o in own[3:]]]
    )
    rows, centres = rows_of(data), torch.from_numpy(centres)
    winners = kmeans.nearest_centre(rows, centres)
    new, winners, moves = redistribute(rows, centres, winners)
    assert moves == 1
    found = winners.numpy()
    for k in range(5):
        assert len(np.unique(found[labels == k])) == 1
        np.testing.assert_allclose(new[found[labels == k][0]], own[k].mean(0), rtol=1e-4, atol=1e-4)
    assert redistribute(rows, new, torch.from_numpy(found))[2] == 0


def test_moves_pay_and_touch_no_cluster_twice():
    moves = split_merge._moves([5.0, 9.0, 1.0, 8.0, 0.5, 0.1], [3.0, 2.0, 1.0, 9.0, 1.5, 6.0], [2, 0, 4, 1, 2, 3])
    assert moves == [(1, 2, 4)]  # cluster 3 could be split, but the next merge, of 1 and 0, meets 1 again
    touched = [cluster for move in moves for cluster in move]
    assert len(touched) == len(set(touched))
    assert split_merge._moves([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [1, 2, 0]) == []


@given(
    seed=st.integers(0, 10**6), k=st.integers(1, 12), n=st.integers(12, 60), c=st.integers(1, 4),
    shape=st.sampled_from(["apart", "constant", "equal", "pairs"]),
)  # fmt: skip
def test_any_data_keep_their_rows_in_finite_clusters(seed, k, n, c, shape):
    data = clustered(n, c, 3, seed=seed)
    if shape == "constant":
        data[:, 0] = 7.0
    elif shape == "equal":
        data[:] = data[0]
    elif shape == "pairs":
        data[1::2] = data[: len(data[1::2]) * 2 : 2]
    centres, winners = kmeans.lloyd(rows_of(data, block_rows=64), torch.from_numpy(data[:k].copy()))
    assert centres.shape == (k, c) and centres.isfinite().all()
    assert winners.shape == (n,) and int(winners.min()) >= 0 and int(winners.max()) < k


def test_a_start_ends_better_than_plain_lloyd(monkeypatch):
    data = clustered(3000, c=8, k=40, spread=4.0, seed=3)
    rows, seeds = rows_of(data, block_rows=2048), torch.from_numpy(data[:40])
    costs = []
    for rounds in (0, kmeans.ROUNDS):
        monkeypatch.setattr(kmeans, "ROUNDS", rounds)
        centres, winners = kmeans.lloyd(rows, seeds)
        costs.append(float((torch.from_numpy(data) - centres[winners.long()]).square().sum(1).mean()))
    assert costs[1] < 0.9 * costs[0]


def test_three_clusters_are_enough_for_a_move():
    """Two centres share a lump, the third has two lumps; of two clusters none can be merged and another split."""
    lumps = np.random.default_rng(0).normal(size=(3, 60, 2))
    lumps[1, :, 0] += 40
    lumps[2, :, 1] += 40
    data = lumps.reshape(180, 2).astype(np.float32)
    labels = np.repeat([0, 1, 2, 2], [30, 30, 60, 60]).astype(np.int32)
    centres = torch.from_numpy(np.stack([data[labels == k].mean(0) for k in range(3)]))
    new, winners, moves = redistribute(rows_of(data), centres, torch.from_numpy(labels))
    assert moves == 1
    for i in range(3):
        (k,) = winners[60 * i : 60 * i + 60].unique()
        np.testing.assert_allclose(new[int(k)], lumps[i].mean(0), rtol=1e-4, atol=1e-4)
    two, _, moves = redistribute(rows_of(data), centres[1:], torch.from_numpy(labels.clip(1) - 1))
    assert moves == 0 and torch.equal(two, centres[1:])


def test_a_cluster_is_halved_across_its_widest_axis():
    data = np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)
    data[:, 3] += np.where(np.arange(400) < 150, -9, 9)
    labels = np.zeros(400, np.int32)
    halves, sides = split_merge._halve(rows_of(data), clusters_of(data, labels, 1), torch.from_numpy(labels))
    assert len(sides[:150].unique()) == len(sides[150:].unique()) == 1 and sides[0] != sides[-1]
    for row in (0, -1):
        own = data[sides.numpy() == int(sides[row])]
        np.testing.assert_allclose(halves[int(sides[row])], own.mean(0), rtol=1e-4, atol=1e-4)
