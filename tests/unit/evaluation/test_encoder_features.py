"""The global tokens of an encoder as the detector's features: any image size, no download, and said in the result."""

import json
import shutil

import numpy as np
import pytest
import torch

from mmfm.autoencoder.encoders import load_encoder
from mmfm.cli.__main__ import main
from mmfm.data.moments import CovarianceMoments
from mmfm.evaluation.detector import load_detector
from mmfm.evaluation.frechet import frechet_distance
from mmfm.infra import npz, store
from support.fid_runs import write_samples
from support.tiny import CHANNELS, SECTIONS, SIZE, Pipeline, write_encoder

FID = {"detector": "encoder", "weights": "", "reference": "train", "batch_size": 7, "workers": 0}


@pytest.fixture(scope="module")
def weights(tiny_encoder):
    return tiny_encoder / "model.safetensors"


@pytest.mark.parametrize(("size", "patches"), [(16, 8), (32, 8), (90, 11), (300, 16)])
def test_features_are_the_tokens_of_the_resized_images(weights, tiny_encoder, size, patches):
    images = torch.randint(256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    detector = load_detector("encoder", weights)
    expected = load_encoder("dinov2", tiny_encoder, 8 * patches)(images / 255).global_token
    assert detector.dimension == CHANNELS and not detector.standard
    assert torch.equal(detector.features(images), expected)
    assert torch.equal(detector.features(images), expected), "a second call must not depend on the first"


def test_one_detector_takes_images_of_several_sizes(weights):
    detector, images = load_detector("encoder", weights), torch.full((1, 3, 64, 64), 9, dtype=torch.uint8)
    first = detector.features(images)
    detector.features(torch.zeros(1, 3, 128, 128, dtype=torch.uint8))
    assert torch.equal(detector.features(images), first)


def test_the_digest_is_of_the_whole_folder(weights, tiny_encoder, tmp_path):
    other = shutil.copytree(tiny_encoder, tmp_path / "copy")
    assert load_detector("encoder", other / weights.name).digest == load_detector("encoder", weights).digest
    (other / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    assert load_detector("encoder", other / weights.name).digest != load_detector("encoder", weights).digest


def test_a_folder_of_no_encoder_is_refused(weights, tiny_encoder, tmp_path):
    other = shutil.copytree(tiny_encoder, tmp_path / "copy")
    about = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**about, "model_type": "bert"}))
    with pytest.raises(ValueError, match=r"'bert' model in .* takes input_ids, not images; give a vision tr"):
        load_detector("encoder", other / weights.name)


@pytest.mark.parametrize("own", [True, False])
def test_from_images_to_the_result(tiny_pipeline: Pipeline, tiny_encoder, tmp_path, own, capsys):
    """The distance is that of the tokens' moments, and the result says whose tokens they are."""
    folder = tiny_encoder if own else write_encoder(tmp_path / "second", seed=5)
    images = np.random.default_rng(0).integers(256, size=(50, SIZE, SIZE, 3), dtype=np.uint8)
    digest = {"encoder": store.folder_digest(tiny_encoder)}
    samples = write_samples(tmp_path / "samples", images, inputs=digest)
    sections = json.dumps({"image": SECTIONS["image"], "fid": FID})
    detector = ["--detector-weights", str(folder / "model.safetensors")]
    reference = tmp_path / "reference.safetensors"
    listing = ["--train-listing", str(tiny_pipeline.listing)]
    assert main(["fid_reference", "--settings", sections, *listing, *detector, "--out", str(reference)]) == 0
    files = {"images": samples / "images.npz", "samples": samples / "samples.json", "reference": reference}
    given = [str(part) for name, path in files.items() for part in (f"--{name}", path)]
    outputs = ["--out-txt", str(tmp_path / "fid.txt"), "--out-json", str(tmp_path / "fid.json")]
    assert main(["fid", "--settings", json.dumps({"fid": FID}), *given, *detector, *outputs]) == 0

    result, text = store.read_json(tmp_path / "fid.json"), (tmp_path / "fid.txt").read_text().splitlines()
    features = load_detector("encoder", folder / "model.safetensors").features
    real, _ = store.map_arrays(reference)
    pixels = torch.from_numpy(np.array(npz.map_array(samples / "images.npz"))).permute(0, 3, 1, 2)
    moments = CovarianceMoments.zeros(CHANNELS).update(features(pixels))
    expected = frechet_distance(moments.mean, moments.covariance(), real["mu"], real["sigma"])
    assert result["frechet_distance"] == pytest.approx(expected, rel=1e-6)
    assert text[0].startswith("Frechet distance of encoder tokens (not an FID): ") and "not an FID" in text[1]
    assert ("generator's own encoder" in text[2]) == own
    assert result["published_protocol"] is False
