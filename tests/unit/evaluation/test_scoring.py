"""Images of any system against any reference: sources, ADM's protocol, processes, memory, and bad input."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmfm.cli.__main__ import main
from mmfm.config.choices import METRICS
from mmfm.data.fashion_mnist import pad_to_rgb, read_idx
from mmfm.evaluation import self_test
from mmfm.evaluation.collected import Gaussian, collect
from mmfm.evaluation.detector import Detector, Outputs, load_detector
from mmfm.evaluation.image_sets import ImageSet
from mmfm.evaluation.reconstruction import psnr, ssim
from mmfm.evaluation.scores import scores
from mmfm.evaluation.scoring import evaluate, render
from mmfm.infra import store
from mmfm.infra.distributed import Ranks
from support import processes
from support.inception import write_lively_inception
from support.places import DEMO, DETECTOR

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


def pooled(images: torch.Tensor, grid: int) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, grid).flatten(1)


def network(images: torch.Tensor) -> Outputs:
    return Outputs(pooled(images, 2), pooled(images, 3), 8 * pooled(images, 1))


CELLS = Detector("cells", "0", 12, False, lambda x: network(x).features, CPU, run_all=network, spatial_dimension=27)


def pictures(seed: int, n: int, low: int = 0) -> np.ndarray:
    """uint8 (n, 6, 6, 3)."""
    return np.random.default_rng(seed).integers(low, 256, (n, 6, 6, 3), np.uint8)


def write_folder(folder: Path, images: np.ndarray) -> Path:
    for i, image in enumerate(images):
        path = folder / f"{i // 5:03d}" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def write_npz(path: Path, images: np.ndarray) -> Path:
    np.savez(path, images)
    return path


def write_shards(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for i, part in enumerate(np.split(images, [4, 5])):
        np.savez(folder / f"shard-{i:05d}.npz", part)
    return folder


@pytest.fixture
def real(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "real.npz", pictures(1, 40, 32))


def test_npz_shards_and_pictures_are_the_same_images(tmp_path):
    images = pictures(0, 23)
    sets = [
        ImageSet.open(written)
        for written in (
            write_npz(tmp_path / "a.npz", images),
            write_shards(tmp_path / "shards", images),
            write_folder(tmp_path / "folder", images),
        )
    ]
    for found in sets:
        assert len(found) == 23 and found.size == (6, 6)
        for rows, batch in itertools.product((range(23), range(3, 11)), (1, 4, 50)):
            batches = list(found.batches(rows, batch))
            assert all(part.dtype == torch.uint8 and part.shape[1] == 3 for part in batches)
            whole = torch.cat(batches).permute(0, 2, 3, 1).numpy()
            assert np.array_equal(whole, images[rows.start : rows.stop])
    assert len({found.digest() for found in sets}) == 3


def test_the_evaluators_protocol(tmp_path, real):
    """Moments of the file for both distances, features of its images for the rest, and its own metrics by default."""
    samples = write_npz(tmp_path / "samples.npz", pictures(0, 30))
    mean, spread, mean_s, spread_s = np.full(12, 0.4), np.eye(12), np.full(27, 0.6), 2 * np.eye(27)
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=spread, mu_s=mean_s, sigma_s=spread_s, arr_0=pictures(1, 40, 32))
    found = evaluate(samples, tmp_path / "adm.npz", CELLS, ALONE)["metrics"]
    kinds = ("gaussian", "spatial", "logits", "bank")
    ours, theirs = (
        collect(ImageSet.open(path).batches(range(n), 7), kinds, range(n), CELLS).statistics()
        for path, n in ((samples, 30), (real, 40))
    )
    known = replace(theirs, gaussian=Gaussian(mean, spread), spatial=Gaussian(mean_s, spread_s))
    assert found == pytest.approx(
        scores(["frechet", "sfid", "inception_score", "precision", "recall"], ours, known), rel=1e-9
    )
    from_images = evaluate(samples, real, CELLS, ALONE)["metrics"]
    assert from_images == pytest.approx(
        scores(["frechet", "sfid", "inception_score", "precision", "recall"], ours, theirs), rel=1e-9
    )
    assert from_images["frechet"] != pytest.approx(found["frechet"], rel=0.1)


def test_moments_alone_serve_what_they_can(tmp_path):
    samples = write_npz(tmp_path / "samples.npz", pictures(0, 30))
    np.savez(tmp_path / "moments.npz", mu=np.zeros(12), sigma=np.eye(12))
    result = evaluate(samples, tmp_path / "moments.npz", CELLS, ALONE)
    assert set(result["metrics"]) == {"frechet", "inception_score", "inception_score_std"}
    with pytest.raises(
        ValueError, match=r"recall can't be computed from the reference .*moments\.npz', which lacks images"
    ):
        evaluate(samples, tmp_path / "moments.npz", CELLS, ALONE, ["frechet", "recall"])


def test_the_record_and_the_text(tmp_path, real):
    samples = write_npz(tmp_path / "samples.npz", pictures(0, 12))
    result = json.loads(json.dumps(evaluate(samples, real, CELLS, ALONE, ["frechet", "density"])))
    assert result["samples"]["digest"] == store.file_digest(samples) and result["samples"]["n_images"] == 12
    assert result["reference"]["digest"] == store.file_digest(real)
    assert result["detector"] == {"name": "cells", "digest": "0", "standard": False}
    assert result["reference"]["n_images"] == 40 and result["versions"]["torch"] == torch.__version__
    text = render(result)
    assert evaluate(samples, real, CELLS, ALONE, ["fid"])["metrics"] == {"frechet": result["metrics"]["frechet"]}
    assert "density" in text and "12 of 6 x 6 pixels" in text
    assert "CAUTION: frechet: 12 images are too few for 12 features" in text and "not those of the Inception" in text


@pytest.fixture(scope="module")
def garments(tmp_path_factory) -> tuple[Path, Path]:
    """Two files of demo images, 32 x 32: 101 and 90."""
    folder = tmp_path_factory.mktemp("garments")
    images = pad_to_rgb(read_idx(DEMO / "fashion-mnist" / "t10k-images-idx3-ubyte.gz")[:191]).transpose(0, 2, 3, 1)
    return write_npz(folder / "samples.npz", images[:101]), write_npz(folder / "real.npz", images[101:])


def command(garments: tuple[Path, Path], *more: str) -> list[str]:
    samples, real = map(str, garments)
    return [
        "evaluate",
        samples,
        "--reference",
        real,
        "--detector",
        "fashion",
        "--detector-weights",
        str(DETECTOR),
        *more,
    ]


def test_any_number_of_processes_and_batch_size_gives_the_same(garments, tmp_path):
    metrics = [name for name in METRICS if METRICS[name].needs in ("gaussian", "bank") and name != "kid"]
    found = []
    for world, batch in ((1, 64), (1, 7), (2, 64), (3, 10)):
        out = tmp_path / f"{world}-{batch}.json"
        line = command(garments, "--metrics", *metrics, "--batch-size", str(batch), "--out", str(out))
        processes.run(line, tmp_path / "errors", world=world)
        found.append(json.loads(out.read_text())["metrics"])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
    assert 0 < found[0]["recall"] < 1 and found[0]["frechet"] > 1e-3


def test_the_command_prints_and_writes(garments, tmp_path, capsys):
    assert main(command(garments, "--out", str(tmp_path / "a.txt"))) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "a.txt").read_text() == printed and printed.startswith("Frechet distance ")
    assert "precision" in printed and "sFID" not in printed


def test_the_reference_of_fid_reference(garments, tmp_path, capsys):
    detector = load_detector("fashion", DETECTOR)
    about = {
        "detector": detector.name, "detector_digest": detector.digest, "source": "made here", "n_images": 5,
        "image_size": 32, "floor": None,
    }  # fmt: skip
    arrays = {"mu": np.zeros(64), "sigma": np.eye(64)}
    for change, message in (
        ({}, ""),
        ({"detector_digest": "f" * 64, "detector": "another"}, r"made with another detector \(another\)"),
        ({"image_size": 64}, "the samples have 32 x 32 pixels, the reference 64 x 64"),
    ):
        path = tmp_path / "reference.safetensors"
        store.write_arrays(path, arrays, {**about, **change})
        status = main(command((garments[0], path)))
        captured = capsys.readouterr()
        if message:
            assert status == 2 and captured.err.count("error:") == 1 and re.search(message, captured.err)
        else:
            assert status == 0 and "made here" in captured.out
    bank = np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)
    store.write_arrays(tmp_path / "reference.safetensors", {**arrays, "bank": bank}, about)
    assert main(command((garments[0], tmp_path / "reference.safetensors"), "--metrics", "precision", "coverage")) == 0
    assert "coverage" in capsys.readouterr().out


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda p: p.unlink(), "no images at"),
        (lambda p: p.write_bytes(p.read_bytes()[:500]), r"is truncated or not an \.npz file"),
        (
            lambda p: np.savez(p, np.zeros((5, 8, 8, 3), np.float32)),
            r"holds float32 \(5, 8, 8, 3\), but images are uint8",
        ),
        (lambda p: np.savez(p, np.zeros((5, 8, 8, 1), np.uint8)), r"\(5, 8, 8, 1\)"),
        (lambda p: np.savez(p, np.zeros((0, 8, 8, 3), np.uint8)), "holds no images"),
        (lambda p: np.savez(p, pictures(0, 1)), "holds 1 image; give at least 2"),
        (lambda p: np.savez(p, np.array([{}], object)), "contains Python objects, which are not loaded"),
        (lambda p: np.savez(p, x=pictures(0, 5)), "has no array 'arr_0'"),
        (lambda p: np.savez_compressed(p, pictures(0, 5)), "is compressed"),
        (lambda p: np.savez(p, np.full((30, 6, 6, 3), 9, np.uint8)), "all 30 images have the same features"),
        (lambda p: np.savez(p, np.zeros((9, 8, 8, 3), np.uint8)), "samples have 8 x 8 pixels, the reference 6 x 6"),
    ],
)
def test_bad_samples_are_one_clear_error(tmp_path, real, spoil, message):
    samples = write_npz(tmp_path / "samples.npz", pictures(0, 9))
    spoil(samples)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(samples, real, CELLS, ALONE)


def test_bad_folders_are_one_clear_error(tmp_path, real):
    folder = write_folder(tmp_path / "folder", pictures(0, 9))
    (folder / "notes.txt").write_text("ignored")
    assert evaluate(folder, real, CELLS, ALONE)["samples"]["n_images"] == 9
    first = folder / "000" / "00003.png"
    good = first.read_bytes()
    first.write_bytes(good[:60])
    with pytest.raises(ValueError, match=r"cannot read image '.*00003\.png'"):
        evaluate(folder, real, CELLS, ALONE)
    Image.fromarray(pictures(0, 1)[0][:5]).save(first)
    with pytest.raises(ValueError, match=r"00003\.png' has 6 x 5 pixels, the first image 6 x 6; resize them all"):
        evaluate(folder, real, CELLS, ALONE)
    Image.fromarray(np.zeros((6, 6), np.float32)).save(first.with_suffix(".tiff"))
    first.write_bytes(good)
    with pytest.raises(ValueError, match="floating-point pixels"):
        evaluate(folder, real, CELLS, ALONE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' has no images \(looked for \.npz, \.png"):
        evaluate(tmp_path / "empty", real, CELLS, ALONE)
    shards = write_shards(tmp_path / "shards", pictures(0, 9))
    write_npz(shards / "shard-00009.npz", np.zeros((3, 7, 7, 3), np.uint8))
    with pytest.raises(ValueError, match=r"shard-00009\.npz' has images \(7, 7, 3\), .* sizes mix"):
        evaluate(shards, real, CELLS, ALONE)


def test_a_reference_that_does_not_fit_the_detector(tmp_path):
    samples = write_npz(tmp_path / "samples.npz", pictures(0, 9))
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match=r"moments in '.*other\.npz' have 2048 dimensions, those of cells 12"):
        evaluate(samples, tmp_path / "other.npz", CELLS, ALONE)


def test_mistakes_on_the_command_line(garments, capsys):
    for line, message in (
        (
            command(garments, "--metrics", "pnsr"),
            "unknown metric 'pnsr' (did you mean 'psnr'?); it must be one of frechet",
        ),
        (command(garments, "--metrics", "sfid"), "need the detector `inception`, not"),
        (command(garments, "--batch-size", "0"), "--batch-size is 0"),
        (command(garments, "--out", "x.csv"), "ends in neither .txt nor .json"),
        (["evaluate", "a", "--reference", "b"], "of the inception detector; `mmfm fetch --url https"),
        (
            ["evaluate", "a", "--reference", "b", "--detector", "encoder"],
            "of the encoder detector; they are the model.safetensors in an encoder's folder",
        ),
        (
            ["evaluate", "a", "--reference", "b", "--detector-weights", "nowhere"],
            "no weights of the inception detector",
        ),
    ):
        assert main(line) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def score(path: Path, real: Path) -> None:
    evaluate(path, real, CELLS, ALONE, ["frechet", "sfid", "inception_score"])


def test_hidden_files_are_no_images(tmp_path):
    """macOS puts ``._a.png`` beside files on other systems' disks; such a file is no picture."""
    folder = write_folder(tmp_path / "a", pictures(0, 3))
    before = ImageSet.open(folder)
    (folder / "._0.png").write_bytes(b"attributes")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "0.png").write_bytes(b"small")
    found = ImageSet.open(folder)
    assert len(found) == 3 and found.digest() == before.digest()
    hidden = tmp_path / ".b"
    folder.rename(hidden)  # asked for by its name
    assert len(ImageSet.open(hidden)) == 3


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, real):
    """Moments and sums alone: 60,000 more images, whose features take 2.9 MB, take no more."""
    grown = []
    for n in (3_000, 63_000):
        path = write_npz(tmp_path / f"{n}.npz", pictures(0, n))
        grown.append(processes.call_growth(score, tmp_path / "memory", path, real))
    assert grown[1] - grown[0] < 5e5


def test_self_test_passes_and_fails(capsys, monkeypatch):
    assert main(["evaluate", "--self-test"]) == 0
    printed = capsys.readouterr().out
    assert "precision, torch-fidelity" in printed and printed.endswith("checks passed\n")
    distance = self_test.frechet_distance
    monkeypatch.setattr(self_test, "frechet_distance", lambda *gaussians: 1.001 * distance(*gaussians))
    assert main(["evaluate", "--self-test"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "of 22 checks failed" in printed


def test_decoded_images_against_their_originals(tmp_path):
    """Means over the images, whatever the batches; for arrays and pictures, which must correspond."""
    originals = np.random.default_rng(3).integers(0, 256, (9, 16, 12, 3), np.uint8)
    decoded = (originals * 0.9).astype(np.uint8)
    pair = [torch.from_numpy(part).permute(0, 3, 1, 2) for part in (originals, decoded)]
    expected = {"psnr": psnr(*pair).mean().item(), "ssim": ssim(*pair).mean().item()}
    folders = [write_folder(tmp_path / name, part) for name, part in (("a", decoded), ("b", originals))]
    files = [write_npz(tmp_path / f"{name}.npz", part) for name, part in (("a", decoded), ("b", originals))]
    for samples, reference in (folders, files, (folders[0], files[1])):
        for batch in (2, 64):
            found = evaluate(samples, reference, CELLS, ALONE, ["psnr", "ssim"], batch)["metrics"]
            assert found == pytest.approx(expected, rel=1e-9)
    both = evaluate(*files, CELLS, ALONE, ["ssim", "frechet"])
    assert both["metrics"]["frechet"] > 0 and "SSIM" in render(both)
    with pytest.raises(ValueError, match=r"a\.npz' has 9 images and '.*few\.npz' 8, but PSNR and SSIM compare each"):
        evaluate(files[0], write_npz(tmp_path / "few.npz", originals[:8]), CELLS, ALONE, ["psnr"])
    (folders[1] / "001" / "00007.png").rename(folders[1] / "001" / "00099.png")
    with pytest.raises(ValueError, match=r"'001/00007' in '.*a' stands where '.*b' has '001/00008'.*name them alike"):
        evaluate(*folders, CELLS, ALONE, ["psnr"])
    np.savez(tmp_path / "moments.npz", mu=np.zeros(12), sigma=np.eye(12))
    with pytest.raises(ValueError, match="psnr can't be computed from the reference"):
        evaluate(files[0], tmp_path / "moments.npz", CELLS, ALONE, ["psnr"])


def test_an_exactly_decoded_image_counts_as_off_by_one_value(tmp_path, capsys):
    """Its PSNR is infinite, which JSON can't have, and which would hide all other images."""
    originals = np.random.default_rng(3).integers(0, 255, (4, 16, 12, 3), np.uint8)
    decoded = originals.copy()
    decoded[2] += 1  # 20 log10(255) dB
    files = [write_npz(tmp_path / f"{name}.npz", part) for name, part in (("a", decoded), ("b", originals))]
    out = tmp_path / "out.json"
    line = ["evaluate", str(files[0]), "--reference", str(files[1]), "--metrics", "psnr", "ssim", "--out", str(out)]
    assert main(line) == 0
    single = 20 * np.log10(255) + 10 * np.log10(16 * 12 * 3)
    result = json.loads(out.read_text())
    assert result["metrics"]["psnr"] == pytest.approx((3 * single + 20 * np.log10(255)) / 4)
    caution = f"psnr: 3 of 4 decoded images equal their originals; each counts as {single:.2f} dB"
    assert caution in result["cautions"][0] and caution in capsys.readouterr().out


def test_psnr_and_ssim_need_no_detector(tmp_path, capsys):
    originals = np.random.default_rng(3).integers(0, 256, (9, 16, 12, 3), np.uint8)
    files = [write_npz(tmp_path / f"{name}.npz", part) for name, part in (("a", originals // 2), ("b", originals))]
    line = ["evaluate", str(files[0]), "--reference", str(files[1]), "--metrics"]
    assert main([*line, "ssim", "psnr"]) == 0
    captured = capsys.readouterr()
    assert "SSIM" in captured.out and "detector" not in captured.out and "moments" not in captured.out
    assert "evaluate pairs: 9/9 images" in captured.err and "left" in captured.err, "progress of the second pass"
    assert main([*line, "ssim", "frechet"]) == 2
    assert "give --detector-weights" in capsys.readouterr().err
    with pytest.raises(ValueError, match="give a detector; only psnr and ssim need none"):
        evaluate(*files, None, ALONE, [])


@pytest.mark.parametrize("write", [write_shards, write_folder])
def test_the_digest_of_a_folder_is_that_of_its_contents(tmp_path, write):
    """Another image in a file of the same name and size gives another digest, another time does not."""
    images = pictures(0, 9)
    first, again = (ImageSet.open(write(tmp_path / name, images)) for name in ("a", "b"))
    assert first.digest() == again.digest()
    changed = sorted(path for path in again.path.rglob("*") if path.is_file())[1]
    content = bytearray(changed.read_bytes())
    content[-30] ^= 1
    changed.write_bytes(content)
    assert first.digest() != again.digest()


@pytest.mark.slow
def test_the_inception_network_from_files_to_numbers(tmp_path, capsys):
    """FID, sFID and Inception Score by the command, against its definition on the network's own layers."""
    network = write_lively_inception(tmp_path / "inception.pth")
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((10, 3, 4, 4), generator=generator)
    images = (torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    caught: list[torch.Tensor] = []
    hook = network.Mixed_6d.register_forward_hook(lambda module, inputs, output: caught.append(output))
    with torch.no_grad():
        features = network(images)[0].double().numpy()
    hook.remove()
    spatial = caught[0][:, :7].double().flatten(1).numpy()  # the branch comes first in the block's output
    logits = features @ network.fc.weight.double().numpy().T
    p = np.exp(logits - logits.max(1, keepdims=True))[:5]
    p /= p.sum(1, keepdims=True)

    def distance(rows: np.ndarray) -> float:
        """Frechet distance of the first five rows from the last five, by the eigenvalues of a product of rank 4."""
        a, b = rows[:5] - rows[:5].mean(0), rows[5:] - rows[5:].mean(0)
        cross = np.linalg.svd(a @ b.T, compute_uv=False).sum() / 4
        means = ((rows[:5].mean(0) - rows[5:].mean(0)) ** 2).sum()
        return means + ((a**2).sum() + (b**2).sum()) / 4 - 2 * cross

    folders = [
        write_folder(tmp_path / name, part.permute(0, 2, 3, 1).numpy())
        for name, part in (("samples", images[:5]), ("real", images[5:]))
    ]
    out = tmp_path / "out.json"
    line = ["evaluate", str(folders[0]), "--reference", str(folders[1]), "--out", str(out), "--batch-size", "3",
            "--metrics", "fid", "sfid", "inception_score"]  # fmt: skip
    assert main([*line, "--detector-weights", str(tmp_path / "inception.pth")]) == 0
    found = json.loads(out.read_text())["metrics"]
    assert found["frechet"] == pytest.approx(distance(features), rel=1e-4)
    assert found["sfid"] == pytest.approx(distance(spatial), rel=1e-4)
    score = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert found["inception_score"] - 1 == pytest.approx(score - 1, rel=1e-3) and score > 1.004
    assert "sFID" in capsys.readouterr().out
