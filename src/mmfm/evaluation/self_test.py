"""Checks of the metrics that a reader can run: closed cases, and other implementations on the same features."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch

from mmfm.data.moments import CovarianceMoments
from mmfm.evaluation.frechet import frechet_distance
from mmfm.evaluation.inception_score import inception_score
from mmfm.evaluation.kid import kernel_distance
from mmfm.evaluation.manifold import manifold
from mmfm.evaluation.reconstruction import psnr, ssim

_IMAGES, _FEATURES = 600, 64


@dataclass(frozen=True)
class Check:
    """A number, and what it must be.

    Attributes:
        what: the case.
        found, expected: the numbers.
        tolerance: largest admissible difference, relative to ``expected`` where that is above 1.
    """

    what: str
    found: float
    expected: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the number is right; NaN is not."""
        return abs(self.found - self.expected) <= self.tolerance * max(1.0, abs(self.expected))


def checks() -> Iterator[Check]:
    """Yield the checks; seconds in all, on the CPU, from fixed seeds."""
    generator = torch.Generator().manual_seed(0)
    yield from _closed_cases(generator)
    yield from _other_implementations(generator)


def _closed_cases(generator: torch.Generator) -> Iterator[Check]:
    d = _FEATURES
    factor = torch.randn((d, 3 * d), generator=generator, dtype=torch.float64)
    covariance, mean = factor @ factor.T / (3 * d), torch.randn(d, generator=generator, dtype=torch.float64)
    shift = torch.linspace(0, 1, d, dtype=torch.float64)
    squared = shift.square().sum().item()
    yield Check("Frechet distance of equal Gaussians", frechet_distance(mean, covariance, mean, covariance), 0, 1e-6)
    shifted = frechet_distance(mean + shift, covariance, mean, covariance)
    yield Check("Frechet distance of a shift: its square", shifted, squared, 1e-9)
    scaled = frechet_distance(mean, 9 * covariance, mean, covariance)
    yield Check("Frechet distance of 3 times the spread: 4 traces", scaled, 4 * covariance.trace().item(), 1e-9)
    thin = factor[:, : d // 2]
    singular = thin @ thin.T / d
    found = frechet_distance(mean, singular, mean, 4 * singular)
    yield Check("Frechet distance of singular covariances: 1 trace", found, singular.trace().item(), 1e-9)
    yield Check("Inception Score of 10 certain classes", inception_score(1e3 * torch.eye(10))[0], 10, 1e-9)
    yield Check("Inception Score of equal images", inception_score(torch.ones(10, 5))[0], 1, 1e-9)
    rows = torch.randn((_IMAGES, d), generator=generator)
    same, apart = manifold(rows.clone(), rows), manifold(rows + 100, rows)
    for name, value in vars(same).items():
        yield Check(f"{name} of equal sets", value, 1, 1e-2 if name == "density" else 0)
    for name, value in vars(apart).items():
        yield Check(f"{name} of sets far apart", value, 0, 0)
    black = torch.zeros((1, 3, 16, 16), dtype=torch.uint8)
    yield Check("PSNR of an error of a tenth of the peak", psnr(black + 51, black + 76).item(), 20.1720, 1e-3)
    yield Check("SSIM of equal images", ssim(black, black).item(), 1, 1e-12)


def _other_implementations(generator: torch.Generator) -> Iterator[Check]:
    import mmfm.infra.torchvision_ops  # noqa: F401  # isort: skip  (torch-fidelity imports torchvision)
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    generated = 0.9 * torch.randn((_IMAGES, _FEATURES), generator=generator).relu() + 0.05
    real = torch.randn((_IMAGES, _FEATURES), generator=generator).relu()
    a, b = (CovarianceMoments.zeros(_FEATURES).update(rows) for rows in (generated, real))
    found = frechet_distance(a.mean, a.covariance(), b.mean, b.covariance())
    root = scipy.linalg.sqrtm((a.covariance() @ b.covariance()).numpy())
    traces = (a.covariance() + b.covariance()).trace().item() - 2 * float(np.trace(root).real)
    yield Check("Frechet distance, SciPy sqrtm", found, (a.mean - b.mean).square().sum().item() + traces, 1e-6)
    known = [fid_features_to_statistics(rows.double()) for rows in (generated, real)]
    theirs = fid_statistics_to_metric(*known, verbose=False)["frechet_inception_distance"]
    yield Check("Frechet distance, torch-fidelity", found, theirs, 1e-6)
    logits = 3 * torch.randn((_IMAGES, 100), generator=generator)
    theirs = isc_features_to_metric(logits, 10, shuffle=False)["inception_score_mean"]
    yield Check("Inception Score, torch-fidelity", inception_score(logits, _IMAGES // 10)[0], theirs, 1e-9)
    few = {"kid_subsets": 10, "kid_subset_size": 100, "verbose": False}
    theirs = kid_features_to_metric(generated.double(), real.double(), **few)["kernel_inception_distance_mean"]
    yield Check("KID, torch-fidelity", kernel_distance(generated, real, 10, 100)[0], theirs, 1e-9)
    both = prc_features_to_metric(generated, real, save_cpu_ram=False, verbose=False)
    ours = manifold(generated, real)
    yield Check("precision, torch-fidelity", ours.precision, both["precision"], 1e-6)
    yield Check("recall, torch-fidelity", ours.recall, both["recall"], 1e-6)


def render(found: list[Check]) -> str:
    """Return the checks as a table."""
    width = max(len(check.what) for check in found)
    lines = [f"{'check':<{width}}  {'found':>14}  {'expected':>14}  {'difference':>10}  tolerance"]
    for check in found:
        difference = abs(check.found - check.expected)
        verdict = "" if check.passed else "  FAILED"
        lines.append(
            f"{check.what:<{width}}  {check.found:>14.8g}  {check.expected:>14.8g}  {difference:>10.1e}  "
            f"{check.tolerance:.0e}{verdict}"
        )
    failed = sum(not check.passed for check in found)
    lines.append(f"{failed} of {len(found)} checks failed" if failed else f"all {len(found)} checks passed")
    return "\n".join(lines) + "\n"
