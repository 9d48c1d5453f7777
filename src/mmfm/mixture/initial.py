"""Starts of EM: k-means by faiss, k-means++, random rows. The only module that calls faiss."""

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mmfm import data
from mmfm.config import Gmm
from mmfm.infra import rng
from mmfm.mixture.em import Rows, SufficientStatistics, finite_rows, m_step
from mmfm.mixture.gaussian import Mixture

KMEANS_ITERATIONS = 20
POINTS_PER_CENTROID = 256
"""k-means and k-means++ see at most this many rows per component, as faiss does by default."""


def blas_core_type(cpuinfo: str) -> str | None:
    """Return the OpenBLAS core type for the flags of a /proc/cpuinfo, None where OpenBLAS should choose.

    The OpenBLAS in faiss's wheel doesn't know CPUs newer than itself and falls back to slow kernels: k-means took 1.8
    to 10 times longer. Any CPU with the instructions can run the kernels named here.
    """
    flags = next((line.split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= set(flags):
        return "SkylakeX"
    return "Haswell" if {"avx2", "fma"} <= set(flags) else None


def faiss_wheels() -> list[str]:
    """Return the installed distributions of faiss, such as ``faiss-cpu``."""
    names = {(d.metadata["Name"] or "").lower() for d in importlib.metadata.distributions()}
    return sorted(name for name in names if name == "faiss" or name.startswith(("faiss-cpu", "faiss-gpu")))


def import_faiss() -> ModuleType:
    """Import faiss with OpenBLAS kernels that fit the CPU (a user's OPENBLAS_CORETYPE stays).

    Raises:
        ValueError: both the CPU and the GPU wheel are installed; they overwrite each other's files.
    """
    wheels = faiss_wheels()
    if len(wheels) > 1:
        raise ValueError(f"{' and '.join(wheels)} are both installed; `pip uninstall {' '.join(wheels)}`, install one")
    cpuinfo = Path("/proc/cpuinfo")
    core = blas_core_type(cpuinfo.read_text()) if cpuinfo.exists() else None
    if core is None or "OPENBLAS_CORETYPE" in os.environ:
        import faiss

        return faiss
    # OpenBLAS reads it once, when it is loaded; processes started later should choose for themselves.
    os.environ["OPENBLAS_CORETYPE"] = core
    try:
        import faiss
    finally:
        del os.environ["OPENBLAS_CORETYPE"]
    return faiss


def faiss_has_gpu() -> bool:
    """Whether the installed faiss was built for GPUs and sees one."""
    faiss = import_faiss()
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def kmeans(
    rows: np.ndarray, k: int, seed: int, device: torch.device | str = "cpu", iterations: int = KMEANS_ITERATIONS
) -> np.ndarray:
    """Cluster rows by Lloyd's algorithm and return the centroids.

    Starts from AFK-MC2 seeds (Bachem et al., "Fast and provably good seedings for k-means", 2016), which are about as
    good as those of k-means++ without its K passes over the rows; a faiss too old to know them starts from random rows.

    Args:
        rows: (M, C) float32, all of which are used.
        device: where faiss computes.

    Returns:
        (k, C) float32.

    Raises:
        ValueError: fewer rows than centroids, or a GPU asked of a CPU build (which faiss itself ignores silently).
    """
    device = torch.device(device)
    if len(rows) < k:
        raise ValueError(f"k-means needs at least as many rows as centroids: {len(rows)} rows, k = {k}; lower k")
    if device.type == "cuda" and not faiss_has_gpu():
        raise ValueError(f"this faiss ({', '.join(faiss_wheels())}) has no GPU; install faiss-gpu, or use device 'cpu'")
    faiss = import_faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    seeding = getattr(faiss, "ClusteringInitMethod_AFK_MC2", None)
    clustering = faiss.Kmeans(
        rows.shape[1],
        k,
        niter=iterations,
        seed=rng.derive_seed(seed, "kmeans") & 0x7FFFFFFF,
        gpu=device.type == "cuda",
        min_points_per_centroid=1,
        max_points_per_centroid=-(-len(rows) // k),
        **({} if seeding is None else {"init_method": seeding}),
    )
    clustering.train(np.ascontiguousarray(rows, np.float32))
    return clustering.centroids


def kmeans_plusplus(rows: Tensor, k: int, seed: int) -> Tensor:
    """Choose k spread rows: greedy k-means++ (Arthur and Vassilvitskii 2007), as scikit-learn does.

    Each step draws 2 + log k candidates with probability proportional to the squared distance to the nearest chosen
    row, and takes the one that leaves the smallest sum of those distances.

    Args:
        rows: (M, C) float32 on any device.

    Returns:
        (k,) int64, numbers of the rows; distinct as long as there are distinct rows left.
    """
    trials = 2 + int(np.log(k))
    rows = rows - rows.mean(0)
    norms = rows.square().sum(1)
    draws = rng.uniform(seed, "k-means++", torch.arange(k, device=rows.device), (trials,))
    chosen = torch.empty(k, dtype=torch.int64, device=rows.device)
    chosen[0] = (draws[0, 0] * len(rows)).long().clamp(max=len(rows) - 1)
    nearest = (rows - rows[chosen[0]]).square().sum(1)
    for step in range(1, k):
        cdf = nearest.double().cumsum(0)
        # Where every row coincides with a chosen one the sums are 0 and this is the last row.
        candidates = torch.searchsorted(cdf, draws[step] * cdf[-1], right=True).clamp_(max=len(rows) - 1)
        products = rows @ rows[candidates].T
        distances = (norms[:, None] - 2 * products + norms[candidates]).clamp_min_(0)
        distances[candidates, torch.arange(trials, device=rows.device)] = 0
        distances = torch.minimum(distances, nearest[:, None])
        best = distances.sum(0, dtype=torch.float64).argmin()
        chosen[step], nearest = candidates[best], distances[:, best]
    return chosen


def read_rows(read: Callable[[int, int], np.ndarray], indices: np.ndarray, block: int) -> np.ndarray:
    """Return the rows of ascending ``indices`` (M,) as float32 (M, C), reading at most ``block`` rows at a time."""
    result, filled = np.empty((0, 0), np.float32), 0
    for chunk in data.ranges(0, int(indices[-1]) + 1, block):
        wanted = indices[np.searchsorted(indices, chunk.start) : np.searchsorted(indices, chunk.stop)]
        if len(wanted):
            values = finite_rows(read, chunk)[wanted - chunk.start]
            if not filled:  # in place: at full size the sample is 3.9 GB, and a list of parts would double it
                result = np.empty((len(indices), values.shape[1]), np.float32)
            result[filled : filled + len(values)] = values
            filled += len(values)
    return result


def start(read: Callable[[int, int], np.ndarray], rows: Rows, settings: Gmm) -> Mixture:
    """Return the mixture that EM starts from. A collective call: one process chooses the centres.

    * ``kmeans``: centroids of a sample of the rows, then weights, means and variances of all rows, each given to its
      nearest centroid.
    * ``k-means++`` and ``random_from_data``: K rows as means, equal weights, variances ``reg_covar``, which is what
      scikit-learn's starts of these names amount to.

    Args:
        read: (start, stop) -> float32 (stop - start, C).
        rows: this process's share of the same rows.
    """
    k, device = settings.n_components, rows.ranks.device
    centres = torch.tensor(rows.ranks.from_main(lambda: _centres(read, rows, settings)), device=device)
    if settings.init == "kmeans":
        return m_step(_hard_statistics(rows, centres), settings.covariance_type, settings.reg_covar)
    shape = (k, centres.shape[1]) if settings.covariance_type == "diag" else (k,)
    variances = torch.full(shape, settings.reg_covar, dtype=torch.float64)
    return Mixture(torch.full((k,), 1 / k, dtype=torch.float64), centres, variances, settings.covariance_type)


def _centres(read: Callable[[int, int], np.ndarray], rows: Rows, settings: Gmm) -> np.ndarray:
    k, device = settings.n_components, rows.ranks.device
    limit = k if settings.init == "random_from_data" else min(rows.n, POINTS_PER_CENTROID * k)
    indices = rng.permutation(settings.seed, "gmm/rows", 0, rows.n)[:limit].sort().values.numpy()
    sample = read_rows(read, indices, settings.chunk_size)
    if settings.init == "kmeans":
        return kmeans(sample, k, settings.seed, device if device.type == "cuda" and faiss_has_gpu() else "cpu")
    if settings.init == "k-means++":
        return sample[kmeans_plusplus(torch.from_numpy(sample).to(device), k, settings.seed).cpu().numpy()]
    return sample


def _hard_statistics(rows: Rows, centres: Tensor) -> SufficientStatistics:
    """Return the statistics of all rows (N, C), each given wholly to the nearest of the centres (K, C)."""
    # The component with the largest posterior under equal spherical Gaussians is the nearest centre.
    k = len(centres)
    nearest = Mixture(torch.full((k,), 1 / k, dtype=torch.float64), centres, torch.ones(k))
    statistics = SufficientStatistics(nearest.means)
    for _, x in rows:
        component, row = nearest.predict(x, torch.float32).sort(stable=True)
        statistics.add_pairs(x, component, row, torch.ones(len(x), dtype=torch.float64, device=x.device))
    return statistics.share(rows.ranks)
