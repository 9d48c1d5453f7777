"""What can be wrong with tokens, settings and checkpoints of fit_gmm, and what it says then."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from test_em import ALONE, SETTINGS, a_start, clustered, run, run_processes, token_store

from mmfm.infra import store
from mmfm.mixture import fit as stage
from mmfm.mixture import gaussian
from mmfm.mixture.gaussian import Mixture, covariance_shape


def fit(tmp_path, data, **changes):
    tokens = token_store(tmp_path / "cls_tokens.zarr", data)
    return stage.fit(tokens, dataclasses.replace(SETTINGS, **changes), tmp_path / "gmm", ALONE)


@pytest.mark.parametrize("covariance_type", ["diag", "spherical", "tied", "full"])
def test_a_constant_dimension_gets_the_regularisation(tmp_path, covariance_type):
    data = clustered(512)
    data[:, 2] = 7.25
    fit(tmp_path, data, covariance_type=covariance_type)
    mixture = Mixture.load(tmp_path / "gmm" / "gmm.safetensors")
    np.testing.assert_allclose(mixture.means[:, 2], 7.25, rtol=1e-7)
    if covariance_type != "spherical":
        np.testing.assert_allclose(mixture.diagonal()[:, 2], 1e-6, rtol=1e-3)


def test_a_constant_dimension_without_regularisation_is_named(tmp_path):
    data = clustered(512)
    data[:, 2] = 7.25
    with pytest.raises(ValueError, match=r"no spread along dimension 2: .* set gmm.reg_covar above 0"):
        fit(tmp_path, data, reg_covar=0.0)


@pytest.mark.parametrize("e_step", ["exact", "truncated"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_duplicated_tokens_are_fitted_and_counted(tmp_path, e_step, precision):
    data = np.repeat(clustered(8, spread=20.0), 64, axis=0)
    summary = fit(tmp_path, data, n_components=8, e_step=e_step, precision=precision)
    assert summary["collapsed_components"] >= 7
    assert summary["empty_components"] == 0


@pytest.mark.parametrize("covariance_type", ["diag", "spherical", "tied", "full"])
def test_one_component_has_the_datas_moments(tmp_path, covariance_type):
    data = clustered(512, offset=30.0)
    summary = fit(tmp_path, data, n_components=1, covariance_type=covariance_type, e_step="exact")
    mixture = Mixture.load(tmp_path / "gmm" / "gmm.safetensors")
    np.testing.assert_allclose(mixture.means[0], data.astype(np.float64).mean(0), rtol=1e-9)
    variances = data.astype(np.float64).var(0)
    expected = np.full(6, variances.mean()) if covariance_type == "spherical" else variances
    np.testing.assert_allclose(mixture.diagonal()[0], expected + 1e-6, rtol=1e-9)
    assert summary["converged"]


def test_all_mass_on_one_component_is_no_error():
    data = clustered(300)
    start = a_start(data, 3)
    state = run(data, Mixture(np.array([0.0, 1.0, 0.0]), start.means, start.variances), 5)
    assert np.isfinite(state.lower_bounds).all()
    assert state.mixture.weights.sum() == pytest.approx(1)


def test_full_covariances_beyond_the_limit_are_refused_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"full covariances of 8192 components in 768 dimensions take 38.7 GB, more "):
        covariance_shape("full", 8192, 768)
    monkeypatch.setattr(gaussian, "MAX_COVARIANCE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"set gmm.covariance_type to diag or tied, or use fewer components"):
        fit(tmp_path, clustered(512), covariance_type="full")


def test_a_checkpoint_of_another_configuration_is_never_resumed(tmp_path):
    data = clustered(512)
    first = fit(tmp_path, data)
    other = stage.fit(
        token_store(tmp_path / "cls_tokens.zarr", data),
        dataclasses.replace(SETTINGS, e_step="truncated"),
        tmp_path / "gmm",
        ALONE,
    )
    folders = list((tmp_path / "gmm").glob("state-*"))
    assert len(folders) == 2
    assert first["settings"]["e_step"] != other["settings"]["e_step"]


def test_a_foreign_checkpoint_is_named(tmp_path):
    path = tmp_path / "iteration-00003.safetensors"
    mixture = a_start(clustered(), 5)
    mixture.save(path, {})
    with pytest.raises(ValueError, match="no checkpoint of fit_gmm"):
        stage.load_iteration(path)


def test_changed_given_means_start_again(tmp_path):
    data, path = clustered(512), tmp_path / "means.npy"
    np.save(path, data[:5])
    fit(tmp_path, data, init_means=str(path))
    np.save(path, data[5:10])
    fit(tmp_path, data, init_means=str(path))
    assert len(list((tmp_path / "gmm").glob("state-*"))) == 2


def test_the_best_of_several_starts_is_kept(tmp_path):
    data = clustered(512, k=12, spread=5.0)
    summary = fit(tmp_path, data, n_init=3, init="random_from_data")
    ends = summary["final_lower_bounds_of_starts"]
    assert len(set(ends)) > 1
    assert summary["lower_bounds"][-1] == max(ends)
    (tmp_path / "again").mkdir()
    one = fit(tmp_path / "again", data, n_init=1, init="random_from_data")
    assert one["lower_bounds"][-1] == ends[0]


@pytest.mark.parametrize("e_step", ["exact", "truncated"])
def test_any_number_of_processes_finds_the_same_mixture(tmp_path, e_step):
    data = clustered(1024, k=24, spread=3.0)
    token_store(tmp_path / "cls_tokens.zarr", data)
    chosen = dataclasses.replace(SETTINGS, n_components=24, e_step=e_step, max_iter=6, tol=0.0, precision="float32")
    program = "import sys; from mmfm.cli.__main__ import main; sys.exit(main(sys.argv[1:]))"
    bounds = []
    for world in (1, 2, 3, 4):
        out = tmp_path / f"gmm{world}"
        arguments = ["fit_gmm", "--settings", json.dumps({"gmm": dataclasses.asdict(chosen)}), "--tokens",
                     str(tmp_path / "cls_tokens.zarr"), "--out-dir", str(out)]  # fmt: skip
        run_processes(program, arguments, tmp_path, world)
        bounds.append(store.read_json(out / "report.json")["lower_bounds"])
    assert len(bounds[0]) == 6
    for other in bounds[1:]:
        np.testing.assert_allclose(other, bounds[0], rtol=1e-6)
    labels = [store.map_arrays(tmp_path / f"gmm{w}" / "assignment.safetensors")[0]["labels"] for w in (1, 4)]
    assert (labels[0] != labels[1]).mean() < 0.01


def test_narrow_components_far_from_the_centre_are_right_in_float32():
    generator = np.random.default_rng(0)
    means = generator.normal(0, 3, (6, 32))
    variances = np.ones((6, 32))
    variances[[1, 4]] = 1e-6
    x = torch.from_numpy(means[generator.integers(6, size=200)] + 1e-3 * generator.normal(size=(200, 32)))
    mixture = Mixture(np.full(6, 1 / 6), means, variances)
    assert mixture.sharp().tolist() == [1, 4]
    exact, fast = mixture.log_prob(x.float(), torch.float64), mixture.log_prob(x.float(), torch.float32)
    np.testing.assert_allclose(fast, exact, atol=0.01)
