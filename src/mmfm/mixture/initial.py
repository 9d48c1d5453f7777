"""Starts of EM: k-means, k-means++, random rows, given means. The only module that calls faiss."""

import importlib.metadata
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mmfm import data
from mmfm.config import Gmm
from mmfm.config.choices import STARTS
from mmfm.infra import rng, store
from mmfm.mixture.gaussian import Mixture, covariance_shape
from mmfm.mixture.kmeans import lloyd, nearest_centre
from mmfm.mixture.moments import hard_moments, m_step
from mmfm.mixture.streaming import Read, Rows, finite_rows

KMEANS_ITERATIONS = 10
"""Of faiss on the sample. What is left to do is done by all processes on all rows."""


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
    rows: np.ndarray, seeds: np.ndarray, device: torch.device | str = "cpu", iterations: int = KMEANS_ITERATIONS
) -> np.ndarray:
    """Move seeds to the centres of their rows by faiss's k-means and return the centroids.

    Args:
        rows: (M, C) float32, all of which are used.
        seeds: (k, C) float32.
        device: where faiss computes.

    Returns:
        (k, C) float32.

    Raises:
        ValueError: fewer rows than centroids, or a GPU asked of a CPU build (which faiss itself ignores silently).
    """
    device, k = torch.device(device), len(seeds)
    if len(rows) < k:
        raise ValueError(f"k-means needs at least as many rows as centroids: {len(rows)} rows, k = {k}; lower k")
    if device.type == "cuda" and not faiss_has_gpu():
        raise ValueError(f"this faiss ({', '.join(faiss_wheels())}) has no GPU; install faiss-gpu, or use device 'cpu'")
    faiss = import_faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    clustering = faiss.Kmeans(
        rows.shape[1],
        k,
        niter=iterations,
        seed=0,  # unused: the seeds are given
        gpu=int(device.type == "cuda"),  # of all those that are visible, the others are other processes'
        min_points_per_centroid=1,
        max_points_per_centroid=-(-len(rows) // k),
    )
    clustering.train(np.ascontiguousarray(rows, np.float32), init_centroids=np.ascontiguousarray(seeds, np.float32))
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
    norms = torch.einsum("mc,mc->m", rows, rows)
    draws = rng.uniform(seed, "k-means++", torch.arange(k, device=rows.device), (trials,))
    chosen = torch.empty(k, dtype=torch.int64, device=rows.device)
    chosen[0] = (draws[0, 0] * len(rows)).long().clamp(max=len(rows) - 1)
    nearest = (norms - 2 * (rows @ rows[chosen[0]]) + norms[chosen[0]]).clamp_min_(0)
    nearest[chosen[0]] = 0
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


def read_rows(read: Read, indices: np.ndarray, block: int) -> np.ndarray:
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


def given_means(path: str | Path, k: int, c: int) -> np.ndarray:
    """Read means to start from: the array of a ``.npy`` file or the means of a ``gmm.safetensors``, (K, C) float64.

    Raises:
        ValueError: there is no such file, or one of another shape or with values that are not finite numbers.
    """
    path = Path(path)
    remedy = f"take a .npy file or a gmm.safetensors with finite means ({k}, {c}), or leave the key empty"
    try:
        means = np.load(path, allow_pickle=False) if path.suffix == ".npy" else Mixture.load(path).means.numpy()
        means = np.asarray(means).astype(np.float64, casting="same_kind")
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise ValueError(f"gmm.init_means: '{path}' can't be read ({error}); {remedy}") from error
    if means.shape != (k, c) or not np.isfinite(means).all():
        raise ValueError(
            f"gmm.init_means: '{path}' holds an array {means.shape}, one mean for each of gmm.n_components is wanted, "
            f"all finite; {remedy}"
        )
    return means


def given_means_digest(path: str | Path, k: int, c: int) -> str:
    """Return the digest of a file of means, whose contents are checked; see :func:`given_means`."""
    given_means(path, k, c)
    return store.file_digest(path)


def start(rows: Rows, settings: Gmm, number: int = 0) -> tuple[Mixture, Tensor | None]:
    """Return the mixture that EM starts from. A collective call: one process chooses the seeds.

    * ``kmeans``: faiss's k-means on a sample of the rows, from K of them, then Lloyd's iterations of all processes on
      all rows, in which clusters are merged and split. Weights, means and variances are those of the clusters.
    * given means: these, with weights and variances of the rows that are nearest to each. scikit-learn takes its own
      k-means' for those.
    * ``k-means++`` and ``random_from_data``: K rows as means, equal weights, variances ``reg_covar``. The first M-step
      is that of scikit-learn's starts of these names, where every weight is 1/N (the first lower bound differs by
      log N/K), but for ``tied``, where scikit-learn starts from the rows' scatter.

    Args:
        rows: this process's share of the rows.
        number: of the start, below ``n_init``; each draws its own seeds.

    Returns:
        The mixture, and the cluster of this process's rows (n,) int32 where the start has clusters.
    """
    ranks = rows.ranks
    chosen = torch.tensor(ranks.from_main(lambda: _centres(rows, settings, number)), device=ranks.device)
    centres = chosen.float()
    if settings.init_means or settings.init == "kmeans":
        if settings.init_means:
            winners = nearest_centre(rows, centres)
        else:
            centres, winners = lloyd(rows, centres)
        moments = hard_moments(rows, centres, winners, settings.covariance_type)
        rows.space.clear()  # EM's chunks are of other sizes
        mixture = m_step(moments, settings.covariance_type, settings.reg_covar)[0]
        if settings.init_means:
            mixture = Mixture(mixture.weights, chosen, mixture.variances, settings.covariance_type)
        return mixture, winners
    k, c = centres.shape
    variances = torch.full(covariance_shape(settings.covariance_type, k, c), settings.reg_covar, dtype=torch.float64)
    if settings.covariance_type in ("tied", "full"):
        variances = variances * torch.eye(c, dtype=torch.float64)
    weights = torch.full((k,), 1 / k, dtype=torch.float64)
    return Mixture(weights, centres, variances.to(ranks.device), settings.covariance_type), None


def _centres(rows: Rows, settings: Gmm, number: int) -> np.ndarray:
    k, device = settings.n_components, rows.ranks.device
    if settings.init_means:
        return given_means(settings.init_means, k, finite_rows(rows.read, range(1)).shape[1])
    seed = settings.seed if number == 0 else rng.derive_seed(settings.seed, f"gmm/start/{number}")
    limit = min(rows.n, STARTS[settings.init].rows * k)
    indices = rng.permutation(seed, "gmm/rows", 0, rows.n)[:limit].sort().values.numpy()
    sample = read_rows(rows.read, indices, settings.chunk_size)
    if settings.init == "random_from_data":
        return sample
    if settings.init == "kmeans":
        seeds = sample[np.arange(k) * limit // k]
        return kmeans(sample, seeds, device if device.type == "cuda" and faiss_has_gpu() else "cpu")
    return sample[kmeans_plusplus(torch.from_numpy(sample).to(device), k, seed).cpu().numpy()]
