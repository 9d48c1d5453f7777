"""The stage mode_quality: its numbers from the files, its picture, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from mmfm import config
from mmfm.cli.__main__ import main
from mmfm.config import Sample
from mmfm.config.reading import build
from mmfm.data.tokens import TokenStore
from mmfm.generation import conditioning
from mmfm.generation.sampler import SampleFiles, Sampler
from mmfm.infra import npz, store
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.spatial import SpatialMixture
from support.sample_runs import (
    SAMPLE,
    files,  # noqa: F401 (fixture)
    run,
    weights,  # noqa: F401 (fixture)
)
from support.tiny import MODES, SECTIONS, Pipeline, settings, write_encoder, write_images, write_listing

N = 33


def extracted(listing: Path, encoder: Path, out: Path) -> Path:
    """Return the tokens of a listing's images, as the stage extract makes them."""
    line = ["extract", "--settings", settings(config.STAGES["extract"].sections), "--listing", str(listing)]
    line += ["--encoder-weights", str(encoder), "--out-tokens", str(out / "cls_tokens.zarr")]
    assert main([*line, "--out-moments", str(out / "moments.safetensors")]) == 0
    return out / "cls_tokens.zarr"


@pytest.fixture(scope="module")
def given(files: Pipeline, weights: dict, tmp_path_factory) -> dict[str, Path]:
    """What the stage reads, by its flags: images of the setting `mode`, and 11 held-out images."""
    root = tmp_path_factory.mktemp("modes")
    run(files, weights["mode"], root / "sample", n_images=N)
    tokens = extracted(files.listing, files.encoder, root)
    mixture = Mixture.load(files.gmm)
    labels = mixture.predict(torch.from_numpy(TokenStore.open(tokens).read(0, files.n_images))).int().numpy()
    store.write_arrays(root / "assignment.safetensors", {"labels": labels}, {"gmm_digest": mixture.metadata["digest"]})
    heldout = write_listing(root / "heldout.safetensors", write_images(root / "heldout", 11, seed=5))
    return {
        "--images": root / "sample" / "images.npz", "--samples": root / "sample" / "samples.json",
        "--encoder-weights": files.encoder, "--stats": files.stats, "--decoder": files.decoder, "--gmm": files.gmm,
        "--assignment": root / "assignment.safetensors", "--spatial-gmm": files.spatial_gmm, "--tokens": tokens,
        "--train-listing": files.listing, "--heldout-listing": heldout,
    }  # fmt: skip


def arguments(given: dict[str, Path], out: Path, **changes: dict) -> list[str]:
    sections = {name: {**SECTIONS[name], **changes.get(name, {})} for name in config.STAGES["mode_quality"].sections}
    outputs = {f"--out-{kind}": out / f"modes.{kind}" for kind in ("json", "txt", "png")}
    words = (str(word) for pair in {**given, **outputs}.items() for word in pair)
    return ["mode_quality", "--settings", json.dumps(sections), *words]


def judged(given: dict[str, Path], out: Path, **changes: dict) -> dict:
    assert main(arguments(given, out, **changes)) == 0
    return store.read_json(out / "modes.json")


def refused(capsys, given: dict[str, Path], out: Path, *words: str) -> None:
    """Check that the stage ends with one line that has these words, and writes nothing."""
    capsys.readouterr()
    assert main(arguments(given, out)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.endswith("(see docs/metrics.md#modes)") and all(word in line for word in words), line
    assert not list(out.glob("modes.*"))


@pytest.mark.parametrize("draw", ["multinomial", "stratified"])
def test_modes_are_those_that_the_sampler_drew(files, weights, tmp_path, draw):
    files = replace(files, spatial_gmm=Path(shutil.copytree(files.spatial_gmm, tmp_path / "spatial_gmm.zarr")))
    zarr.open_group(files.spatial_gmm, mode="r+")["weights"][:] = np.array([0.1, 0.2, 0.3, 0.4])
    _, about = run(files, weights["gmm"], tmp_path / "sample", n_images=9, mode_draw=draw)
    again = SampleFiles(weights["gmm"], files.decoder, files.stats, files.encoder, files.spatial_gmm)
    section = build(Sample, {**SAMPLE, "mode_draw": draw}, "sample")
    sampler = Sampler(again, section, build(config.Encoder, SECTIONS["encoder"], "encoder"), 32, None, "cpu")
    drawn = sampler.generator.draw(range(9)).modes
    found = conditioning.drawn_modes(about, torch.as_tensor(SpatialMixture.open(files.spatial_gmm).weights))
    assert found.tolist() == drawn.tolist() and len(set(found.tolist())) > 1
    with pytest.raises(ValueError, match="not from this mixture's 3; run sample again"):
        conditioning.drawn_modes(about, torch.ones(3) / 3)


def test_images_are_encoded_as_training_images_are(files, given, tmp_path):
    """By the stage extract, from files; then the numbers follow from the mixture."""
    result = judged(given, tmp_path)
    images, folder = npz.map_array(given["--images"]), tmp_path / "pictures" / "all"
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    listing = write_listing(tmp_path / "pictures.safetensors", folder.parent)
    tokens = TokenStore.open(extracted(listing, files.encoder, tmp_path)).read(0, N)
    mixture = Mixture.load(files.gmm)
    means, variances = mixture.means.numpy(), mixture.variances.numpy()
    distances = ((tokens[:, None] - means) ** 2 / variances).mean(2)
    likeliest = (-0.5 * distances * mixture.dimension - 0.5 * np.log(variances).sum(1)).argmax(1)
    about = store.read_json(given["--samples"])
    modes = conditioning.drawn_modes(about, mixture.weights).numpy()
    assert result["returned"] == (likeliest == modes).sum() and result["n_images"] == N
    of = result["modes"]
    for k in range(MODES):
        own = modes == k
        assert (of["n_images"][k], of["returned"][k]) == (own.sum(), (likeliest[own] == k).sum())
        assert of["distance"][k] == pytest.approx(distances[own, k].mean(), rel=1e-4)
    assert result["chance"] == pytest.approx(1 / MODES) and result["inputs"]["gmm"] == mixture.metadata["digest"]


def test_real_images_are_held_out_ones_or_as_many_training_images(files, given, tmp_path):
    assert judged(given, tmp_path)["real"]["images"] == "held-out images"
    found = judged(given, tmp_path)["real"]
    assert found["n_images"] == 11 and found["distance"] > 0 and found["decoded_distance"] > 0
    none = {name: path for name, path in given.items() if name != "--heldout-listing"}
    training = judged(none, tmp_path)
    assert (training["real"]["images"], training["real"]["n_images"]) == ("training images", N)
    tokens = torch.from_numpy(TokenStore.open(given["--tokens"]).read(0, files.n_images))
    chosen = [i * files.n_images // N for i in range(N)]
    mixture = Mixture.load(files.gmm)
    expected = np.bincount(mixture.predict(tokens[chosen]), minlength=MODES)
    assert training["modes"]["n_real"] == expected.tolist()


def test_numbers_do_not_depend_on_the_batch(given, tmp_path):
    one, other = (judged(given, tmp_path / str(size), extract={"batch_size": size}) for size in (4, 32))
    assert one["modes"]["returned"] == other["modes"]["returned"] and one["ranking"] == other["ranking"]
    assert one["distance"] == pytest.approx(other["distance"], rel=1e-5)


def test_the_result_is_told_and_shown(given, tmp_path, capsys):
    result = judged(given, tmp_path)
    printed, text = capsys.readouterr(), (tmp_path / "modes.txt").read_text()
    assert printed.out == text and f"{result['returned']} of {N} images" in text
    assert f"{N} generated images done" in printed.err and "left" in printed.err
    rows = [line.split() for line in text.splitlines() if line[:7].strip().isdigit()]
    assert [int(row[0]) for row in rows] == result["ranking"]
    with Image.open(tmp_path / "modes.png") as picture:
        assert picture.width > 800 and len(np.unique(np.asarray(picture.convert("RGB")))) > 50


def test_images_of_a_gaussian_source_have_no_modes(files, weights, given, tmp_path, capsys):
    run(files, weights["uncond"], tmp_path / "sample", n_images=4)
    other = {"--images": tmp_path / "sample" / "images.npz", "--samples": tmp_path / "sample" / "samples.json"}
    refused(capsys, {**given, **other}, tmp_path, "setting 'uncond'", "no modes; give images of gmm, mode or class_gmm")


def test_other_files_than_those_of_the_images_are_refused(files, given, tmp_path, capsys):
    encoder = write_encoder(tmp_path / "encoder", seed=1)
    refused(capsys, {**given, "--encoder-weights": encoder}, tmp_path, "another encoder", str(encoder))
    decoder = shutil.copy(files.decoder, tmp_path / "decoder.safetensors")
    content = Path(decoder).read_bytes()
    Path(decoder).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(capsys, {**given, "--decoder": Path(decoder)}, tmp_path, "another decoder")
    mixture = Mixture.load(files.gmm)
    other = replace_weights(mixture, tmp_path / "gmm.safetensors")
    refused(capsys, {**given, "--gmm": other}, tmp_path, "another mixture", str(other))
    spatial = Path(shutil.copytree(files.spatial_gmm, tmp_path / "spatial_gmm.zarr"))
    about = json.loads((spatial / "zarr.json").read_text())
    about["attributes"]["digest"] = "0" * 64
    (spatial / "zarr.json").write_text(json.dumps(about))
    refused(capsys, {**given, "--spatial-gmm": spatial}, tmp_path, "another spatial mixture", "run sample")
    listing = write_listing(tmp_path / "listing.safetensors", write_images(tmp_path / "images", 40, seed=9))
    refused(capsys, {**given, "--train-listing": listing}, tmp_path, "another listing")


def replace_weights(mixture: Mixture, path: Path) -> Path:
    """Write the mixture with other weights, and return the path."""
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    Mixture(weights, mixture.means, mixture.variances, mixture.covariance_type).save(path, {})
    return path


def test_damaged_images_and_descriptions_are_refused(given, tmp_path, capsys):
    images = tmp_path / "images.npz"
    images.write_bytes(given["--images"].read_bytes()[:-100])
    refused(capsys, {**given, "--images": images}, tmp_path, f"'{images}' is truncated")
    np.savez(images, npz.map_array(given["--images"])[::-1])
    refused(capsys, {**given, "--images": images}, tmp_path, "does not describe the images", "run sample again")
    np.savez(images, np.zeros((4, 8), np.float32))
    refused(capsys, {**given, "--images": images}, tmp_path, "float32 (4, 8), but images are uint8 (n, S, S, 3)")
    samples = tmp_path / "samples.json"
    samples.write_text("[]")
    refused(capsys, {**given, "--samples": samples}, tmp_path, "give the samples.json that sample wrote")
    about = store.read_json(given["--samples"])
    store.write_json(samples, {**about, "mode_draw": "by hand"})
    refused(capsys, {**given, "--samples": samples}, tmp_path, "drawn as 'by hand'")
    gmm = tmp_path / "gmm.safetensors"
    gmm.write_bytes(given["--gmm"].read_bytes()[:200])
    refused(capsys, {**given, "--gmm": gmm}, tmp_path, "gmm.safetensors")
    refused(capsys, {**given, "--tokens": tmp_path / "none.zarr"}, tmp_path, "no token store")
