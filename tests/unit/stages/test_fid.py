"""The stage fid: the distance itself, what the result says of it, and what is refused."""

import io
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfm.cli.__main__ import main
from mmfm.config import Fid, StageConfig
from mmfm.evaluation import scores
from mmfm.evaluation.collected import Collected
from mmfm.evaluation.detector import Detector, load_detector
from mmfm.evaluation.features import image_statistics
from mmfm.evaluation.frechet import frechet_distance
from mmfm.evaluation.manifold import manifold
from mmfm.evaluation.reference import Reference
from mmfm.infra import npz, store
from mmfm.infra.distributed import Ranks
from mmfm.stages import fid
from mmfm.stages.fid_reference import import_npz
from support.fid_runs import (
    SETTINGS,
    arguments,
    garments,  # noqa: F401 (fixture)
    reference,  # noqa: F401 (fixture)
    run,
    write_reference,
    write_samples,
)
from support.places import DETECTOR

ALONE = Ranks(0, 1, torch.device("cpu"))


def section() -> Fid:
    return StageConfig.build("fid", SETTINGS).fid


def test_distance_of_the_same_images_is_zero_and_grows_with_corruption(garments, reference, tmp_path):
    distances = []
    for strength in (0, 10, 30):
        noise = strength * np.random.default_rng(0).normal(size=garments[:300].shape)
        spoiled = (garments[:300] + noise).clip(0, 255).astype(np.uint8)
        _, result = run(write_samples(tmp_path / str(strength), spoiled), reference, tmp_path)
        distances.append(result["frechet_distance"])
    assert distances[0] < 1e-4 and distances[0] + 1 < distances[1] < distances[2] / 2


def test_distance_equals_that_of_numpy_moments(garments, reference, tmp_path):
    _, result = run(write_samples(tmp_path, garments[300:]), reference, tmp_path)
    batch = torch.from_numpy(garments[300:]).permute(0, 3, 1, 2)
    features = load_detector("fashion", DETECTOR).features(batch).double().numpy()
    known = Reference.open(reference)
    expected = frechet_distance(features.mean(0), np.cov(features, rowvar=False), known.mu, known.sigma)
    assert result["frechet_distance"] == pytest.approx(expected, rel=1e-5)


def test_features_of_sample_are_used_if_they_are_of_this_detector_and_these_images(garments, reference, tmp_path):
    """Features shifted by 3 in one dimension make 9 more and are seen; those of other images or networks are not."""
    samples = write_samples(tmp_path, garments[300:])
    _, plain = run(samples, reference, tmp_path)
    detector = load_detector("fashion", DETECTOR)
    features = detector.features(torch.from_numpy(garments[300:]).permute(0, 3, 1, 2)).numpy()
    shift = 3 * np.sign(features.mean(0)[0] - Reference.open(reference).mu[0])
    digest = store.read_json(samples / "samples.json")["images_digest"]
    right = {"detector_digest": detector.digest, "images_digest": digest}
    expected = plain["frechet_distance"] + 9 + 6 * abs(features.mean(0)[0] - Reference.open(reference).mu[0])
    for about, used, distance in (
        (right, "from sample", expected),
        ({**right, "images_digest": "0" * 64}, "computed", plain["frechet_distance"]),
        ({**right, "detector_digest": "0" * 64}, "computed", plain["frechet_distance"]),
    ):
        shifted = features + shift * np.eye(64, dtype=np.float32)[0]
        store.write_arrays(samples / "features.safetensors", {"features": shifted}, about)
        _, result = run(samples, reference, tmp_path)
        assert result["features"] == used and result["frechet_distance"] == pytest.approx(distance, rel=1e-3)
    assert plain["features"] == "computed"


def test_the_text_says_all_that_is_needed(garments, reference, tmp_path):
    samples = write_samples(tmp_path, garments[300:])
    text, result = run(samples, reference, tmp_path)
    about = store.read_json(samples / "samples.json")
    for part in (
        f"{result['frechet_distance']:.4f}", "fashion-mnist classifier", "0.2500", "70 held-out", "300 training images",
        "300 of 32 x 32", "mode", "64 modes", "euler", "25 time points", "24 function evaluations", "0.0069",
        "float32 on cpu", "step 620", "10 epochs", "training seed 3", "ab" * 32, "resources/demo/encoder",
        about["images_digest"], result["reference"]["digest"], result["detector"]["digest"],
    ):  # fmt: skip
        assert part in text, part
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("seed")] == ["5"]
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("guidance")] == ["none"]
    assert result["samples"] == about and result["n_images"] == 300


def test_a_demo_number_does_not_pass_as_an_imagenet_fid(garments, reference, tmp_path):
    text, result = run(write_samples(tmp_path, garments[300:]), reference, tmp_path)
    first, second, third = text.splitlines()[:3]
    assert first.startswith("Frechet distance (not an FID)")
    assert "demo" in second and "not comparable with Inception FID" in second
    assert third.startswith("WARNING") and "NOT an ImageNet FID" in third
    assert not result["published_protocol"] and "FID" not in result["measure"].replace("not an FID", "")


def test_guidance_and_source_are_told(garments, reference, tmp_path):
    weights = store.read_json(write_samples(tmp_path, garments[300:]) / "samples.json")["weights"]
    guidance = {"kind": "autoguidance", "scale": 1.5, "guide": {**weights, "digest": "cd" * 32, "step": None}}
    text, _ = run(write_samples(tmp_path, garments[300:], guidance=guidance), reference, tmp_path)
    assert "autoguidance, scale 1.5" in text and "cd" * 32 in text and "step unknown" in text
    text, _ = run(write_samples(tmp_path, garments[300:], source_only=True), reference, tmp_path)
    assert "the decoded source itself" in text and "0 function evaluations" in text and "euler" not in text


def test_too_few_images_are_a_warning(garments, reference, tmp_path):
    text, result = run(write_samples(tmp_path, garments[300:364]), reference, tmp_path)
    assert "64 images are too few for 64 features" in text
    assert len(result["warnings"]) == 2, "that no published number compares says what the number of images does"
    text, _ = run(write_samples(tmp_path, garments[300:365]), reference, tmp_path)
    assert "too few" not in text


def standard_detector(reference_n: int | None, tmp_path: Path) -> tuple[Detector, Path]:
    """The demo's features under the name of the published network, to see what is written then."""
    demo = load_detector("fashion", DETECTOR)
    detector = Detector("Inception v3 of 2015-12-05", demo.digest, 64, True, demo.run, demo.device)
    if reference_n is None:
        np.savez(tmp_path / "VIRTUAL.npz", mu=np.zeros(64), sigma=np.eye(64))
        import_npz(tmp_path / "VIRTUAL.npz", detector, tmp_path / "standard.safetensors", section(), 32, ALONE)
        return detector, tmp_path / "standard.safetensors"
    return detector, write_reference(
        tmp_path / "standard.safetensors", np.zeros((70, 32, 32, 3), np.uint8), n_images=reference_n
    )


@pytest.mark.parametrize(
    "reference_n, images, name", [(None, 80, "FID-50K"), (300, 80, "FID-50K"), (None, 70, "FID with 70")]
)
def test_names_of_inception_results(reference_n, images, name, garments, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "PUBLISHED_IMAGES", 80)
    detector, standard = standard_detector(reference_n, tmp_path)
    samples = write_samples(tmp_path, garments[:images])
    result = fid.measure(samples / "images.npz", samples / "samples.json", standard, detector, section(), ALONE)
    published = reference_n is None and images == 80
    assert fid.render(result).startswith(name) and result["published_protocol"] == published
    assert bool(result["warnings"]) != published


def test_refuses_what_does_not_belong_together(garments, reference, tmp_path, capsys):
    other = write_reference(tmp_path / "other.safetensors", garments[:300], detector_digest="0" * 64)
    larger = write_reference(tmp_path / "larger.safetensors", garments[:300], image_size=256)
    good = write_samples(tmp_path / "good", garments[:80])
    alien = write_samples(tmp_path / "alien", garments[:80], images_digest="0" * 64)
    single = write_samples(tmp_path / "single", garments[:1])
    torn = write_samples(tmp_path / "torn", garments[:80])
    (torn / "images.npz").write_bytes((torn / "images.npz").read_bytes()[:-40])
    for samples, known, message in (
        (good, other, "another detector"), (good, larger, "256"), (alien, reference, "does not describe"),
        (single, reference, "at least 2"), (torn, reference, "truncated"), (good, tmp_path / "none", "fid_reference"),
        (good, DETECTOR, "is not a reference"),
    ):  # fmt: skip
        assert main(arguments(samples, known, tmp_path / "out")) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


def test_processes_share_the_images(garments, reference):
    """Parts of three processes, merged by hand, are the statistics of all."""
    detector, images, kinds = load_detector("fashion", DETECTOR), garments[:100], ("gaussian", "bank")
    whole = image_statistics(images, kinds, detector, 16, ALONE).statistics()
    parts = [image_statistics(images, kinds, detector, 16, Ranks(rank, 3, ALONE.device)) for rank in range(3)]
    assert [part.count for part in parts] == [33, 33, 34]
    merged = Collected.merged(parts).statistics()
    assert merged.count == 100 and np.allclose(merged.bank, whole.bank, rtol=1e-4, atol=1e-5)
    assert torch.allclose(merged.gaussian.covariance, whole.gaussian.covariance, rtol=1e-5, atol=1e-7)


def test_all_metrics_asked_for_in_one_pass(garments, tmp_path, monkeypatch):
    """Of the features of sample, too, and without any new number for the distance."""
    known = write_reference(tmp_path / "bank.safetensors", garments[:300], bank=True)
    samples = write_samples(tmp_path, garments[300:])
    _, alone = run(samples, known, tmp_path)
    seen = []
    features = Detector.features
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "features", lambda self, batch: (seen.append(len(batch)), features(self, batch))[1])
        text, result = run(samples, known, tmp_path, metrics=["frechet", "recall", "coverage", "precision"])
    assert sum(seen) == 300 and result["frechet_distance"] == alone["frechet_distance"]
    assert "metrics" not in alone and set(result["metrics"]) == {"recall", "coverage", "precision"}
    rows = load_detector("fashion", DETECTOR).features(torch.from_numpy(garments[300:]).permute(0, 3, 1, 2))
    expected = manifold(rows.numpy(), Reference.open(known).bank)
    assert result["metrics"]["precision"] == pytest.approx(expected.precision) and 0 < expected.precision < 1
    assert result["metrics"]["recall"] == pytest.approx(expected.recall) != expected.precision
    assert f"{expected.precision:.4f}" in next(line for line in text.splitlines() if line.startswith("precision "))
    assert result["settings"]["precision and recall"] == {"neighbours": 3}


def test_a_metric_that_reference_or_detector_cant_serve(garments, reference, tmp_path, capsys):
    samples = write_samples(tmp_path, garments[300:])
    for metrics, message in (
        (["frechet", "precision"], "but the reference has only their moments"),
        (["frechet", "sfid"], "'fid.metrics' has sfid, which the detector fashion can't give; leave it out"),
        (["recall"], "'fid.metrics' lacks frechet"),
        (["frechet", "precison"], "did you mean 'precision'?"),
    ):
        assert main(arguments(samples, reference, tmp_path / "out", metrics=metrics)) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


def test_equal_measurements_have_equal_configurations(garments, reference, tmp_path):
    """Time and batch size are none of it; another seed is."""
    digests = [
        run(write_samples(tmp_path / name, garments[300:], **changes), reference, tmp_path, **keys)[1][
            "configuration_digest"
        ]
        for name, changes, keys in (
            ("a", {}, {}), ("b", {"seconds": 1.0}, {"batch_size": 7}), ("c", {"seed": 6}, {}),
        )
    ]  # fmt: skip
    assert digests[0] == digests[1] != digests[2]


def test_another_detector_or_reference_is_another_configuration(garments, reference, tmp_path):
    samples = write_samples(tmp_path / "samples", garments[300:])
    detector, found = load_detector("fashion", DETECTOR), []
    for name, digest, images in (("same", None, 300), ("detector", "0" * 64, 300), ("reference", None, 299)):
        changes = {"detector_digest": digest} if digest else {}
        known = write_reference(tmp_path / f"{name}.safetensors", garments[:images], **changes)
        used = replace(detector, digest=digest or detector.digest)
        files = samples / "images.npz", samples / "samples.json"
        found.append(fid.measure(*files, known, used, section(), ALONE)["configuration_digest"])
    _, plain = run(samples, reference, tmp_path)
    assert len({*found, plain["configuration_digest"]}) == 3 and found[0] == plain["configuration_digest"]


def test_constant_images_are_refused(garments, reference, tmp_path, capsys):
    samples = write_samples(tmp_path, np.repeat(garments[:1], 80, axis=0))
    assert main(arguments(samples, reference, tmp_path / "out")) == 2
    assert "all 80 images have the same features" in capsys.readouterr().err


def test_a_set_larger_than_memory_can_be_mapped(tmp_path):
    """A sparse file of 20 GB: opened at once, and any image read without the others."""
    shape = (100_000, 256, 256, 3)
    path = tmp_path / "images.npz"
    image = np.arange(256 * 256 * 3, dtype=np.uint32).astype(np.uint8).reshape(shape[1:])
    write_sparse_npz(path, shape, 77_777, image)
    images = npz.map_array(path)
    assert images.shape == shape and np.array_equal(images[77_777], image) and images[77_778].max() == 0


def write_sparse_npz(path: Path, shape: tuple[int, ...], row: int, image: np.ndarray) -> None:
    """Write a stored .npz of zeros with one image in it, by hand: zip64 records around a hole in the file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_2_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    size = len(header.getvalue()) + int(np.prod(shape))
    name = b"arr_0.npy"
    big = 0xFFFFFFFF
    with open(path, "wb") as file:
        file.write(struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 33, 0, big, big, len(name), 20) + name)
        file.write(struct.pack("<2H2Q", 1, 16, size, size) + header.getvalue())
        data = file.tell()
        file.seek(data + row * image.size)
        file.write(image.tobytes())
        file.seek(data + int(np.prod(shape)))
        directory = file.tell()
        fixed = struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 33, 0, big, big, len(name), 20, 0, 0, 0, 0, 0)
        file.write(fixed + name + struct.pack("<2H2Q", 1, 16, size, size))
        end = file.tell()
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, end - directory, directory))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, end - directory, big, 0))
