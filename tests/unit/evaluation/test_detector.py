"""Detectors: the demo's classifier and the Inception network, from local files alone."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mmfm.config.choices import INCEPTION_FILE
from mmfm.data.fashion_mnist import pad_to_rgb, read_idx
from mmfm.data.moments import CovarianceMoments
from mmfm.evaluation.detector import load_detector
from mmfm.evaluation.detectors.fashion import FashionDetector
from mmfm.evaluation.frechet import frechet_distance
from mmfm.infra import store
from support.inception import write_lively_inception
from support.places import DEMO

FASHION = DEMO / "detector" / "detector.safetensors"


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("inception") / INCEPTION_FILE
    return path, write_lively_inception(path)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """uint8 (8, 3, 40, 40): smooth colour patterns, no two alike."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((8, 3, 4, 4), generator=generator)
    return (F.interpolate(coarse, size=40, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def garments() -> torch.Tensor:
    """uint8 (1000, 3, 32, 32): real images of the demo."""
    return torch.from_numpy(pad_to_rgb(read_idx(DEMO / "fashion-mnist" / "t10k-images-idx3-ubyte.gz")[:1000]))


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = CovarianceMoments.zeros(features.shape[1]).update(features)
    return found.mean, found.covariance()


def test_inception_equals_the_network_run_by_hand(inception, images):
    path, network = inception
    detector = load_detector("inception", path)
    features = detector.features(images)
    assert features.shape == (8, 2048) == (8, detector.dimension) and features.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(features, network(images)[0])
    assert detector.digest == store.file_digest(path)
    apart = torch.pdist(features) / features.norm(dim=1).mean()
    assert apart.min() > 0.01, "the features are no dead signal"


def test_all_outputs_of_inception_in_one_pass(inception, images):
    """Spatial features against the layers run one by one; logits against the features times the weights, no bias."""
    path, network = inception
    found = load_detector("inception", path).outputs(images[:3])
    detector = load_detector("inception", path)
    assert torch.equal(found.features, detector.features(images[:3]))
    assert torch.allclose(found.logits, found.features @ network.fc.weight.T, rtol=1e-4, atol=1e-4)
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as enlarge

    x = (enlarge(images[:3].float(), size=(299, 299), align_corners=False) - 128) / 128
    with torch.no_grad():
        for name, layer in network.named_children():
            if name == "Mixed_6d":
                break
            x = layer(x)
        conv, norm = layer.branch1x1.conv, layer.branch1x1.bn
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        plane = torch.einsum("oi,bihw->bhwo", conv.weight[:, :, 0, 0], x) - norm.running_mean
        expected = (plane * scale + norm.bias).clamp(min=0)
    assert expected.shape == (3, 17, 17, 192)
    pixels = [[picture[row, column, :7] for row in range(17) for column in range(17)] for picture in expected]
    expected = torch.stack([torch.cat(rows) for rows in pixels])
    assert found.spatial.shape == (3, 2023) == (3, detector.spatial_dimension)
    assert torch.allclose(found.spatial, expected, rtol=1e-3, atol=1e-4)
    assert (found.spatial > 0).float().mean() > 0.1 and torch.pdist(found.spatial).min() > 0.1


def test_other_detectors_give_features_alone(garments):
    detector = load_detector("fashion", FASHION)
    found = detector.outputs(garments[:4])
    assert torch.equal(found.features, detector.features(garments[:4]))
    assert found.spatial is None and found.logits is None and detector.spatial_dimension == 0


def test_inception_features_do_not_depend_on_the_batch(inception, images):
    detector = load_detector("inception", inception[0])
    parts = torch.cat([detector.features(part) for part in images[:4].split((1, 3))])
    assert torch.allclose(parts, detector.features(images[:4]), rtol=1e-4, atol=1e-4)


def test_distance_in_inception_features_sees_corruption(inception, images):
    detector = load_detector("inception", inception[0])
    first = slice(512)  # of the 2048 features, to spare seconds of eigenvalues
    real = detector.features(images)[:, first]
    noisy = images.float() + 60 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    spoiled = detector.features(noisy.clamp(0, 255).to(torch.uint8))[:, first]
    scale = real.var(0).sum().item()
    assert frechet_distance(*moments(real), *moments(real)) < 1e-9 * scale
    assert frechet_distance(*moments(real), *moments(spoiled)) > 0.1 * scale


def test_other_inception_weights_do_not_pass_as_the_published_ones(inception):
    detector = load_detector("inception", inception[0])
    assert not detector.standard and "not comparable with published FIDs" in detector.name


def test_weights_of_the_published_hash_are_the_standard(inception, monkeypatch):
    monkeypatch.setattr(store, "file_digest", lambda path: "6726825d" + "0" * 56)
    detector = load_detector("inception", inception[0])
    assert detector.standard and "2015-12-05" in detector.name


def test_fashion(garments):
    detector = load_detector("fashion", FASHION)
    model = FashionDetector().eval()
    from safetensors.torch import load_file

    model.load_state_dict(load_file(FASHION))
    with torch.no_grad():
        assert torch.equal(detector.features(garments[:50]), model.features(garments[:50]))
    assert "demo" in detector.name and "not comparable with Inception FID" in detector.name
    assert (detector.dimension, detector.standard) == (64, False)


def test_distance_in_fashion_features_grows_with_corruption(garments):
    detector = load_detector("fashion", FASHION)
    real, others = (moments(detector.features(part)) for part in garments.split(500))
    noise = torch.randn(garments[500:].shape, generator=torch.Generator().manual_seed(0))
    distances = [frechet_distance(*real, *others)]
    for strength in (16, 32, 64):
        spoiled = (garments[500:].float() + strength * noise).clamp(0, 255).to(torch.uint8)
        distances.append(frechet_distance(*real, *moments(detector.features(spoiled))))
    assert distances == sorted(distances) and distances[0] * 3 < distances[1]


@pytest.mark.parametrize("kind, remedy", [("inception", INCEPTION_FILE), ("fashion", "train_detector")])
def test_a_missing_file_is_named_with_how_to_get_it(kind, remedy, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"nowhere.*{remedy}"):
        load_detector(kind, tmp_path / "nowhere")


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def test_refuses_damaged_and_dangerous_files(inception, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    truncated, wrong, bomb = tmp_path / "truncated", tmp_path / "wrong.pth", tmp_path / "bomb.pth"
    truncated.write_bytes(inception[0].read_bytes()[:100_000])
    torch.save({"fc.weight": torch.zeros(3)}, wrong)
    torch.save({"fc.weight": Bomb()}, bomb)
    for kind, path in (
        ("inception", truncated), ("inception", wrong), ("inception", bomb), ("inception", FASHION),
        ("fashion", truncated), ("fashion", inception[0]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{path.name}.*{kind}"):
            load_detector(kind, path)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(ValueError, match="unknown detector 'vgg'"):
        load_detector("vgg", FASHION)


def test_refuses_other_images(garments):
    detector = load_detector("fashion", FASHION)
    for wrong in (garments[:2].float(), garments[:2, :1], garments[:2, :, :28, :28]):
        with pytest.raises(ValueError, match="images"):
            detector.features(wrong)
