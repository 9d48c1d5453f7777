"""What can be wrong with tokens, settings and checkpoints of fit_gmm, and what it says then."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from mmfm.infra import store
from mmfm.mixture import gaussian, moments
from mmfm.mixture.gaussian import Mixture, covariance_shape
from mmfm.stages import fit_gmm as stage
from support.mixtures import ALONE, SETTINGS, a_start, clustered, fit_tokens, run, run_processes, token_store


def fit(tmp_path, data, **changes):
    tokens = token_store(tmp_path / "cls_tokens.zarr", data)
    return fit_tokens(tokens, dataclasses.replace(SETTINGS, **changes), tmp_path / "gmm", ALONE)


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
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_duplicates_far_apart_have_the_variance_that_was_added(tmp_path, covariance_type, scale):
    """Squares of 1e14 and variances of 1e-6: neither may be a difference of the other's."""
    data = np.repeat(clustered(11, spread=20.0) * np.float32(scale), 47, axis=0)
    summary = fit(tmp_path, data, n_components=11, covariance_type=covariance_type, max_iter=10)
    mixture = Mixture.load(tmp_path / "gmm" / "gmm.safetensors")
    np.testing.assert_allclose(mixture.diagonal(), 1e-6, rtol=1e-6)
    expected = -0.5 * 6 * np.log(2 * np.pi * 1e-6) - np.log(11)
    assert summary["log_likelihood"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("init", ["k-means++", "random_from_data"])
@pytest.mark.parametrize("e_step", ["exact", "truncated"])
def test_starts_from_rows_work_in_many_dimensions(tmp_path, init, e_step):
    """With variances of 1e-6 the log-joints are -1e9, where float32 can't tell numbers apart that differ by 30."""
    data = np.random.default_rng(0).normal(size=(300, 768)).astype(np.float32)
    summary = fit(tmp_path, data, n_components=8, init=init, e_step=e_step, precision="float32", max_iter=2)
    assert summary["lower_bounds"][0] < -1e8 and summary["lower_bounds"][1] > -1200


@pytest.mark.parametrize("covariance_type", ["diag", "spherical", "tied", "full"])
def test_float32_is_right_for_clusters_far_apart(tmp_path, covariance_type):
    data = clustered(700, k=10, spread=1e4)
    summary = fit(tmp_path, data, n_components=10, covariance_type=covariance_type, precision="float32", max_iter=20)
    mixture = Mixture.load(tmp_path / "gmm" / "gmm.safetensors")
    assert summary["log_likelihood"] == pytest.approx(mixture.score(torch.from_numpy(data)), abs=1e-4)


def test_covariances_with_negative_eigenvalues_are_mended():
    rounded = torch.diag(torch.tensor([4.0, -1e-9, 2.0], dtype=torch.float64))
    covariances, eigenvalues = moments.clip_eigenvalues(rounded)
    assert eigenvalues.min() == 0
    np.testing.assert_allclose(covariances, torch.diag(torch.tensor([4.0, 0.0, 2.0])), atol=1e-12)


@pytest.mark.parametrize("covariance_type", ["diag", "spherical", "full"])
def test_a_component_without_rows_is_rescued_without_regularisation(tmp_path, covariance_type):
    data, path = clustered(512, k=3, spread=5.0), tmp_path / "means.npy"
    np.save(path, np.concatenate((data[:4], np.full((1, 6), 1e6, np.float32))))
    summary = fit(tmp_path, data, covariance_type=covariance_type, reg_covar=0.0, init_means=str(path))
    assert summary["reseeded_components"] == 1 and summary["empty_components"] == 0


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
    other = fit_tokens(
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
    with pytest.raises(ValueError, match="not a checkpoint of fit_gmm"):
        stage.load_iteration(path)


def test_damage_to_a_checkpoints_header_is_always_seen(tmp_path):
    state = run(clustered(), a_start(clustered(), 3), 2)
    stage.save_iteration(tmp_path, state)
    path = tmp_path / "iteration-00002.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    for at in range(8, 8 + length):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        try:
            found = stage.load_iteration(path)
        except ValueError:
            continue
        # What was hit says nothing: a space at the end, or a digit of a number that reads the same.
        assert found.lower_bounds == state.lower_bounds and found.slack == state.slack
        assert torch.equal(found.mixture.means, state.mixture.means)
        assert json.loads(path.read_bytes()[8 : 8 + length]).keys() == header.keys()


def test_a_lower_max_iter_begins_again_and_says_so(tmp_path, capsys):
    data = clustered(512)
    fit(tmp_path, data, max_iter=6, tol=0.0)
    summary = fit(tmp_path, data, max_iter=3, tol=0.0)
    assert summary["n_iter"] == 3
    said = capsys.readouterr().err
    assert "resuming at iteration 0, the newest within gmm.max_iter; an earlier run reached 6" in said


def test_more_starts_keep_those_that_are_done(tmp_path):
    data = clustered(512, k=12, spread=5.0)
    fit(tmp_path, data, n_init=1, init="random_from_data")
    (state,) = (tmp_path / "gmm").glob("state-*")
    done = {path: path.stat().st_mtime_ns for path in state.glob("iteration-*")}
    summary = fit(tmp_path, data, n_init=2, init="random_from_data")
    assert len(summary["final_lower_bounds_of_starts"]) == 2
    assert {path: path.stat().st_mtime_ns for path in state.glob("iteration-*")} == done


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x09\x00", "objects", "text", "short", None])
def test_a_bad_file_of_means_is_named(tmp_path, content):
    path = tmp_path / "means.npy"
    arrays = {"objects": np.array([{}], object), "text": np.array(["a"]), "short": np.zeros((4, 6))}
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        np.save(path, arrays[content], allow_pickle=True)
    with pytest.raises(ValueError, match=rf"gmm.init_means: '{path}' .* finite means \(5, 6\)"):
        fit(tmp_path, clustered(512), init_means=str(path))


def test_given_means_keep_their_digits(tmp_path):
    data, path = (1000 + 0.01 * clustered(512).astype(np.float64)).astype(np.float32), tmp_path / "means.npy"
    means = data[:5].astype(np.float64) + 1e-6
    np.save(path, means)
    fit(tmp_path, data, init_means=str(path), max_iter=1)
    (first,) = (tmp_path / "gmm").glob("state-*/iteration-00000.safetensors")
    np.testing.assert_array_equal(Mixture.load(first).means, means)


def test_changed_given_means_start_again(tmp_path):
    data, path = clustered(512), tmp_path / "means.npy"
    np.save(path, data[:5])
    fit(tmp_path, data, init_means=str(path))
    fit(tmp_path, data, init_means=str(path.rename(tmp_path / "moved.npy")))
    assert len(list((tmp_path / "gmm").glob("state-*"))) == 1
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
    assert mixture.densities(torch.float32).in_float64.tolist() == [1, 4]
    exact, fast = mixture.log_prob(x.float(), torch.float64), mixture.log_prob(x.float(), torch.float32)
    np.testing.assert_allclose(fast, exact, atol=0.01)
