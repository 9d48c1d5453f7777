"""Time the metrics on made-up features, against SciPy and torch-fidelity.

python benchmarks/metrics.py [--images 50000] [--reference 10000] [--features 2048] [--rounds 3] [--device cuda]

Features are rectified normal numbers, correlated and of unequal spread. The implementations take turns; times are
medians, by the clock. torch-fidelity's precision and recall hold all distances, so that they are only timed up to
--fidelity images. Writes benchmarks/results/metrics.json and .md.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch

import mmfm.infra.torchvision_ops  # noqa: F401  (torch-fidelity imports torchvision)
from mmfm.data.moments import CovarianceMoments
from mmfm.evaluation.frechet import frechet_distance
from mmfm.evaluation.inception_score import inception_score
from mmfm.evaluation.kid import kernel_distance
from mmfm.evaluation.manifold import manifold
from runs import RESULTS, publish

CLASSES = 1008
OURS = "this project"


def features(seed: int, n: int, d: int) -> torch.Tensor:
    """Return features (n, d) float32: rectified, correlated, with standard deviations from 1 down to 1e-3."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn((d, d), generator=generator) / d**0.5 * torch.logspace(0, -3, d)
    generator = torch.Generator().manual_seed(seed)
    return ((1 + 0.1 * (seed - 1)) * torch.randn((n, d), generator=generator) @ mixing.T + 0.1).relu()


def gaussian(rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and covariance of features, in batches of 256 as they come from a detector."""
    moments = CovarianceMoments.zeros(rows.shape[1], device)
    for batch in rows.split(256):
        moments.update(batch)
    return moments.mean, moments.covariance()


def sqrtm_distance(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the Frechet distance by SciPy's square root of the product of the covariances."""
    root = np.real(scipy.linalg.sqrtm(a[1] @ b[1]))
    return float(((a[0] - b[0]) ** 2).sum() + np.trace(a[1]) + np.trace(b[1]) - 2 * np.trace(root))


def variants(options: argparse.Namespace) -> dict[str, dict[str, Callable[[], float]]]:
    """Return the implementations of every metric, on the same features."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    device = torch.device(options.device)
    ours, real = features(1, options.images, options.features), features(2, options.reference, options.features)
    logits = 3 * torch.randn((options.images, CLASSES), generator=torch.Generator().manual_seed(3))
    a, b = (tuple(part.cpu().numpy() for part in gaussian(rows, device)) for rows in (ours, real))
    known = [{"mu": mean, "sigma": covariance} for mean, covariance in (a, b)]
    kid = {"kid_subset_size": min(1000, options.reference), "kid_subsets": options.subsets, "verbose": False}
    found: dict[str, dict[str, Callable[[], float]]] = {
        "mean and covariance": {OURS: lambda: gaussian(ours, device)[1].trace().item()},
        "Frechet distance": {
            OURS: lambda: frechet_distance(*a, *b),
            "SciPy sqrtm": lambda: sqrtm_distance(a, b),
            "torch-fidelity": lambda: fid_statistics_to_metric(*known, verbose=False)["frechet_inception_distance"],
        },
        "Inception Score": {
            OURS: lambda: inception_score(logits.to(device), options.images // 10)[0],
            "torch-fidelity": lambda: isc_features_to_metric(logits, 10, shuffle=False)["inception_score_mean"],
        },
        "KID": {
            OURS: lambda: kernel_distance(ours, real, options.subsets, kid["kid_subset_size"], device=device)[0],
            "torch-fidelity": lambda: kid_features_to_metric(ours, real, **kid)["kernel_inception_distance_mean"],
        },
        "precision, recall, density, coverage": {OURS: lambda: manifold(ours, real, device=device).precision},
    }
    if options.images <= options.fidelity:
        found["precision, recall, density, coverage"]["torch-fidelity (the first two)"] = lambda: (
            prc_features_to_metric(ours.to(device), real.to(device), verbose=False)["precision"]
        )
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time all implementations in turns; return median seconds, ratios to ours, and values."""
    found: dict[str, Any] = {}
    for metric, ways in variants(options).items():
        times: dict[str, list[float]] = {name: [] for name in ways}
        values: dict[str, float] = {}
        for _ in range(options.rounds):
            for name, run in ways.items():
                start = time.perf_counter()
                values[name] = run()  # a number on the host, so that a GPU has finished
                times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        ratios = {name: medians[OURS] / median for name, median in medians.items()}
        found[metric] = {"seconds": medians, "ratio": ratios, "value": values}
    return found


def report(found: dict[str, Any]) -> str:
    """Return the Markdown table."""
    lines = [
        "# Times of the metrics",
        "",
        f"{found['images']:,} generated and {found['reference']:,} real images, {found['features']:,} features; "
        f"{found['device']}, torch {found['torch']}, SciPy {found['scipy']}; median of {found['rounds']}. Frechet "
        "distances are computed on the CPU everywhere.",
        "",
        "| metric | implementation | seconds | ours / it | value |",
        "|---|---|---|---|---|",
    ]
    for metric, result in found["metrics"].items():
        for name, seconds in result["seconds"].items():
            ratio = f"{result['ratio'][name]:.2f}" if name != OURS else ""
            lines.append(f"| {metric} | {name} | {seconds:.2f} | {ratio} | {result['value'][name]:.7g} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--subsets", type=int, default=100, help="of KID")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fidelity", type=int, default=20_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    sizes = {name: getattr(options, name) for name in ("images", "reference", "features", "subsets", "rounds")}
    versions = {"device": card, "torch": torch.__version__, "scipy": scipy.__version__}
    found = {**sizes, **versions, "metrics": measure(options)}
    publish("metrics", found, report(found), options.out)


if __name__ == "__main__":
    main()
