"""EM against scikit-learn, across process counts, and through kills."""

import dataclasses
import itertools
import json
import shutil
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import davies_bouldin_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture

from mmfm.cli import fit_gmm
from mmfm.evaluation import mixture_report
from mmfm.infra.distributed import Ranks
from mmfm.infra.store import map_arrays
from mmfm.mixture import streaming
from mmfm.mixture.em import EMState, e_step, em_iterations, posteriors
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.moments import SufficientStatistics, hard_moments, m_step
from mmfm.mixture.streaming import Rows
from support.mixtures import (
    ALONE,
    SETTINGS,
    a_start,
    clustered,
    fit_tokens,
    result,
    run,
    run_processes,
    store_of_tokens,  # noqa: F401 (fixtures)
    token_store,
)
from support.places import ROOT


def scikit(data, start, max_iter, tol=0.0, reg_covar=1e-6):
    model = GaussianMixture(
        start.n_components, covariance_type=start.covariance_type, max_iter=max_iter, tol=tol, reg_covar=reg_covar,
        weights_init=start.weights.numpy(), means_init=start.means.numpy(),
        precisions_init=start.to_sklearn().precisions_,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(data.astype(np.float64))


@pytest.mark.parametrize("covariance_type", ["diag", "spherical", "tied", "full"])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_every_iteration_equals_scikit_learn(covariance_type, offset):
    data = clustered(offset=offset)
    start = a_start(data, 5, covariance_type)
    state, model = run(data, start, 25), scikit(data, start, 25)
    assert len(state.lower_bounds) == len(model.lower_bounds_) == 25
    np.testing.assert_allclose(state.lower_bounds, model.lower_bounds_, rtol=1e-6)
    np.testing.assert_allclose(state.mixture.weights, model.weights_, rtol=1e-6)
    np.testing.assert_allclose(state.mixture.means, model.means_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(state.mixture.variances, model.covariances_, rtol=1e-5, atol=1e-6)


def test_convergence_is_scikit_learns():
    data = clustered()
    start = a_start(data, 5)
    state, model = run(data, start, 200, tol=1e-3), scikit(data, start, 200, tol=1e-3)
    assert state.converged
    assert 2 < state.n_iter == model.n_iter_ < 200
    assert state.lower_bounds[-1] == pytest.approx(model.lower_bound_, rel=1e-9)


def test_float32_products_end_where_float64_ends():
    data = clustered(spread=4.0, offset=30.0)
    exact, fast = (run(data, a_start(data, 5), 20, dtype=dtype) for dtype in (torch.float64, torch.float32))
    assert exact.lower_bounds != fast.lower_bounds
    np.testing.assert_allclose(fast.lower_bounds, exact.lower_bounds, atol=1e-5)
    np.testing.assert_allclose(fast.mixture.means, exact.mixture.means, rtol=1e-4, atol=1e-4)


def test_the_likelihood_never_falls():
    data = clustered(seed=3)
    bounds = np.array(run(data, a_start(data, 5), 30, reg_covar=0.0).lower_bounds)
    assert (np.diff(bounds) > -1e-9).all()


def test_chunking_changes_rounding_only():
    data = clustered()
    states = [run(data, a_start(data, 5), 10, chunk_size) for chunk_size in (7, 500)]
    np.testing.assert_allclose(states[0].mixture.means, states[1].mixture.means, rtol=1e-10)


@pytest.mark.parametrize("covariance_type", ["diag", "spherical", "tied", "full"])
def test_sparse_and_dense_sums_are_the_same(covariance_type, monkeypatch):
    data = torch.from_numpy(clustered(spread=4.0, offset=20.0))
    mixture = a_start(data.numpy(), 5)
    joint, sums = mixture.log_joint(data), []
    for share, mkl in ((0.0, True), (1.0, True), (1.0, False)):  # dense, product with a sparse matrix, segments
        monkeypatch.setattr("mmfm.mixture.em._DENSE_SHARE", share)
        monkeypatch.setattr("mmfm.mixture.moments._PIECE", 100)  # many pieces, which split components
        monkeypatch.setattr("torch.backends.mkl.is_available", lambda mkl=mkl: mkl)
        statistics = SufficientStatistics(mixture.means, covariance_type)
        log_prob, responsibilities = posteriors(joint.clone())
        np.testing.assert_allclose(log_prob, joint.logsumexp(1), rtol=1e-10)
        if share == 0:
            statistics.add_dense(data, responsibilities)
        else:
            row, component, weight = responsibilities
            statistics.add_pairs(data, component, row, weight)
        sums.append(statistics)
    for name in ("count", "first", "second"):
        for other in sums[1:]:
            np.testing.assert_allclose(getattr(other, name), getattr(sums[0], name), rtol=1e-8, atol=1e-7)


def test_empty_components_keep_their_mean_and_duplicates_their_regularised_variance():
    data = np.zeros((50, 3), np.float32)
    means = np.array([[0.0, 0, 0], [100.0, 0, 0]])
    state = run(data, Mixture(np.array([0.5, 0.5]), means, np.ones((2, 3))), 3)
    np.testing.assert_allclose(state.mixture.means, means, atol=1e-9)
    np.testing.assert_allclose(state.mixture.variances, 1e-6, rtol=1e-6)
    assert 0 < state.mixture.weights[1] < 1e-14


@pytest.mark.parametrize("covariance_type", ["diag", "spherical", "full"])
def test_less_than_half_a_row_gets_the_average_variance_where_nothing_is_added(covariance_type):
    """Half a row has a spread of its own."""
    statistics = SufficientStatistics(torch.zeros(3, 2, dtype=torch.float64), covariance_type)
    statistics.count += torch.tensor([99.01, 0.5, 0.49], dtype=torch.float64)
    own = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    scatter = (own * statistics.count).view(-1, *[1] * (statistics.second.ndim - 1))
    statistics.second += scatter * (torch.eye(2) if covariance_type == "full" else 1)
    average = float(own @ statistics.count) / 100
    for reg_covar, expected in ((0.0, [1.0, 4.0, average]), (0.5, [1.5, 4.5, 9.5])):
        mixture, _ = m_step(statistics, covariance_type, reg_covar)
        np.testing.assert_allclose(mixture.diagonal(), np.tile(np.array(expected)[:, None], 2), rtol=1e-12)


def shrunk_by_hand(data, mixture, reg_covar, rows):
    """One step of EM in plain NumPy: variances (n v_k + m v) / (n + m) + reg_covar, with v pooled over components."""
    posterior = mixture.log_joint(torch.from_numpy(data)).softmax(1).numpy()
    count = posterior.sum(0)
    means = posterior.T @ data / count[:, None]
    scatter = np.stack([(posterior[:, k, None] * (data - means[k]) ** 2).sum(0) for k in range(len(count))])
    pooled = scatter.sum(0) / len(data)
    return (scatter + rows * pooled) / (count[:, None] + rows) + reg_covar, pooled


@pytest.mark.parametrize("dense_share", [0.0, 1.0])
def test_shrinkage_counts_the_pooled_variance_as_rows(dense_share, monkeypatch):
    monkeypatch.setattr("mmfm.mixture.em._DENSE_SHARE", dense_share)
    data = clustered()
    start = run(data, a_start(data, 5), 3).mixture
    expected, pooled = shrunk_by_hand(data.astype(np.float64), start, 1e-2, 7.5)
    found = run(data, start, 1, reg_covar=1e-2, shrinkage=7.5).mixture
    np.testing.assert_allclose(found.variances, expected, rtol=1e-9)
    tied = run(data, Mixture(start.weights, start.means, torch.diag(start.variances[0]), "tied"), 1).mixture
    alike = run(data, Mixture(start.weights, start.means, start.variances[:1].repeat(5, 1)), 1, shrinkage=1e12).mixture
    np.testing.assert_allclose(alike.variances, np.tile(tied.diagonal()[0], (5, 1)), rtol=1e-9)
    assert not np.allclose(pooled, data.var(0), rtol=0.1), "within the components, not of all rows"


def test_the_posterior_of_a_shrunk_mixture_never_falls_and_the_bound_may():
    """From the maximum of the likelihood, a prior leads downhill, by no more than it gains."""
    data = clustered(120, 6, 5, seed=3)
    start = run(data, a_start(data, 5), 60, tol=1e-6).mixture
    states = list(
        em_iterations(
            Rows(lambda a, b: data[a:b], len(data), 64, ALONE), EMState(start), max_iter=20, tol=0.0, reg_covar=1e-3,
            dtype=torch.float64, shrinkage=40.0,
        )
    )  # fmt: skip
    bounds = states[-1].lower_bounds
    assert bounds[0] - min(bounds) > 0.1
    for before, after in itertools.pairwise(states):
        assert before.slack >= 0 and after.lower_bounds[-1] >= before.lower_bounds[-1] - before.slack
    with pytest.raises(ValueError, match="the mean log-likelihood fell"):
        forgetful = dataclasses.replace(states[0], slack=0.0)
        list(em_iterations(Rows(lambda a, b: data[a:b], len(data), 64, ALONE), forgetful, max_iter=2, tol=0.0,
                           reg_covar=1e-3, dtype=torch.float64, shrinkage=40.0))  # fmt: skip


def test_shrinkage_keeps_a_component_of_equal_rows_open_where_nothing_is_added():
    data = np.concatenate([clustered(60, 3, 1), np.full((5, 3), 40, np.float32)])
    start = Mixture(np.array([0.9, 0.1]), np.array([[0.0] * 3, [40.0] * 3]), np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"set gmm\.reg_covar above 0"):
        run(data, start, 1, reg_covar=0.0)
    variances = run(data, start, 1, reg_covar=0.0, shrinkage=5.0).mixture.variances
    pooled = data[:60].astype(np.float64).var(0) * 60 / 65
    np.testing.assert_allclose(variances[1], 5 * pooled / (5 + 5), rtol=1e-6)


@pytest.mark.parametrize("e_step", ["exact", "truncated"])
def test_a_shrunk_fit_continues_with_the_same_bits(store_of_tokens, tmp_path, e_step):
    shrunk = dataclasses.replace(SETTINGS, shrinkage=20.0, e_step=e_step, tol=0.0)
    fit_tokens(store_of_tokens, shrunk, tmp_path / "whole", ALONE)
    fit_tokens(store_of_tokens, dataclasses.replace(shrunk, max_iter=3), tmp_path / "parts", ALONE)
    fit_tokens(store_of_tokens, shrunk, tmp_path / "parts", ALONE)
    assert result(tmp_path / "parts") == result(tmp_path / "whole")
    plain = fit_tokens(store_of_tokens, dataclasses.replace(shrunk, shrinkage=0.0), tmp_path / "plain", ALONE)
    variances = [Mixture.load(tmp_path / name / "gmm.safetensors").variances for name in ("plain", "whole")]
    assert variances[1].std(0).max() < variances[0].std(0).max()
    assert "shrinkage" not in plain["settings"]


@pytest.mark.parametrize("covariance_type", ["spherical", "tied", "full"])
def test_only_diag_variances_are_shrunk(covariance_type):
    with pytest.raises(ValueError, match=rf"'gmm.shrinkage' is 5, .* {covariance_type}, .*set 'gmm.shrinkage' to 0"):
        dataclasses.replace(SETTINGS, covariance_type=covariance_type, shrinkage=5.0).check("gmm")
    statistics = SufficientStatistics(torch.zeros(2, 2, dtype=torch.float64), covariance_type)
    with pytest.raises(ValueError, match=f"needs diag covariances, not {covariance_type}"):
        m_step(statistics, covariance_type, 1e-6, 5.0)


def test_variances_stay_positive_where_float32_moments_cancel():
    data = (1e4 + np.random.default_rng(0).normal(0, 1e-2, (300, 4))).astype(np.float32)
    start = Mixture(np.array([1.0]), data[:1].astype(np.float64), np.ones((1, 4)))
    mixture = run(data, start, 2, dtype=torch.float32, reg_covar=0.0).mixture
    np.testing.assert_allclose(mixture.variances[0], data.astype(np.float64).var(0), rtol=1e-6)


def test_processes_of_other_nodes_take_no_share_of_this_ones_memory(tmp_path, monkeypatch):
    """Eight processes on two nodes: four share the 64 KB that are free here, and cache a quarter of their shares."""
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 64 kB\n")
    monkeypatch.setattr(streaming, "Path", lambda _: tmp_path / "meminfo")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    reads = []

    def read(start, stop):
        reads.append(range(start, stop))
        return np.zeros((stop - start, 1024), np.float32)

    rows = Rows(read, 16, 1, Ranks(0, 8, torch.device("cpu")), block_rows=1)
    for _ in range(3):
        list(rows)
    assert rows.chunks == [range(1), range(1, 2)]
    assert reads.count(range(1)) == 2 and reads.count(range(1, 2)) == 3, "one row of 4 KB fits"


def test_two_processes_share_the_rows_by_chunks():
    data = clustered()
    start = a_start(data, 5)
    parts = []
    for rank in range(2):
        rows = Rows(lambda a, b: data[a:b], len(data), 64, Ranks(rank, 2, torch.device("cpu")))
        rows.ranks = ALONE  # sum by hand below
        parts.append(e_step(rows, start, torch.float64))
        parts[-1].chunks = rows.chunks
    assert [r for part in parts for r in part.chunks] == Rows(None, 500, 64, ALONE).chunks
    parts[0].count += parts[1].count
    parts[0].first += parts[1].first
    parts[0].second += parts[1].second
    np.testing.assert_allclose(
        m_step(parts[0], "diag", 1e-6)[0].variances, run(data, start, 1).mixture.variances, rtol=1e-12
    )


def test_a_value_that_is_not_finite_is_named():
    data = clustered()
    data[321, 2] = np.nan
    with pytest.raises(ValueError, match="row 321 of the tokens"):
        run(data, a_start(data, 5), 1)


# The stage


def states(folder):
    return sorted(path.name for path in folder.glob("state-*/iteration-*"))


def test_the_stage_writes_what_the_contract_says(store_of_tokens, tmp_path):
    summary = fit_tokens(store_of_tokens, SETTINGS, tmp_path / "gmm", ALONE)
    mixture = Mixture.load(tmp_path / "gmm" / "gmm.safetensors")
    assignment, about = map_arrays(tmp_path / "gmm" / "assignment.safetensors")
    labels = mixture.predict(torch.from_numpy(store_of_tokens.read(0, 512)))
    np.testing.assert_array_equal(assignment["labels"], labels)
    assert assignment["labels"].dtype == np.int32
    np.testing.assert_array_equal(assignment["counts"], np.bincount(labels, minlength=5))
    assert about["gmm_digest"] == mixture.metadata["digest"]
    assert about["listing_digest"] == mixture.metadata["listing_digest"] == "listing"
    assert mixture.metadata["tokens_digest"] == "tokens"
    assert mixture.metadata["n_iter"] == len(summary["lower_bounds"]) == 8
    assert json.loads((tmp_path / "gmm" / "report.json").read_text())["bic"] == summary["bic"]
    data = store_of_tokens.read(0, 512).astype(np.float64)
    assert summary["bic"] == pytest.approx(mixture.to_sklearn().bic(data), rel=1e-9)
    assert summary["aic"] == pytest.approx(mixture.to_sklearn().aic(data), rel=1e-9)
    assert summary["davies_bouldin"] == pytest.approx(davies_bouldin_score(data, labels), rel=1e-9)
    assert {"likelihood.png", "weights.png"} <= {path.name for path in (tmp_path / "gmm").iterdir()}


def test_a_raised_budget_continues_and_a_lowered_one_ends_where_it_would_have(store_of_tokens, tmp_path, monkeypatch):
    few, many = dataclasses.replace(SETTINGS, max_iter=3), SETTINGS
    fit_tokens(store_of_tokens, few, tmp_path / "few", ALONE)
    fit_tokens(store_of_tokens, many, tmp_path / "many", ALONE)
    assert states(tmp_path / "many") == [f"iteration-{i:05d}.safetensors" for i in (0, 7, 8)]
    monkeypatch.setattr("mmfm.mixture.initial.start", None)  # must not be needed again
    fit_tokens(store_of_tokens, many, tmp_path / "few", ALONE)
    assert result(tmp_path / "few") == result(tmp_path / "many")
    summary = fit_tokens(store_of_tokens, few, tmp_path / "many", ALONE)
    assert summary["n_iter"] == 3
    fit_tokens(store_of_tokens, many, tmp_path / "many", ALONE)
    assert result(tmp_path / "few") == result(tmp_path / "many")


def test_a_damaged_iteration_is_passed_over(store_of_tokens, tmp_path):
    fit_tokens(store_of_tokens, SETTINGS, tmp_path / "gmm", ALONE)
    expected = result(tmp_path / "gmm")
    newest, before = sorted((tmp_path / "gmm").glob("state-*/iteration-*"), reverse=True)[:2]
    newest.write_bytes(newest.read_bytes()[:-100])
    content = bytearray(before.read_bytes())
    content[-5] ^= 1
    before.write_bytes(content)
    shutil.rmtree(newest.parent / "finished")  # from which it would be done at once
    fit_tokens(store_of_tokens, SETTINGS, tmp_path / "gmm", ALONE)
    assert result(tmp_path / "gmm") == expected


KILLED_RUN = """
import os, sys, signal
from mmfm.stages import fit_gmm as stage
from mmfm.data.tokens import TokenStore
sys.path.insert(0, sys.argv[3])
from support.mixtures import SETTINGS, fit_tokens
save = stage.save_iteration
def save_and_die(folder, state):
    save(folder, state)
    if state.n_iter == 4:
        os.kill(os.getpid(), signal.SIGKILL)
stage.save_iteration = save_and_die
fit_tokens(TokenStore.open(sys.argv[1]), SETTINGS, sys.argv[2])
"""


def test_a_killed_fit_ends_with_the_same_bits(store_of_tokens, tmp_path):
    fit_tokens(store_of_tokens, SETTINGS, tmp_path / "undisturbed", ALONE)
    arguments = [str(tmp_path / "cls_tokens.zarr"), str(tmp_path / "killed"), str(ROOT / "tests")]
    killed = subprocess.run([sys.executable, "-c", KILLED_RUN, *arguments], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert states(tmp_path / "killed")[-1] == "iteration-00004.safetensors"
    assert not (tmp_path / "killed" / "gmm.safetensors").exists()
    fit_tokens(store_of_tokens, SETTINGS, tmp_path / "killed", ALONE)
    assert result(tmp_path / "killed") == result(tmp_path / "undisturbed")


@pytest.mark.parametrize("shrinkage", [0.0, 20.0])
def test_two_processes_find_the_mixture_of_one(store_of_tokens, tmp_path, shrinkage):
    settings = dataclasses.replace(SETTINGS, shrinkage=shrinkage)
    fit_tokens(store_of_tokens, settings, tmp_path / "one", ALONE)
    program = "import sys; from mmfm.cli.__main__ import main; sys.exit(main(sys.argv[1:]))"
    values = json.dumps({"gmm": dataclasses.asdict(settings)})
    arguments = ["fit_gmm", "--settings", values, "--tokens", str(tmp_path / "cls_tokens.zarr"), "--out-dir",
                 str(tmp_path / "two")]  # fmt: skip
    run_processes(program, arguments, tmp_path)
    one, two = (Mixture.load(tmp_path / name / "gmm.safetensors") for name in ("one", "two"))
    assert (one.metadata["n_iter"], one.metadata["converged"]) == (two.metadata["n_iter"], two.metadata["converged"])
    np.testing.assert_allclose(two.means, one.means, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(two.variances, one.variances, rtol=1e-8)
    labels = [map_arrays(tmp_path / name / "assignment.safetensors")[0]["labels"] for name in ("one", "two")]
    np.testing.assert_array_equal(*labels)


def test_more_components_than_images_is_refused(store_of_tokens, tmp_path):
    with pytest.raises(
        ValueError, match=r"or .k in the target's name, is 513, but .* only 512 images; set it to .*k512"
    ):
        fit_tokens(store_of_tokens, dataclasses.replace(SETTINGS, n_components=513), tmp_path / "gmm", ALONE)


@pytest.mark.parametrize("init", ["kmeans", "k-means++", "random_from_data"])
def test_a_token_that_is_not_finite_is_named(tmp_path, init):
    data = clustered(512)
    data[401, 3] = np.inf
    store = token_store(tmp_path / "cls_tokens.zarr", data)
    with pytest.raises(ValueError, match="row 401 of the tokens"):
        fit_tokens(store, dataclasses.replace(SETTINGS, init=init), tmp_path / "gmm", ALONE)


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit):
        fit_gmm.main(["--help"])
    text = capsys.readouterr().out
    assert "resumes at the last complete iteration" in text
    assert "gmm.reg_covar" in text


def test_agreement_with_classes_matches_scikit_learn():
    generator = np.random.default_rng(0)
    labels, classes = generator.integers(7, size=200).astype(np.int32), generator.integers(3, size=200).astype(np.int32)
    purity, nmi = mixture_report.agreement_with_classes(labels, classes)
    assert nmi == pytest.approx(normalized_mutual_info_score(classes, labels), abs=1e-12)
    assert purity == sum(np.bincount(classes[labels == k]).max() for k in range(7)) / 200
    assert mixture_report.agreement_with_classes(classes, classes) == pytest.approx((1, 1))
    assert mixture_report.effective_number(np.array([5, 5, 0, 5])) == pytest.approx(3)


def test_the_numbers_of_a_fit_by_hand():
    """Four components with 3, 1, 0 and 2 of 6 images; two classes, of which the second has one image."""
    mixture = Mixture(np.array([0.5, 0.25, 0.125, 0.125]), np.zeros((4, 2)), np.ones((4, 2)))
    labels, classes = np.array([0, 0, 0, 1, 3, 3]), np.array([0, 0, 1, 0, 0, 0])
    report = mixture_report.summarise(mixture, labels, np.array([3, 1, 0, 2]), -1.5, classes)
    assert (report["n_images"], report["n_components"], report["parameters"]) == (6, 4, 4 * 2 + 4 * 2 + 3)
    assert (report["active_components"], report["empty_components"]) == (3, 1)
    assert report["images_per_active_component"] == {"min": 1, "median": 2.0, "max": 3}
    assert report["entropy_of_weights"] == pytest.approx(1.75 * np.log(2))
    assert report["effective_number_by_weights"] == pytest.approx(2**1.75)
    expected = np.log(2) / 2 + np.log(6) / 6 + np.log(3) / 3
    assert report["entropy_of_counts"] == pytest.approx(expected)
    assert report["effective_number_by_counts"] == pytest.approx(np.exp(expected))
    assert report["bic"] == pytest.approx(2 * 1.5 * 6 + 19 * np.log(6))
    assert report["aic"] == pytest.approx(2 * 1.5 * 6 + 2 * 19)
    assert report["class_purity"] == pytest.approx(5 / 6)
    one_class = mixture_report.summarise(mixture, labels, np.array([3, 1, 0, 2]), -1.5, np.zeros(6, int))
    assert "class_purity" not in one_class and "class_nmi" not in one_class
    assert mixture_report.agreement_with_classes(np.zeros(6, int), np.zeros(6, int)) == (1, 1)


@pytest.fixture
def drawn(monkeypatch):
    """The axes that pictures of a fit are drawn into."""
    found = []
    make = mixture_report._figure
    monkeypatch.setattr(mixture_report, "_figure", lambda path: found.append(make(path)) or found[-1])
    return lambda: found[-1][0]


def test_the_likelihood_is_drawn_whole_or_without_a_first_value_far_below(drawn, tmp_path):
    for bounds, far in (
        ((-5e6, -10.0, -9.0, -8.5), True),
        ((-5e6, -10.0, -10.0), True),
        ((-12.0, -10.0, -9.0, -8.5), False),
        ((-1e3, -9.0), False),
        ((-9.0,), False),
    ):
        mixture_report.plot_likelihood(tmp_path / "likelihood.png", bounds, converged=not far)
        low, high = drawn().get_ylim()
        assert drawn().lines[0].get_xydata().tolist() == [[i + 1.0, bound] for i, bound in enumerate(bounds)]
        assert all(low < bound < high for bound in bounds[far:]), bounds
        assert (bounds[0] < low) == far == ("-5,000,000" in drawn().get_title())
        if far:  # the rest fills the picture
            assert high - low < 2 * (max(bounds[1:]) - min(bounds[1:])) or bounds[1] == bounds[2]
        assert drawn().get_title().startswith("stopped" if far else "converged")


def test_the_weights_are_drawn_in_order_beside_the_shares_of_images(drawn, tmp_path):
    mixture_report.plot_weights(tmp_path / "weights.png", np.array([0.2, 0.5, 0.3]), np.array([10, 0, 30]))
    weights, shares, even = (line.get_xydata().tolist() for line in drawn().lines)
    assert weights == [[1, 0.5], [2, 0.3], [3, 0.2]] and shares == [[1, 0.75], [2, 0.25]]
    assert [y for _, y in even] == [1 / 3, 1 / 3]
    assert 0 < drawn().get_ylim()[0] < 0.2 and "2 of 3 components have images" in drawn().get_title()
    mixture_report.plot_weights(tmp_path / "weights.png", np.array([0.2, 0.5, 0.3]), np.array([1, 0, 9999]))
    assert drawn().get_ylim()[0] < 1e-4, "the smallest share is in the picture"


@pytest.mark.parametrize("k", [4, 256, 8192])
def test_the_picture_of_the_weights_is_whole_and_full(drawn, tmp_path, k):
    spread = np.linspace(1.5, 0.5, k) / k
    mixture_report.plot_weights(tmp_path / "weights.png", spread, np.linspace(150, 50, k).round())
    axes = drawn()
    title, picture = axes.title.get_window_extent(), axes.figure.bbox
    assert title.x0 >= 0 and title.x1 <= picture.width and title.y1 <= picture.height
    assert all(tick == round(tick) for tick in axes.get_xticks()), "components are whole"
    points = axes.transData.transform(axes.lines[0].get_xydata())[:, 1]
    assert points.max() - points.min() > 0.4 * axes.get_window_extent().height


@pytest.mark.parametrize("covariance_type", ["diag", "full"])
def test_the_moments_of_clusters_are_shared_by_processes(covariance_type):
    data = clustered()
    winners = torch.from_numpy(np.random.default_rng(0).integers(5, size=len(data)))
    centres = torch.from_numpy(data[:5])
    whole = hard_moments(Rows(lambda a, b: data[a:b], len(data), 64, ALONE), centres, winners, covariance_type)
    parts = []
    for rank in range(2):
        rows = Rows(lambda a, b: data[a:b], len(data), 64, Ranks(rank, 2, torch.device("cpu")))
        own = winners[rows.local.start : rows.local.stop]
        rows.ranks = ALONE  # sum by hand below
        parts.append(hard_moments(rows, centres, own, covariance_type))
    for name in ("count", "first", "second"):
        torch.testing.assert_close(getattr(parts[0], name) + getattr(parts[1], name), getattr(whole, name))
    assert whole.count.tolist() == np.bincount(winners, minlength=5).tolist()
    for k in range(5):
        deviation = data[winners == k].astype(np.float64) - data[k]
        second = deviation.T @ deviation if covariance_type == "full" else np.square(deviation).sum(0)
        np.testing.assert_allclose(whole.first[k], deviation.sum(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(whole.second[k], second, rtol=1e-5, atol=1e-5)
