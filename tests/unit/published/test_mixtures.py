"""Import of mixtures in the published layout and in this project's own."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import zarr

from mmfm.infra import store
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.mapped_rows import MappedRows
from mmfm.mixture.spatial import SpatialMixture
from mmfm.published import mixtures
from mmfm.published.mixtures import import_mixture, import_spatial, read_mixture
from support import published_folder as tiny
from support.places import ROOT

SHAPE = (tiny.CHANNELS, tiny.GRID, tiny.GRID)


@pytest.fixture(scope="module")
def published():
    return tiny.mixtures()


@pytest.fixture
def files(tmp_path, published):
    """Statistics without a mean, and the mixture of the tokens."""
    torch.save({"mean": None, "var": torch.ones(SHAPE)}, tmp_path / "stats.pt")
    (tmp_path / "cls.pkl").write_bytes(pickle.dumps(tiny.cls_pickle(published[0])))
    import_mixture(tmp_path / "cls.pkl", tmp_path / "gmm.safetensors", tmp_path / "stats.pt", tiny.MODES)
    return tmp_path


def spatial_of(folder, content, protocol=4):
    (folder / "spatial.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    return import_spatial(folder / "spatial.pkl", folder / "s.zarr", folder / "stats.pt", folder / "gmm.safetensors")


@pytest.mark.parametrize("kind", ["diag", "spherical", "tied", "full"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_mixture_gives_the_posterior_of_scikit_learn(tmp_path, kind, dtype):
    from sklearn.mixture import GaussianMixture

    tokens = np.random.default_rng(0).normal(size=(300, 5)).astype(dtype) * [1, 2, 3, 1, 1]
    fitted = GaussianMixture(3, covariance_type=kind, random_state=0).fit(tokens.astype(dtype))
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(fitted))
    found = read_mixture(tmp_path / "bare.pkl")
    expected = fitted.predict_proba(tokens.astype(dtype))
    assert np.allclose(found.predict_proba(torch.from_numpy(tokens)).numpy(), expected, atol=1e-4)


def test_an_imported_mixture_is_a_mixture_of_this_project(files, published):
    made = Mixture.load(files / "gmm.safetensors")
    assert np.array_equal(made.means.numpy(), published[0].means_) and "labels" not in made.metadata
    assert made.metadata["source"] == {"file": "cls.pkl", "sha256": store.file_digest(files / "cls.pkl")}
    # One's own file is imported by the same way.
    import_mixture(files / "gmm.safetensors", files / "again.safetensors", files / "stats.pt", tiny.MODES)
    assert torch.equal(Mixture.load(files / "again.safetensors").means, made.means)


def test_a_spatial_mixture_is_stored_as_training_maps_it(files, published):
    _, content = published
    found = spatial_of(files, content)
    made = SpatialMixture.open(files / "s.zarr")
    means = content["means"].reshape(-1, *SHAPE).astype(np.float32)
    rows = MappedRows(made.means)
    rows.check()
    assert np.array_equal(rows.gather(torch.arange(tiny.MODES)).numpy(), means)
    assert np.array_equal(made.variances, content["variances"].astype(np.float32).astype(np.float64))
    assert made.counts.tolist() == [40] * tiny.MODES and np.array_equal(made.weights, content["weights"])
    assert made.attributes["stats_digest"] == store.file_digest(files / "stats.pt")
    assert made.attributes["gmm_digest"] == Mixture.load(files / "gmm.safetensors").metadata["digest"]
    assert found["variance"] == pytest.approx(1, abs=0.05) and found["centre"] == pytest.approx(0, abs=1e-9)


def test_blocks_of_modes_give_the_same(files, published, monkeypatch):
    _, content = published
    whole = spatial_of(files, content)
    digest = SpatialMixture.open(files / "s.zarr").attributes["digest"]
    monkeypatch.setattr(mixtures, "_BLOCK_BYTES", 2 * 8 * tiny.CHANNELS * tiny.GRID**2)
    monkeypatch.setattr("mmfm.published.pickles._IN_FILE", 100)  # as at full size, arrays stay in the file
    for protocol in (4, 5):
        assert spatial_of(files, content, protocol) == pytest.approx(whole)
        assert SpatialMixture.open(files / "s.zarr").attributes["digest"] == digest


def test_a_mean_of_zeros_is_a_row_too(files, published):
    means = published[1]["model"].means_.copy()
    means[3] = 0
    spatial_of(files, changed(published[1], means_=means))
    MappedRows(SpatialMixture.open(files / "s.zarr").means).check()


def test_a_store_of_this_project_is_checked_and_linked(files, published):
    spatial_of(files, published[1])
    own, copied = files / "s.zarr", files / "copy.zarr"
    import_spatial(own, copied, files / "stats.pt", files / "gmm.safetensors")
    assert SpatialMixture.open(copied).attributes == SpatialMixture.open(own).attributes
    torch.save({"mean": None, "var": 2 * torch.ones(SHAPE)}, files / "stats.pt")
    with pytest.raises(ValueError, match="made with another file of 'stats'"):
        import_spatial(own, copied, files / "stats.pt", files / "gmm.safetensors")


def changed(content: dict, **attributes) -> dict:
    """Return a spatial mixture with other attributes of its model."""
    other = {**content, "model": copy.copy(content["model"])}
    other["model"].__dict__.update(attributes)
    return other


def test_other_mixtures_are_refused(files, published):
    fitted, content = published
    model = content["model"]

    def refused(message, value):
        with pytest.raises(ValueError, match=message) as caught:
            spatial_of(files, value)
        assert "\n" not in str(caught.value) and not (files / "s.zarr").exists()
        assert not list(files.glob(".*"))

    bad = model.means_.copy()
    bad[4, 3] = np.nan
    refused("the mean of mode 4 .* is not finite", changed(content, means_=bad))
    refused("mode 2 .* has the variance 0", changed(content, covariances_=np.array([1, 1, 0, 1, 1, 1.0])))
    refused("has diag covariances", changed(content, covariance_type="diag"))
    refused("not a spatial mixture of these latents", changed(content, means_=model.means_[:, :-1]))
    refused("has other weights than", changed(content, weights_=np.array([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])))
    refused("has 3 modes, but 6 are wanted", tiny.mixtures(3)[1])
    refused("holds no mixture", {"labels": np.zeros(3)})
    refused("never fitted: it lacks", {"model": type(fitted)(3)})
    refused("not an array of numbers", changed(content, means_=[1, 2]))
    scaled = changed(content, means_=2 * model.means_, covariances_=4 * model.covariances_)
    refused("made with other latent statistics: .* variance .*, not 1", scaled)


def test_statistics_with_a_mean_need_modes_around_zero(files, published):
    _, content = published
    shifted = changed(content, means_=content["model"].means_ + 0.5)
    spatial_of(files, shifted)  # latents that were divided and not centred
    torch.save({"mean": torch.ones(SHAPE), "var": torch.ones(SHAPE)}, files / "stats.pt")
    with pytest.raises(ValueError, match="made with latent statistics without a mean"):
        spatial_of(files, shifted)
    spatial_of(files, content)


def test_other_mixtures_of_tokens_are_refused(files, published):
    with pytest.raises(ValueError, match=r"has 6 modes, but 8 are wanted; set 'gmm.n_components' to 6"):
        import_mixture(files / "cls.pkl", files / "x", files / "stats.pt", 8)
    torch.save({"mean": None, "var": torch.ones(8, 4, 4)}, files / "stats.pt")
    with pytest.raises(ValueError, match=r"in 16 dimensions, but .* 8 channels"):
        import_mixture(files / "cls.pkl", files / "x", files / "stats.pt", tiny.MODES)


LARGE = """
import sys, time
from pathlib import Path
from mmfm.published.mixtures import import_spatial
folder = Path(sys.argv[1])
def peak():  # of this program; ru_maxrss would include the process that started it
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1])
before, start = peak(), time.monotonic()
import_spatial(folder / "spatial.pkl", folder / "s.zarr", folder / "stats.pt", folder / "gmm.safetensors")
print(peak() - before, time.monotonic() - start)
"""


def imported_in_a_process(folder, k: int, shape: tuple[int, int, int]) -> tuple[float, float]:
    """Import a spatial mixture of k modes; return the peak above the imports in MB, and seconds."""
    from sklearn.mixture import GaussianMixture

    weights = np.full(k, 1 / k)
    Mixture(weights, np.random.default_rng(0).normal(size=(k, shape[0])), np.ones((k, shape[0]))).save(
        folder / "gmm.safetensors", {}
    )
    torch.save({"mean": None, "var": torch.ones(shape)}, folder / "stats.pt")
    model = GaussianMixture(k, covariance_type="spherical")
    model.weights_, model.covariances_ = weights, np.full(k, 0.75)
    model.means_ = 0.5 * np.random.default_rng(1).choice([-1.0, 1.0], (k, int(np.prod(shape))))
    with open(folder / "spatial.pkl", "wb") as file:
        pickle.dump({"model": model, "means": model.means_}, file)
    del model
    run = subprocess.run(
        [sys.executable, "-c", LARGE, str(folder)], capture_output=True, text=True, cwd=ROOT, check=True
    )  # fmt: skip
    peak, seconds = map(float, run.stdout.split())
    return peak / 1024, seconds


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """A file of 270 MB: held whole in float64 and float32 it would take 400 MB more."""
    peak, _ = imported_in_a_process(tmp_path, 512, (64, 32, 32))
    assert peak < 150
    assert zarr.open_array(tmp_path / "s.zarr" / "means", mode="r").nchunks_initialized == 512
