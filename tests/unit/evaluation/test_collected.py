"""One pass over images feeds every metric, alike for any batches and any division among processes."""

import itertools

import numpy as np
import pytest
import torch

from mmfm.config.choices import METRICS
from mmfm.data.moments import CovarianceMoments
from mmfm.evaluation.collected import KINDS, Collected, Gaussian, Statistics, collect
from mmfm.evaluation.detector import Detector, Outputs
from mmfm.evaluation.frechet import frechet_distance
from mmfm.evaluation.inception_score import inception_score
from mmfm.evaluation.kid import kernel_distance
from mmfm.evaluation.manifold import manifold
from mmfm.evaluation.scores import cautions, kinds, reference_kinds, scores

CPU = torch.device("cpu")


def pooled(images: torch.Tensor, grid: int) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, grid).flatten(1)


def network(images: torch.Tensor) -> Outputs:
    """Means of coarse, fine and single cells: a network with all outputs that needs no weights."""
    return Outputs(pooled(images, 2), pooled(images, 3), 8 * pooled(images, 1))


DETECTOR = Detector(
    "cells", "0", 12, False, lambda images: network(images).features, CPU, run_all=network, spatial_dimension=27
)
PLAIN = Detector("cells alone", "0", 12, False, lambda images: pooled(images, 2), CPU)


def images(seed: int, n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def of(pictures: torch.Tensor, wanted=KINDS, detector: Detector = DETECTOR, batch: int = 64) -> Statistics:
    return collect(pictures.split(batch), wanted, range(len(pictures)), detector).statistics()


def everything(generated: Statistics, real: Statistics) -> dict[str, float]:
    return scores([name for name in METRICS if name != "kid"], generated, real)


def test_every_metric_from_one_pass():
    """Each equals its own function on all outputs at once."""
    a, b = images(0, 1200), images(1, 1100) // 8 * 7
    calls = []
    counting = Detector(
        "counted", "0", 12, False, PLAIN.run, CPU, run_all=lambda x: (calls.append(len(x)), network(x))[1],
        spatial_dimension=27,
    )  # fmt: skip
    found = scores(METRICS, of(a, kinds(METRICS), counting), of(b))
    assert sum(calls) == len(a)
    first, second = network(a), network(b)

    def gaussian(rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        return rows.double().numpy().mean(0), np.cov(rows.double().numpy(), rowvar=False)

    both = manifold(first.features, second.features)
    kid = kernel_distance(first.features, second.features)
    assert found == pytest.approx(
        {
            "frechet": frechet_distance(*gaussian(first.features), *gaussian(second.features)),
            "sfid": frechet_distance(*gaussian(first.spatial), *gaussian(second.spatial)),
            "inception_score": inception_score(first.logits)[0],
            "inception_score_std": inception_score(first.logits)[1],
            **vars(both),
            "kid": kid[0],
            "kid_std": kid[1],
        },
        rel=1e-9,
    )
    deviation = found.pop("inception_score_std")
    assert deviation == 0, "one split"
    assert len(set(found.values())) == len(found) and min(found.values()) > 1e-6


def test_does_not_depend_on_batches_or_processes():
    a, b = images(2, 300), images(3, 200) // 8 * 7
    real, whole = of(b), everything(of(a), of(b))
    for batch in (1, 7, 300):
        assert everything(of(a, batch=batch), real) == pytest.approx(whole, rel=1e-9)
    for shares in (1, 2, 3):
        bounds = [len(a) * i // shares for i in range(shares + 1)]
        parts = [collect(a[i:j].split(32), KINDS, range(i, j), DETECTOR) for i, j in itertools.pairwise(bounds)]
        merged = Collected.merged([part.on_host() for part in parts]).statistics()
        assert np.array_equal(merged.bank, of(a).bank)
        assert everything(merged, real) == pytest.approx(whole, rel=1e-9)


def test_equal_sets_score_as_equal():
    a = of(images(4, 400))
    found = everything(a, a)
    assert found["frechet"] < 1e-6 and found["sfid"] < 1e-6
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)


def test_only_what_is_asked_for_is_kept():
    pictures = images(5, 50)
    assert of(pictures, {"gaussian"}).bank is None and of(pictures, {"bank"}).gaussian is None
    bank = of(pictures, {"bank"}, PLAIN).bank
    assert bank.shape == (50, 12) and bank.dtype == np.float32
    kept = Collected({"gaussian"}, range(10**9), PLAIN)
    assert kept.gaussian.m2.shape == (12, 12) and kept.bank is None and kept.spatial is None and kept.score is None
    assert kinds(["frechet", "recall", "kid"]) == {"gaussian", "bank"}
    assert reference_kinds(["inception_score", "sfid"]) == {"spatial"}


def test_what_lacks_a_metrics_statistics_is_named():
    a, moments = of(images(6, 40)), Statistics(gaussian=Gaussian(np.zeros(12), np.eye(12)))
    assert scores(["frechet"], a, moments)["frechet"] > 0
    for metric, message in (
        ("sfid", "the reference lacks the moments that sfid needs"),
        ("precision", "precision compares features of single images, but the reference has only their moments"),
        ("kid", "kid compares .* the reference"),
        ("fid", r"unknown metric 'fid' \(did you mean 'frechet'\?\); it must be one of frechet, sfid"),
    ):
        with pytest.raises(ValueError, match=message):
            scores([metric], a, moments)
    with pytest.raises(ValueError, match="generated set has only"):
        scores(["recall"], moments, a)
    with pytest.raises(ValueError, match="collect `logits`"):
        scores(["inception_score"], moments, a)


def test_a_detector_without_spatial_features_or_logits():
    for kind in ("spatial", "logits"):
        with pytest.raises(ValueError, match="need the detector `inception`, not cells alone"):
            Collected({kind}, range(3), PLAIN)
    with pytest.raises(ValueError, match="unknown statistics faces; they are gaussian"):
        Collected({"faces"}, range(3), PLAIN)


@pytest.mark.parametrize("kind", ["gaussian", "spatial"])
def test_constant_images_are_refused(kind):
    with pytest.raises(ValueError, match="all 30 images have the same features"):
        of(torch.full((30, 3, 6, 6), 7, dtype=torch.uint8), {kind})


def test_missing_and_surplus_images():
    pictures = images(7, 20)
    for wanted in ({"gaussian"}, {"bank"}):
        with pytest.raises(ValueError, match="20 of 25 images were seen"):
            collect([pictures], wanted, range(25), DETECTOR).statistics()
        with pytest.raises(ValueError, match="20 images are more than the 10"):
            collect([pictures], wanted, range(10), DETECTOR)
    parts = [collect([pictures], KINDS, range(i, i + 20), DETECTOR) for i in (0, 25)]
    with pytest.raises(ValueError, match="images 20 to 24 are missing"):
        Collected.merged(parts)
    with pytest.raises(ValueError, match="1 rows seen, 2 needed"):
        of(pictures[:1], {"gaussian"})


def test_cautions_say_what_few_images_mean():
    few = Statistics(count=12, gaussian=Gaussian(np.zeros(12), np.eye(12)), spatial=Gaussian(np.zeros(4), np.eye(4)))
    full = Statistics(bank=np.zeros((10_000, 12), np.float32))
    lines = cautions(["frechet", "sfid"], few, full)
    assert any("frechet: 12 images are too few for 12 features" in line for line in lines)
    assert any("Published numbers use 50,000 images; 12 give larger" in line for line in lines)
    assert not any("sfid" in line for line in lines)
    assert len(cautions(["frechet", "sfid"], few, full, published=False)) == 1
    enough = Statistics(count=50_000, gaussian=few.gaussian)
    assert cautions(["frechet", "precision"], enough, full) == []


def test_cautions_say_what_a_small_reference_means():
    enough, moments = Statistics(count=50_000), Gaussian(np.zeros(12), np.eye(12))
    small = Statistics(count=12, gaussian=moments, bank=np.zeros((300, 12), np.float32))
    first, second, third = cautions(["frechet", "recall", "precision"], enough, small)
    assert "frechet: the reference's 12 images are too few for 12 features" in first
    assert "The reference is of 12 real images; fewer give larger Frechet distances" in second
    assert third.startswith("precision, recall: of 300 real images; published numbers use 10,000")
    (line,) = cautions(["frechet"], enough, Statistics(count=13, gaussian=moments))
    assert "of 13 real images" in line
    assert cautions(["frechet", "sfid"], enough, Statistics(gaussian=moments)) == [], "an ADM file does not say"
    assert cautions(["inception_score"], enough, Statistics(count=13)) == []


def test_the_moments_are_those_of_the_features():
    pictures = images(8, 90)
    expected = CovarianceMoments.zeros(12).update(network(pictures).features)
    found = of(pictures, {"gaussian"}).gaussian
    assert torch.allclose(found.mean, expected.mean) and torch.allclose(found.covariance, expected.covariance())
