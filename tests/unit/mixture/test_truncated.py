"""Truncated E-steps, reseeding, and EM's own checks."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm.mixture import groups, reseeding
from mmfm.mixture.em import EMState, e_step, em_iterations
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.moments import SufficientStatistics
from mmfm.mixture.streaming import Rows
from mmfm.mixture.truncated import Truncation, candidate_table, exact_winners, measure_gap, neighbours, truncated_e_step
from mmfm.mixture.workspace import Workspace
from support.mixtures import (
    ALONE,
    SETTINGS,
    a_start,
    clustered,
    fit_tokens,
    result,
    run,
    store_of_tokens,  # noqa: F401 (fixtures)
    token_store,
)

MANY = dataclasses.replace(SETTINGS, n_components=40, e_step="truncated", max_iter=12)


def many_clusters(n=4000, k=40, c=8, **options):
    return clustered(n, c, k, spread=3.0, **options)


def fitted(data, k=40, iterations=3):
    rows = Rows(lambda a, b: data[a:b], len(data), 256, ALONE, block_rows=1024)
    return rows, run(data, a_start(data, k), iterations, 256).mixture


@pytest.mark.parametrize("covariance_type", ["diag", "spherical"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_candidates_and_no_dropped_mass_are_the_exact_e_step(covariance_type, dtype):
    data = clustered(offset=30.0)
    mixture = a_start(data, 5, covariance_type)
    rows = Rows(lambda a, b: data[a:b], len(data), 64, ALONE, block_rows=200)
    winners = exact_winners(rows, mixture, torch.float64)
    found, new = truncated_e_step(rows, mixture, winners, dtype, Truncation(candidates=5, mass=0.0))
    exact = e_step(rows, mixture, torch.float64)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    for name in ("count", "second", "log_likelihood"):
        expected = getattr(exact, name)
        if name == "second":  # about references that float32 rounded
            shift = found.means - exact.means
            expected = expected - 2 * shift * exact.first + exact.count[:, None] * shift**2
        if covariance_type == "spherical" and name == "second":
            expected, found.second = expected.mean(1), found.second.mean(1)
        np.testing.assert_allclose(getattr(found, name), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(new, winners)


def test_the_gap_is_small_measured_and_never_negative():
    data = many_clusters()
    rows, mixture = fitted(data)
    winners = exact_winners(rows, mixture, torch.float64)
    whole = Truncation(candidates=8, sample=len(data))
    statistics, _ = truncated_e_step(rows, mixture, winners, torch.float64, whole)
    exact = e_step(rows, mixture, torch.float64)
    gap = float(exact.log_likelihood - statistics.log_likelihood) / len(data)
    mean, _, images = measure_gap(rows, mixture, winners, whole, torch.float64)
    assert images == len(data)
    assert mean == pytest.approx(gap, rel=1e-6)
    assert 0 < gap < 0.1
    sampled, error, _ = measure_gap(rows, mixture, winners, Truncation(candidates=8, sample=400), torch.float64)
    assert 0 <= sampled < 20 * gap and error < 20 * gap
    assert Truncation(candidates=8).gap_limit(rows, mixture, winners, torch.float64) == pytest.approx(gap, rel=1e-6)
    more = measure_gap(rows, mixture, winners, Truncation(candidates=20, sample=len(data)), torch.float64)[0]
    assert more < gap


def test_winners_move_to_better_candidates_and_find_the_exact_ones():
    data = many_clusters()
    rows, mixture = fitted(data)
    exact = exact_winners(rows, mixture, torch.float64)
    winners = neighbours(mixture, 2)[exact.long(), 1].int()  # all wrong, but near
    shares = []
    for _ in range(4):
        winners = truncated_e_step(rows, mixture, winners, torch.float32, Truncation(candidates=12))[1]
        shares.append(float((winners == exact).double().mean()))
    assert shares == sorted(shares)
    assert shares[-1] > 0.9


def test_candidates_know_the_wide_neighbour():
    # A wide component far off is a better second choice than a narrow one nearby.
    means = np.array([[0.0, 0], [3.0, 0], [8.0, 0]])
    mixture = Mixture(np.full(3, 1 / 3), means, np.array([[1.0, 1], [0.05, 0.05], [30.0, 30]]))
    assert neighbours(mixture, 3).tolist()[0] == [0, 2, 1]
    assert neighbours(mixture, 9).shape == (3, 3)


def test_rows_left_behind_are_found_again():
    rows, start = fitted(many_clusters())
    wrong = neighbours(start, 40)[exact_winners(rows, start, torch.float64).long(), 39].int()  # the farthest one
    options = {"max_iter": 2, "tol": 0.0, "reg_covar": 1e-6, "dtype": torch.float64}
    found = []
    for winners, refresh in ((None, 100), (wrong, 1), (wrong, 100)):
        state = EMState(start, lower_bounds=(-1e9,), winners=winners)
        truncation = Truncation(candidates=4, refresh=refresh)
        found.append(next(em_iterations(rows, state, truncation=truncation, **options)).mixture.means)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("mass", [0.0, None])
def test_pieces_and_batches_of_groups_change_only_the_rounding(monkeypatch, mass):
    data = many_clusters(1500)
    rows, mixture = fitted(data)
    winners = exact_winners(rows, mixture, torch.float64)
    found = []
    for largest, numbers, flush in ((groups._GROUP_LIMIT, 1 << 22, groups._PENDING_LIMIT), (7, 500, 50)):
        monkeypatch.setattr(groups, "_GROUP_LIMIT", largest)
        monkeypatch.setitem(groups._BATCH_LIMIT, "cpu", numbers)
        monkeypatch.setattr(groups, "_PENDING_LIMIT", flush)
        table = candidate_table(mixture, Truncation(candidates=6), torch.float64)
        if mass is None:
            table = groups.CandidateTable(mixture.means, table.candidates, torch.float64)
        statistics, new = SufficientStatistics(table.means, "diag"), winners.clone()
        total = groups.grouped_pass(rows, table, new, statistics, mass)
        found.append((new, total, statistics.count, statistics.first, statistics.second))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-8)
    assert float(found[1][2].sum()) == pytest.approx(len(data))


@pytest.mark.parametrize("keep", [0, float("inf")])
def test_blocks_that_are_not_kept_give_the_same_bits(keep):
    data = many_clusters(1500)
    kept, mixture = fitted(data)
    rows = Rows(lambda a, b: data[a:b], len(data), 256, ALONE, keep, block_rows=1024)
    winners = exact_winners(kept, mixture, torch.float64)
    one, other = (truncated_e_step(r, mixture, winners, torch.float32, Truncation(6))[0] for r in (kept, rows))
    assert torch.equal(one.second, other.second) and torch.equal(one.log_likelihood, other.log_likelihood)


def test_a_truncated_fit_has_converged_only_when_all_rows_have_looked_around():
    data = many_clusters()
    rows, start = fitted(data, iterations=12)
    lost = exact_winners(rows, start, torch.float64)
    lost[::50] = neighbours(start, 40)[lost[::50].long(), 39].int()  # what a few rows lose hardly moves the bound
    options = {"max_iter": 60, "tol": 0.05, "reg_covar": 1e-6, "dtype": torch.float64}
    truncation = Truncation(candidates=4, refresh=100, sample=len(data))
    state = list(em_iterations(rows, EMState(start, winners=lost), truncation=truncation, **options))[-1]
    assert state.converged and state.n_iter < 30
    assert (state.winners == exact_winners(rows, state.mixture, torch.float64)).double().mean() > 0.995


def test_truncated_em_ends_where_exact_em_ends():
    data = many_clusters()
    rows, start = fitted(data, iterations=1)
    bounds = []
    for truncation in (None, Truncation(candidates=16)):
        options = {"max_iter": 40, "tol": 1e-3, "reg_covar": 1e-6, "dtype": torch.float32}
        state = list(em_iterations(rows, EMState(start), truncation=truncation, **options))[-1]
        bounds.append(float(e_step(rows, state.mixture, torch.float64).log_likelihood) / len(data))
    assert bounds[1] == pytest.approx(bounds[0], abs=0.02)


def test_the_truncated_stage_reports_its_gap_and_resumes(tmp_path):
    store = token_store(tmp_path / "cls_tokens.zarr", many_clusters(1024))
    summary = fit_tokens(store, MANY, tmp_path / "whole", ALONE)
    assert 0 <= summary["truncation_gap"]["nats_per_image"] < 0.2
    assert summary["log_likelihood"] >= summary["lower_bounds"][-1] - 1e-6
    fit_tokens(store, dataclasses.replace(MANY, max_iter=3), tmp_path / "parts", ALONE)
    fit_tokens(store, MANY, tmp_path / "parts", ALONE)
    assert result(tmp_path / "parts") == result(tmp_path / "whole")


def test_truncation_with_full_covariances_is_refused():
    from mmfm import config

    with pytest.raises(ValueError, match=r"gmm.e_step' truncated needs covariance_type diag or spherical, not full"):
        config.build(config.Gmm, dataclasses.asdict(MANY) | {"covariance_type": "full"}, "gmm")


# Reseeding


def dead_start(data):
    means = np.concatenate([data[:4], data[:1] + 1e4]).astype(np.float64)
    return Mixture(np.full(5, 0.2), means, np.ones_like(means))


@pytest.mark.parametrize("covariance_type", ["diag", "spherical", "tied", "full"])
def test_an_empty_component_is_given_half_of_the_largest(covariance_type):
    data = clustered(spread=8.0)
    start = a_start(data, 5, covariance_type)
    start = Mixture(start.weights, dead_start(data).means, start.variances, covariance_type)
    state = run(data, start, 12)
    assert state.reseeded[0] == 1 and sum(state.reseeded) <= reseeding.ROUNDS
    assert (state.mixture.weights > 0.01).all()
    rises = np.diff(state.lower_bounds)[[not moved for moved in state.reseeded[:-1]]]
    assert (rises > -1e-5).all()


def test_reseeding_is_counted_by_the_stage(tmp_path):
    data = clustered(512, spread=8.0)
    np.save(tmp_path / "means.npy", dead_start(data).means)
    chosen = dataclasses.replace(SETTINGS, init_means=str(tmp_path / "means.npy"))
    summary = fit_tokens(token_store(tmp_path / "cls_tokens.zarr", data), chosen, tmp_path / "gmm", ALONE)
    assert summary["reseeded_components"] >= 1
    assert summary["empty_components"] == 0


def test_the_same_components_are_moved_whatever_the_rounding():
    mixture = Mixture(np.full(4, 0.25), np.eye(4), np.ones((4, 4)))
    count = torch.tensor([30.0, 0.0, 30.0, 30.0], dtype=torch.float64)
    moved = [reseeding.reseed(mixture, count + e, 1e-6, 0)[0].means for e in (0, torch.tensor([0, 0, 1e-9, 2e-9]))]
    assert torch.equal(*moved)


@pytest.mark.parametrize(("rows", "moved"), [(0.0, 1), (0.49, 1), (0.5, 0), (0.51, 0), (1.0, 0)])
def test_less_than_half_a_row_is_an_empty_component(rows, moved):
    mixture = Mixture(np.full(3, 1 / 3), np.eye(3), np.ones((3, 3)))
    count = torch.tensor([30.0, rows, 20.0], dtype=torch.float64)
    reseeded, number = reseeding.reseed(mixture, count, 1e-6, 0)
    assert number == moved
    assert torch.equal(reseeded.means[1], mixture.means[1]) == (not moved)
    assert torch.equal(reseeded.means[2], mixture.means[2])


@pytest.mark.parametrize(("rows", "moved"), [(7.9, 0), (8.0, 1)])
def test_components_of_few_rows_are_not_split(rows, moved):
    mixture = Mixture(np.full(2, 1 / 2), np.eye(2), np.ones((2, 2)))
    assert reseeding.reseed(mixture, torch.tensor([rows, 0.0], dtype=torch.float64), 1e-6, 0)[1] == moved


def test_duplicates_are_not_split_and_reseeding_ends():
    data = np.repeat(clustered(3), 20, axis=0)
    means = np.concatenate([data[::20], data[:2] + 50]).astype(np.float64)
    state = run(data, Mixture(np.full(5, 0.2), means, np.ones((5, 6))), 8)
    assert sum(count > 0 for count in state.reseeded) <= reseeding.ROUNDS
    assert state.mixture.means.isfinite().all()


# What EM checks


def test_a_lower_bound_that_falls_is_an_error_naming_the_iteration():
    data = clustered()
    rows = Rows(lambda a, b: data[a:b], len(data), 64, ALONE)
    good = run(data, a_start(data, 5), 3)
    forged = dataclasses.replace(good, lower_bounds=(*good.lower_bounds[:-1], good.lower_bounds[-1] + 5))
    with pytest.raises(ValueError, match=r"EM iteration 4: the mean log-likelihood fell by .* nats"):
        list(em_iterations(rows, forged, max_iter=9, tol=0.0, reg_covar=1e-6, dtype=torch.float64))


@pytest.mark.parametrize("reg_covar", [1e-6, 0.3, 20.0])
@pytest.mark.parametrize("covariance_type", ["diag", "spherical", "tied", "full"])
def test_regularisation_explains_what_it_costs(reg_covar, covariance_type):
    # A regularisation of the data's own size makes the bound fall; no error may come of it.
    data = clustered(spread=3.0)
    bounds = run(data, a_start(data, 5, covariance_type), 15, reg_covar=reg_covar).lower_bounds
    assert np.isfinite(bounds).all()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6), k=st.integers(1, 12), c=st.integers(1, 6), n=st.integers(12, 80),
    covariance_type=st.sampled_from(["diag", "spherical", "tied", "full"]),
)  # fmt: skip
def test_em_survives_any_data_and_its_bound_rises(seed, k, c, n, covariance_type):
    data = clustered(n, c, 3, seed=seed)
    bounds = np.array(run(data, a_start(data, k, covariance_type), 6, reg_covar=1e-6).lower_bounds)
    assert np.isfinite(bounds).all()


def test_the_gap_is_a_mean_with_its_standard_error():
    """Of every row, or of rows spread evenly: every fourth where a quarter is wanted."""
    data = many_clusters(1024)
    rows, mixture = fitted(data)
    winners = exact_winners(rows, mixture, torch.float64)
    joint = mixture.log_joint(torch.from_numpy(data))
    candidates = neighbours(mixture, 4)[winners.long()]
    gaps = (joint.logsumexp(1) - joint.gather(1, candidates).logsumexp(1)).numpy()
    found = measure_gap(rows, mixture, winners, Truncation(candidates=4, sample=1024), torch.float64)
    assert found == (pytest.approx(gaps.mean()), pytest.approx(gaps.std() / 1024**0.5), 1024)
    some = np.concatenate([gaps[chunk.start : chunk.stop][::4] for chunk in rows.chunks])
    found = measure_gap(rows, mixture, winners, Truncation(candidates=4, sample=256), torch.float64)
    assert found[2] == len(some) and found[0] == pytest.approx(some.mean())


def test_rows_that_fit_are_read_once_and_buffers_are_taken_again():
    data, read = many_clusters(1000), []

    def reading(a, b):
        read.extend(range(a, b))
        return data[a:b]

    for keep, times in ((float("inf"), 1), (0, 3)):
        rows = Rows(reading, 1000, 128, ALONE, keep)
        read.clear()
        for _ in range(3):
            torch.testing.assert_close(torch.cat([x.clone() for _, x in rows]), torch.from_numpy(data))
        assert len(read) - 1000 * times <= 10, "but for the look at a row's width"
    workspace = Workspace(torch.device("cpu"))
    first = workspace.empty("a", torch.float32, 4, 6)
    assert (
        workspace.empty("a", torch.float32, 6, 4).data_ptr()
        == first.data_ptr()
        == workspace.empty("a", first.dtype, 2).data_ptr()
    )
    assert workspace.empty("b", torch.float32, 4, 6).data_ptr() != first.data_ptr()
    larger = workspace.empty("a", torch.float32, 5, 5)
    assert larger.shape == (5, 5)
    workspace.drop("a")
    assert workspace.empty("a", torch.float32, 4, 6).data_ptr() != larger.data_ptr(), "dropped"
