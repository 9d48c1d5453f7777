"""Files for other programs: their layout, and that ours reads back the same numbers."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfm import data
from mmfm.cli.__main__ import main
from mmfm.config import Fid, StageConfig
from mmfm.evaluation.adm import AdmFile
from mmfm.evaluation.detector import Detector, Outputs
from mmfm.evaluation.reference import Reference
from mmfm.evaluation.scoring import evaluate
from mmfm.infra import npz, store
from mmfm.infra.distributed import Ranks
from mmfm.stages import fid_reference as stage
from support.tiny import write_images, write_listing

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
KINDS = ("frechet", "sfid", "inception_score", "precision", "recall")
N, KEPT = 40, 24


def pooled(images: torch.Tensor, grid: int) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, grid).flatten(1)


def network(images: torch.Tensor) -> Outputs:
    return Outputs(pooled(images, 2), pooled(images, 3), 8 * pooled(images, 1))


CELLS = Detector("cells", "0", 12, False, lambda x: network(x).features, CPU, run_all=network, spatial_dimension=27)


def section(*metrics: str) -> StageConfig:
    keys = {"detector": "inception", "weights": "unused", "reference": "train", "batch_size": 8, "workers": 0}
    values = {"image": {"size": 32}, "fid": {**keys, "metrics": ["frechet", *metrics], "reference_images": KEPT}}
    return StageConfig.build("fid_reference", values)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A listing of 40 images, its reference for all of ADM's metrics, and the file for other programs."""
    root = tmp_path_factory.mktemp("made")
    listing = write_listing(root / "listing.safetensors", write_images(root / "images", N))
    reference, out = root / "reference.safetensors", root / "reference.npz"
    stage.fid_reference(section("sfid", "precision"), CELLS, listing, None, reference, ALONE)
    line = ["--reference", reference, "--listing", listing, "--images", KEPT, "--out", out]
    assert main(["adm_reference", *map(str, line)]) == 0
    return listing, reference, out


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images as `sample` writes them."""
    images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8)
    path = tmp_path_factory.mktemp("samples") / "images.npz"
    npz.write_parts(path, images.shape, np.uint8, [images])
    return path


def assert_streamable(path: Path, shape: tuple[int, ...]) -> None:
    """Assert what the evaluator's reader of images needs: it streams arr_0 from the archive without mapping it."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        version = np.lib.format.read_magic(member)
        assert version in ((1, 0), (2, 0)), "another version is loaded into memory as a whole"
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
        found, fortran, dtype = read(member)
        assert (found, fortran, dtype) == (shape, False, np.uint8)
        assert len(member.read()) == np.prod(shape)
    with np.load(path, allow_pickle=False) as archive:
        assert archive["arr_0"].shape == shape


def test_the_layout_is_the_evaluators(made):
    listing, reference, path = made
    with np.load(path, allow_pickle=False) as archive:
        found = {name: (archive[name].shape, archive[name].dtype) for name in archive.files}
        arrays = {name: archive[name] for name in archive.files}
    moments = {"mu": (12,), "sigma": (12, 12), "mu_s": (27,), "sigma_s": (27, 27)}
    assert found == {
        "arr_0": ((KEPT, 32, 32, 3), np.dtype(np.uint8)),
        **{name: (shape, np.dtype(np.float64)) for name, shape in moments.items()},
    }
    assert_streamable(path, (KEPT, 32, 32, 3))
    rows = [i * N // KEPT for i in range(KEPT)]
    images = next(data.image_batches(listing, 32, [rows]))[1]
    assert np.array_equal(arrays["arr_0"], images.permute(0, 2, 3, 1).numpy())
    known = Reference.open(reference)
    assert np.array_equal(arrays["mu"], known.mu) and np.array_equal(arrays["sigma_s"], known.spatial.covariance)


def test_generated_images_have_the_evaluators_layout(samples):
    with np.load(samples, allow_pickle=False) as archive:
        assert archive.files == ["arr_0"], "with mu in it, the evaluator would not look at the images"
    assert_streamable(samples, (30, 32, 32, 3))


def test_what_is_read_back_gives_the_same_numbers(made, samples):
    """As a file for `mmfm evaluate`, every metric is that of the reference itself."""
    _, reference, path = made
    direct = evaluate(samples, reference, CELLS, ALONE, KINDS)["metrics"]
    read = evaluate(samples, path, CELLS, ALONE, KINDS)["metrics"]
    assert read == pytest.approx(direct, rel=1e-6) and direct["frechet"] > 0
    images_alone = evaluate(samples, path, CELLS, ALONE, ["frechet"])["metrics"]["frechet"]
    assert images_alone == pytest.approx(direct["frechet"], rel=1e-9), "moments of all images, not of those in the file"


def test_as_fid_reference_it_is_the_same_reference(made, tmp_path):
    _, reference, path = made
    asked: Fid = section("sfid", "kid").fid
    stage.import_npz(path, CELLS, tmp_path / "again.safetensors", asked, 32, ALONE)
    again, known = Reference.open(tmp_path / "again.safetensors"), Reference.open(reference)
    assert np.array_equal(again.mu, known.mu) and np.array_equal(again.sigma, known.sigma)
    assert np.array_equal(again.spatial.mean, known.spatial.mean) and np.allclose(again.bank, known.bank, atol=1e-6)


def test_without_spatial_moments_it_says_what_is_missing(made, tmp_path, capsys):
    listing, _, _ = made
    reference = tmp_path / "plain.safetensors"
    stage.fid_reference(section(), CELLS, listing, None, reference, ALONE)
    line = ["adm_reference", "--reference", str(reference), "--listing", str(listing), "--out", str(tmp_path / "r.npz")]
    assert main(line) == 0
    errors = capsys.readouterr().err
    assert "no mu_s and sigma_s, without which guided-diffusion's evaluator.py stops" in errors
    assert "40/40 images" in errors
    found = AdmFile.open(tmp_path / "r.npz")
    assert found.spatial is None and len(found.images) == N


def test_mistakes(made, tmp_path, capsys):
    listing, reference, path = made
    other = write_listing(tmp_path / "other.safetensors", write_images(tmp_path / "images", 5, seed=3))
    imported = tmp_path / "imported.safetensors"
    stage.import_npz(path, CELLS, imported, section().fid, 32, ALONE)
    out = tmp_path / "r.npz"
    for given, message in (
        ({"--listing": other}, "made from the images of another listing"),
        ({"--reference": imported}, "was imported from reference.npz"),
        ({"--reference": tmp_path / "absent"}, "no reference at"),
        ({"--images": 1}, "--images is 1, but must be at least 2"),
        ({"--out": tmp_path / "r.bin"}, "does not end in .npz"),
    ):
        words = {"--reference": reference, "--listing": listing, "--out": out, **given}
        assert main(["adm_reference", *(str(word) for pair in words.items() for word in pair)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not out.exists()


def test_others_beside_the_large_array(tmp_path):
    """Equal contents give equal files, and a digest of the large array alone."""
    array, others = np.arange(24, dtype=np.uint8).reshape(2, 3, 4), {"mu": np.linspace(0, 1, 5)}
    digest = npz.write_parts(tmp_path / "a.npz", array.shape, np.uint8, [array[:1], array[1:]], others)
    npz.write_parts(tmp_path / "b.npz", array.shape, np.uint8, [array], others)
    assert digest == store.array_digest(array)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert np.array_equal(npz.map_array(tmp_path / "a.npz", "mu"), others["mu"])
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        npz.write_parts(tmp_path / "c.npz", array.shape, np.uint8, [array], {"x": np.array([{}], object)})
