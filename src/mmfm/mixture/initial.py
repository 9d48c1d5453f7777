"""Initial mixtures for EM: k-means, k-means++, random rows or given means. Only this module calls faiss."""

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
from mmfm.infra.precision import exact_float32
from mmfm.mixture.gaussian import Mixture, covariance_shape
from mmfm.mixture.kmeans import lloyd, nearest_centre
from mmfm.mixture.moments import hard_moments, m_step
from mmfm.mixture.streaming import Read, Rows, finite_rows

KMEANS_ITERATIONS = 10
"""Iterations of faiss's k-means on the sample, before all processes continue on all rows."""


def blas_core_type(cpuinfo: str) -> str | None:
    """Return the OpenBLAS core type for the CPU flags in ``cpuinfo``, or None to let OpenBLAS choose.

    The OpenBLAS in faiss's wheel doesn't recognise newer CPUs and falls back to slow kernels, with which k-means took
    1.8 to 10 times longer. The kernels chosen here run on any CPU with these flags.

    Args:
        cpuinfo: contents of /proc/cpuinfo.
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
    """Import faiss with OpenBLAS kernels that suit the CPU, unless OPENBLAS_CORETYPE is already set.

    Raises:
        ValueError: several faiss wheels are installed, which overwrite each other's files.
    """
    wheels = faiss_wheels()
    if len(wheels) > 1:
        raise ValueError(
            f"{' and '.join(wheels)} are both installed; run `pip uninstall {' '.join(wheels)}`, then install one"
        )
    cpuinfo = Path("/proc/cpuinfo")
    core = blas_core_type(cpuinfo.read_text()) if cpuinfo.exists() else None
    if core is None or "OPENBLAS_CORETYPE" in os.environ:
        import faiss

        return faiss
    # OpenBLAS reads the variable when it is loaded. It is removed again so that child processes don't inherit it.
    os.environ["OPENBLAS_CORETYPE"] = core
    try:
        import faiss
    finally:
        del os.environ["OPENBLAS_CORETYPE"]
    return faiss


def faiss_has_gpu() -> bool:
    """Return whether the installed faiss supports GPUs and can see one."""
    faiss = import_faiss()
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def kmeans(
    rows: np.ndarray, seeds: np.ndarray, device: torch.device | str = "cpu", iterations: int = KMEANS_ITERATIONS
) -> np.ndarray:
    """Run faiss's k-means and return the centroids.

    Args:
        rows: (M, C) float32; all of them are used.
        seeds: (k, C) float32, initial centroids.

    Returns:
        (k, C) float32.

    Raises:
        ValueError: there are fewer rows than centroids, or faiss has no GPU (it would silently use the CPU).
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
        gpu=int(device.type == "cuda"),  # one GPU, even if several are visible: other processes use the others
        min_points_per_centroid=1,
        max_points_per_centroid=-(-len(rows) // k),
    )
    clustering.train(np.ascontiguousarray(rows, np.float32), init_centroids=np.ascontiguousarray(seeds, np.float32))
    return clustering.centroids


def kmeans_plusplus(rows: Tensor, k: int, seed: int) -> Tensor:
    """Choose k rows by greedy k-means++ (Arthur and Vassilvitskii 2007), as scikit-learn does.

    Each step draws 2 + log k candidates with probability proportional to the squared distance from the nearest chosen
    row, and keeps the one that minimises the sum of these distances.

    Args:
        rows: (M, C) float32 on any device.

    Returns:
        (k,) int64, indices of rows. They are distinct if there are at least k distinct rows.
    """
    trials = 2 + int(np.log(k))
    rows = rows - rows.mean(0)
    draws = rng.uniform(seed, "k-means++", torch.arange(k, device=rows.device), (trials,))
    chosen = torch.empty(k, dtype=torch.int64, device=rows.device)
    chosen[0] = (draws[0, 0] * len(rows)).long().clamp(max=len(rows) - 1)
    with exact_float32(rows.device.type):
        norms = torch.einsum("mc,mc->m", rows, rows)
        nearest = (norms - 2 * (rows @ rows[chosen[0]]) + norms[chosen[0]]).clamp_min_(0)
        nearest[chosen[0]] = 0
        for step in range(1, k):
            cdf = nearest.double().cumsum(0)
            # If every row coincides with a chosen one, all sums are 0 and the last row is drawn.
            candidates = torch.searchsorted(cdf, draws[step] * cdf[-1], right=True).clamp_(max=len(rows) - 1)
            products = rows @ rows[candidates].T
            distances = (norms[:, None] - 2 * products + norms[candidates]).clamp_min_(0)
            distances[candidates, torch.arange(trials, device=rows.device)] = 0
            distances = torch.minimum(distances, nearest[:, None])
            best = distances.sum(0, dtype=torch.float64).argmin()
            chosen[step], nearest = candidates[best], distances[:, best]
    return chosen


def read_rows(read: Read, indices: np.ndarray, block: int) -> np.ndarray:
    """Return rows ``indices`` (M,), which ascend, as (M, C) float32, reading at most ``block`` rows at a time."""
    result, filled = np.empty((0, 0), np.float32), 0
    for chunk in data.ranges(0, int(indices[-1]) + 1, block):
        wanted = indices[np.searchsorted(indices, chunk.start) : np.searchsorted(indices, chunk.stop)]
        if len(wanted):
            values = finite_rows(read, chunk)[wanted - chunk.start]
            if not filled:  # concatenating parts would need twice the memory, and a sample can take 3.9 GB
                result = np.empty((len(indices), values.shape[1]), np.float32)
            result[filled : filled + len(values)] = values
            filled += len(values)
    return result


def given_means(path: str | Path, k: int, c: int) -> np.ndarray:
    """Read initial means (K, C) float64 from a ``.npy`` file or a mixture's safetensors file.

    Raises:
        ValueError: the file can't be read, or the means have another shape or are not finite.
    """
    path = Path(path)
    remedy = f"give a .npy file or a gmm.safetensors with finite means ({k}, {c}), or leave the key empty"
    try:
        means = np.load(path, allow_pickle=False) if path.suffix == ".npy" else Mixture.load(path).means.numpy()
        means = np.asarray(means).astype(np.float64, casting="same_kind")
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise ValueError(f"gmm.init_means: '{path}' can't be read ({error}); {remedy}") from error
    if means.shape != (k, c) or not np.isfinite(means).all():
        raise ValueError(
            f"gmm.init_means: '{path}' holds an array {means.shape} instead of gmm.n_components finite means; {remedy}"
        )
    return means


def given_means_digest(path: str | Path, k: int, c: int) -> str:
    """Check a file of initial means as :func:`given_means` does, and return its digest."""
    given_means(path, k, c)
    return store.file_digest(path)


def start(rows: Rows, gmm: Gmm, number: int = 0) -> tuple[Mixture, Tensor | None]:
    """Return the mixture that EM starts from. A collective call; the main process chooses the seeds.

    * ``kmeans``: faiss's k-means on a sample of rows, then Lloyd iterations with split-and-merge moves by all processes
      on all rows. Weights, means and variances are those of the clusters.
    * Given means: weights and variances are those of the rows nearest to each mean. (scikit-learn takes them from its
      own k-means instead.)
    * ``k-means++`` and ``random_from_data``: the means are K rows, the weights are equal, and the variances are
      ``reg_covar``. The first M-step agrees with that of scikit-learn, whose weights are 1/N, so that its first lower
      bound differs by log N/K. The exception is ``tied``, where scikit-learn starts from the scatter of the rows.

    Args:
        gmm: the section ``gmm`` of the configuration.
        number: which of the ``n_init`` starts; each has its own seed.

    Returns:
        The mixture, and the cluster of each of this process's rows (n,) int32, or None if the start has no clusters.
    """
    ranks = rows.ranks
    chosen = torch.tensor(ranks.from_main(lambda: _centres(rows, gmm, number)), device=ranks.device)
    centres = chosen.float()
    if gmm.init_means or gmm.init == "kmeans":
        if gmm.init_means:
            winners = nearest_centre(rows, centres)
        else:
            centres, winners = lloyd(rows, centres)
        moments = hard_moments(rows, centres, winners, gmm.covariance_type)
        rows.workspace.clear()  # EM needs buffers of other sizes
        mixture = m_step(moments, gmm.covariance_type, gmm.reg_covar, gmm.shrinkage)[0]
        if gmm.init_means:
            mixture = Mixture(mixture.weights, chosen, mixture.variances, gmm.covariance_type)
        return mixture, winners
    k, c = centres.shape
    variances = torch.full(covariance_shape(gmm.covariance_type, k, c), gmm.reg_covar, dtype=torch.float64)
    if gmm.covariance_type in ("tied", "full"):
        variances = variances * torch.eye(c, dtype=torch.float64)
    weights = torch.full((k,), 1 / k, dtype=torch.float64)
    return Mixture(weights, centres, variances.to(ranks.device), gmm.covariance_type), None


def _centres(rows: Rows, gmm: Gmm, number: int) -> np.ndarray:
    """Return the initial means (K, C): given ones in float64, otherwise float32."""
    k, device = gmm.n_components, rows.ranks.device
    if gmm.init_means:
        return given_means(gmm.init_means, k, finite_rows(rows.read, range(1)).shape[1])
    seed = gmm.seed if number == 0 else rng.derive_seed(gmm.seed, f"gmm/start/{number}")
    limit = min(rows.n, STARTS[gmm.init].rows * k)
    indices = rng.permutation(seed, "gmm/rows", 0, rows.n)[:limit].sort().values.numpy()
    sample = read_rows(rows.read, indices, gmm.chunk_size)
    if gmm.init == "random_from_data":
        return sample
    if gmm.init == "kmeans":
        seeds = sample[np.arange(k) * limit // k]
        return kmeans(sample, seeds, device if device.type == "cuda" and faiss_has_gpu() else "cpu")
    return sample[kmeans_plusplus(torch.from_numpy(sample).to(device), k, seed).cpu().numpy()]
