"""Starts of EM, and the handling of faiss."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from mmfm.infra.distributed import Ranks
from mmfm.mixture import initial, kmeans
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.streaming import Rows
from support.mixtures import ALONE, SETTINGS, clustered


def start(data, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    read = lambda a, b: data[a:b]  # noqa: E731
    return initial.start(Rows(read, len(data), settings.chunk_size, ALONE, block_rows=160), settings)[0]


def test_kmeans_starts_from_the_moments_of_its_clusters():
    data = clustered(600)
    mixture = start(data)
    rows = Rows(lambda a, b: data[a:b], 600, 64, ALONE)
    labels = kmeans.lloyd(rows, torch.from_numpy(initial._centres(rows, SETTINGS, 0)))[1].numpy()
    for k in range(5):
        own = data[labels == k].astype(np.float64)
        np.testing.assert_allclose(mixture.means[k], own.mean(0), rtol=1e-6)
        np.testing.assert_allclose(mixture.variances[k], own.var(0) + 1e-6, rtol=1e-6)
        assert mixture.weights[k].item() == pytest.approx(len(own) / 600)


def test_lloyd_with_all_candidates_is_scikit_learns(monkeypatch):
    monkeypatch.setattr(kmeans, "ROUNDS", 0)
    monkeypatch.setattr(kmeans, "ITERATIONS", 50)
    data = clustered(600, offset=50.0)
    rows = Rows(lambda a, b: data[a:b], 600, 64, Ranks(0, 1, torch.device("cpu")), block_rows=128)
    centres, labels = kmeans.lloyd(rows, torch.from_numpy(data[:5]))
    model = KMeans(5, init=data[:5], n_init=1, tol=0, max_iter=50).fit(data)
    np.testing.assert_allclose(centres, model.cluster_centers_, rtol=1e-5)
    np.testing.assert_array_equal(labels, model.labels_)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_nearest_does_not_depend_on_the_scale(scale):
    data = (scale * clustered(300, c=40, k=5)).astype(np.float32)
    rows, centres = Rows(lambda a, b: data[a:b], 300, 64, ALONE), data[:20]
    found = kmeans.nearest_centre(rows, torch.from_numpy(centres))
    distances = ((data[:, None].astype(np.float64) - centres) ** 2).sum(2)
    np.testing.assert_array_equal(found, distances.argmin(1))


def test_lloyd_gives_an_empty_cluster_rows():
    data = clustered(600, spread=20.0)
    centres = np.concatenate([data[:4], data[:1] + 1e4]).astype(np.float32)
    labels = kmeans.lloyd(Rows(lambda a, b: data[a:b], 600, 64, ALONE), torch.from_numpy(centres))[1]
    assert (torch.bincount(labels.long(), minlength=5) > 0).all()


def test_faiss_moves_seeds_to_the_centres_of_separate_clusters():
    data = clustered(600, spread=50.0)
    centres = initial.kmeans(data, data[initial.kmeans_plusplus(torch.from_numpy(data), 5, 0)])
    nearest = ((data[:, None] - centres) ** 2).sum(2)
    assert np.sqrt(nearest.min(1)).max() < 15
    assert np.bincount(nearest.argmin(1)).min() > 90


@pytest.mark.gpu
def test_faiss_on_a_gpu_finds_the_centres_of_the_cpu():
    if not (torch.cuda.is_available() and initial.faiss_has_gpu()):
        pytest.skip("needs a GPU and faiss-gpu")
    data = clustered(600, spread=50.0)
    np.testing.assert_allclose(
        initial.kmeans(data, data[:5], "cuda"), initial.kmeans(data, data[:5], "cpu"), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("name", ["means.npy", "gmm.safetensors"])
def test_given_means_are_the_start(tmp_path, name):
    data = clustered(600, spread=20.0)
    labels = ((data[:, None] - data[:5]) ** 2).sum(2).argmin(1)
    if name == "means.npy":
        np.save(tmp_path / name, data[:5])
    else:
        Mixture(np.full(5, 0.2), data[:5].astype(np.float64), np.ones(5)).save(tmp_path / name, {})
    mixture = start(data, init_means=str(tmp_path / name))
    np.testing.assert_array_equal(mixture.means, data[:5])
    np.testing.assert_allclose(mixture.weights, np.bincount(labels) / 600)
    np.testing.assert_allclose(mixture.variances, [data[labels == k].var(0) for k in range(5)], rtol=1e-3, atol=1e-4)


def test_given_means_of_another_shape_are_refused(tmp_path):
    np.save(tmp_path / "means.npy", np.zeros((4, 6)))
    with pytest.raises(ValueError, match=r"holds an array \(4, 6\) instead of .* finite means \(5, 6\)"):
        start(clustered(), init_means=str(tmp_path / "means.npy"))


def test_spherical_variances_are_the_mean_of_the_diagonal():
    data = clustered(600, spread=50.0)
    diagonal, spherical = start(data), start(data, covariance_type="spherical")
    np.testing.assert_allclose(spherical.variances, diagonal.variances.mean(1), rtol=1e-9)


@pytest.mark.parametrize("init", ["kmeans", "k-means++", "random_from_data"])
def test_a_start_is_a_function_of_the_seed(init):
    data = clustered()
    first, again, other = start(data, init=init), start(data, init=init), start(data, init=init, seed=1)
    assert torch.equal(first.means, again.means)
    assert torch.equal(first.variances, again.variances)
    assert not torch.equal(first.means, other.means)


@pytest.mark.parametrize("init", ["k-means++", "random_from_data"])
@pytest.mark.parametrize("covariance_type", ["diag", "spherical"])
def test_starts_from_single_rows_are_scikit_learns(init, covariance_type):
    data = clustered()
    mixture = start(data, init=init, covariance_type=covariance_type)
    rows = {row.tobytes() for row in data}
    means = mixture.means.float().numpy()
    assert all(mean.tobytes() in rows for mean in means)
    assert len({mean.tobytes() for mean in means}) == 5
    assert (mixture.variances == 1e-6).all()
    assert (mixture.weights == 0.2).all()


def test_kmeans_plusplus_spreads_better_than_chance():
    data = torch.from_numpy(clustered(600, k=12, spread=30.0))
    chosen = initial.kmeans_plusplus(data, 12, seed=0)
    potential = torch.cdist(data, data[chosen]).min(1).values.square().mean()
    random = torch.cdist(data, data[:12]).min(1).values.square().mean()
    assert potential < 30  # every cluster has a row: what is left is the spread within them
    assert random > 5 * potential


def test_kmeans_plusplus_survives_more_components_than_distinct_rows():
    data = torch.ones(10, 3)
    data[4] = 2.0
    chosen = initial.kmeans_plusplus(data, 4, seed=0)
    assert {0.0, 1.0} == set((data[chosen, 0] - 1).tolist())


@pytest.mark.parametrize("init", ["kmeans", "k-means++", "random_from_data"])
def test_duplicates_are_no_error(init):
    data = np.repeat(clustered(10), 30, axis=0)
    assert start(data, init=init, n_components=20).means.isfinite().all()


def test_kmeans_sees_a_bounded_sample(monkeypatch):
    seen = []
    monkeypatch.setattr(initial, "kmeans", lambda rows, seeds, *_: seen.append(rows) or seeds)
    start(clustered(), init="kmeans")
    assert seen[0].shape == (100, 6)
    assert len(np.unique(seen[0], axis=0)) == 100


def test_rows_are_read_in_blocks():
    data = np.arange(40, dtype=np.float32).reshape(20, 2)
    reads = []

    def read(a, b):
        reads.append((a, b))
        return data[a:b]

    indices = np.array([0, 3, 9, 17])
    np.testing.assert_array_equal(initial.read_rows(read, indices, 5), data[indices])
    assert max(b - a for a, b in reads) <= 5
    assert (10, 15) not in reads


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fma avx2 avx512f avx512dq avx512bw avx512vl", "SkylakeX"),
        ("fma avx2 avx512f", "Haswell"),
        ("sse2 avx", None),
    ],
)
def test_blas_kernels_follow_the_cpu(flags, expected):
    assert initial.blas_core_type(f"processor\t: 0\nflags\t\t: fpu {flags}\n") == expected
    assert initial.blas_core_type("Features : asimd") is None


def test_importing_faiss_leaves_the_environment_alone(monkeypatch):
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    initial.import_faiss()
    assert "OPENBLAS_CORETYPE" not in os.environ
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Zen")
    initial.import_faiss()
    assert os.environ["OPENBLAS_CORETYPE"] == "Zen"


def test_two_faiss_wheels_are_refused(monkeypatch):
    monkeypatch.setattr(initial, "faiss_wheels", lambda: ["faiss-cpu", "faiss-gpu-cu12"])
    with pytest.raises(ValueError, match="faiss-cpu and faiss-gpu-cu12 are both installed"):
        initial.kmeans(np.zeros((4, 2), np.float32), np.zeros((2, 2), np.float32))


def test_a_gpu_is_refused_by_a_cpu_build(monkeypatch):
    monkeypatch.setattr(initial, "faiss_has_gpu", lambda: False)
    with pytest.raises(ValueError, match="has no GPU; install faiss-gpu, or use device 'cpu'"):
        initial.kmeans(np.zeros((4, 2), np.float32), np.zeros((2, 2), np.float32), device="cuda")


def test_fewer_rows_than_centroids_are_refused():
    with pytest.raises(ValueError, match="3 rows, k = 4"):
        initial.kmeans(np.zeros((3, 2), np.float32), np.zeros((4, 2), np.float32))


def test_kmeans_plusplus_takes_no_row_twice_where_a_draw_is_exactly_0(monkeypatch):
    monkeypatch.setattr(initial.rng, "uniform", lambda seed, name, keys, shape: torch.zeros(len(keys), *shape))
    rows = torch.tensor([[0.0], [0.0], [1.0], [5.0]])
    found = initial.kmeans_plusplus(rows, 3, 0)
    assert sorted(rows[found, 0].tolist()) == [0, 1, 5]


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def test_given_means_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "means.npy", np.array([[Bomb()]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="can't be read"):
        initial.given_means(tmp_path / "means.npy", 1, 1)
    assert not (tmp_path / "exploded").exists()
