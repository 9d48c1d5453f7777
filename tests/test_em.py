"""EM against scikit-learn, across process counts, and through kills."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import davies_bouldin_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture

from mmfm.cli import fit_gmm
from mmfm.config import Gmm, StageConfig
from mmfm.data import tokens
from mmfm.evaluation import mixture_report
from mmfm.infra.distributed import Ranks
from mmfm.infra.store import map_arrays
from mmfm.mixture.em import EMState, e_step, em_iterations, posteriors
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.moments import SufficientStatistics, m_step
from mmfm.mixture.streaming import Rows
from mmfm.stages import fit_gmm as stage

ALONE = Ranks(0, 1, torch.device("cpu"))
SETTINGS = Gmm(
    n_components=5, covariance_type="diag", init="kmeans", reg_covar=1e-6, tol=1e-4, max_iter=8, seed=0,
    precision="float64", chunk_size=64, n_init=1, init_means="", e_step="exact", cache_gb=1.0,
)  # fmt: skip


def fit_tokens(tokens, settings, out_dir, ranks=ALONE):
    """Run the stage on opened tokens."""
    return stage.fit(StageConfig("fit_gmm", gmm=settings), tokens, Path(out_dir), ranks)


def clustered(n=500, c=6, k=5, seed=0, spread=2.0, offset=0.0):
    """Overlapping clusters (n, c) float32: EM takes tens of iterations and no responsibility is one-hot."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(offset, spread, (k, c))
    scales = generator.uniform(0.5, 1.5, (k, c))
    labels = generator.integers(k, size=n)
    return (centres[labels] + scales[labels] * generator.normal(size=(n, c))).astype(np.float32)


def a_start(data, k, covariance_type="diag"):
    c = data.shape[1]
    variances = {"diag": np.ones((k, c)), "spherical": np.ones(k), "tied": np.eye(c), "full": np.stack([np.eye(c)] * k)}
    return Mixture(np.full(k, 1 / k), data[:k].astype(np.float64), variances[covariance_type], covariance_type)


def run(data, start, max_iter, chunk_size=64, dtype=torch.float64, tol=0.0, reg_covar=1e-6):
    rows = Rows(lambda a, b: data[a:b], len(data), chunk_size, ALONE)
    return list(
        em_iterations(rows, EMState(start), max_iter=max_iter, tol=tol, reg_covar=reg_covar, dtype=dtype)
    )[-1]  # fmt: skip


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


def test_variances_stay_positive_where_float32_moments_cancel():
    data = (1e4 + np.random.default_rng(0).normal(0, 1e-2, (300, 4))).astype(np.float32)
    start = Mixture(np.array([1.0]), data[:1].astype(np.float64), np.ones((1, 4)))
    mixture = run(data, start, 2, dtype=torch.float32, reg_covar=0.0).mixture
    np.testing.assert_allclose(mixture.variances[0], data.astype(np.float64).var(0), rtol=1e-6)


def test_two_processes_share_the_rows_by_chunks():
    data = clustered()
    start = a_start(data, 5)
    parts = []
    for rank in range(2):
        rows = Rows(lambda a, b: data[a:b], len(data), 64, Ranks(rank, 2, torch.device("cpu")))
        rows.ranks = ALONE  # sum by hand below
        parts.append(e_step(rows, start, torch.float64))
        parts[-1].ranges = rows.ranges
    assert [r for part in parts for r in part.ranges] == Rows(None, 500, 64, ALONE).ranges
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


def token_store(path, data, classes=2):
    labels = np.arange(len(data)) % classes
    tokens.create(path, len(data), data.shape[1], len(data), labels)[:] = data
    import zarr

    zarr.open_group(path, mode="r+").attrs.update({"digest": "tokens", "listing_digest": "listing"})
    return tokens.TokenStore.open(path)


@pytest.fixture
def store_of_tokens(tmp_path):
    return token_store(tmp_path / "cls_tokens.zarr", clustered(512))


def result(folder):
    """Everything that must be equal after a kill, to the bit."""
    parts = []
    for name in ("gmm.safetensors", "assignment.safetensors"):
        arrays, metadata = map_arrays(folder / name)
        parts.append((metadata, {name: array.tobytes() for name, array in arrays.items()}))
    return parts


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
from test_em import SETTINGS, fit_tokens
save = stage.save_iteration
def save_and_die(folder, state):
    save(folder, state)
    if state.n_iter == 4:
        os.kill(os.getpid(), signal.SIGKILL)
stage.save_iteration = save_and_die
fit_tokens(TokenStore.open(sys.argv[1]), SETTINGS, sys.argv[2])
"""


def test_a_killed_fit_ends_with_the_same_bits(store_of_tokens, tmp_path, request):
    fit_tokens(store_of_tokens, SETTINGS, tmp_path / "undisturbed", ALONE)
    arguments = [str(tmp_path / "cls_tokens.zarr"), str(tmp_path / "killed"), str(request.path.parent)]
    killed = subprocess.run([sys.executable, "-c", KILLED_RUN, *arguments], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert states(tmp_path / "killed")[-1] == "iteration-00004.safetensors"
    assert not (tmp_path / "killed" / "gmm.safetensors").exists()
    fit_tokens(store_of_tokens, SETTINGS, tmp_path / "killed", ALONE)
    assert result(tmp_path / "killed") == result(tmp_path / "undisturbed")


def test_two_processes_find_the_mixture_of_one(store_of_tokens, tmp_path):
    fit_tokens(store_of_tokens, SETTINGS, tmp_path / "one", ALONE)
    program = "import sys; from mmfm.cli.__main__ import main; sys.exit(main(sys.argv[1:]))"
    values = json.dumps({"gmm": dataclasses.asdict(SETTINGS)})
    arguments = ["fit_gmm", "--settings", values, "--tokens", str(tmp_path / "cls_tokens.zarr"), "--out-dir",
                 str(tmp_path / "two")]  # fmt: skip
    run_processes(program, arguments, tmp_path)
    one, two = (Mixture.load(tmp_path / name / "gmm.safetensors") for name in ("one", "two"))
    assert (one.metadata["n_iter"], one.metadata["converged"]) == (two.metadata["n_iter"], two.metadata["converged"])
    np.testing.assert_allclose(two.means, one.means, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(two.variances, one.variances, rtol=1e-8)
    labels = [map_arrays(tmp_path / name / "assignment.safetensors")[0]["labels"] for name in ("one", "two")]
    np.testing.assert_array_equal(*labels)


def run_processes(program, arguments, folder, world=2):
    """Run a program as ``world`` processes that meet over a file-less TCP store, as torchrun would start them."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world),
            "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    deadline = time.monotonic() + 120
    for process in processes:
        _, errors = process.communicate(timeout=deadline - time.monotonic())
        assert process.returncode == 0, errors


def test_more_components_than_images_is_refused(store_of_tokens, tmp_path):
    with pytest.raises(ValueError, match=r"gmm.n_components is 513, but there are only 512 images; set it to 512"):
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
    assert "Resumes by iteration" in text
    assert "gmm.reg_covar" in text


def test_agreement_with_classes_matches_scikit_learn():
    generator = np.random.default_rng(0)
    labels, classes = generator.integers(7, size=200).astype(np.int32), generator.integers(3, size=200).astype(np.int32)
    purity, nmi = mixture_report.agreement_with_classes(labels, classes)
    assert nmi == pytest.approx(normalized_mutual_info_score(classes, labels), abs=1e-12)
    assert purity == sum(np.bincount(classes[labels == k]).max() for k in range(7)) / 200
    assert mixture_report.agreement_with_classes(classes, classes) == pytest.approx((1, 1))
    assert mixture_report.effective_number(np.array([5, 5, 0, 5])) == pytest.approx(3)
