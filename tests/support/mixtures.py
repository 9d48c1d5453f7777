"""Tokens with known clusters, starts of EM, and the stage ``fit_gmm`` on them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfm.config import Gmm, StageConfig
from mmfm.data import tokens
from mmfm.infra.distributed import Ranks
from mmfm.infra.store import map_arrays
from mmfm.mixture.em import EMState, em_iterations
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.streaming import Rows
from mmfm.stages import fit_gmm as stage
from support.processes import meeting_point, reserve_port

ALONE = Ranks(0, 1, torch.device("cpu"))


SETTINGS = Gmm(
    n_components=5, covariance_type="diag", init="kmeans", reg_covar=1e-6, tol=1e-4, max_iter=8, seed=0,
    precision="float64", chunk_size=64, n_init=1, init_means="", e_step="exact", cache_gb=1.0,
    weights="fit", shrinkage=0.0,
)  # fmt: skip


def clustered(n=500, c=6, k=5, seed=0, spread=2.0, offset=0.0):
    """Overlapping clusters (n, c) float32: EM takes tens of iterations and no responsibility is one-hot."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(offset, spread, (k, c))
    scales = generator.uniform(0.5, 1.5, (k, c))
    labels = generator.integers(k, size=n)
    return (centres[labels] + scales[labels] * generator.normal(size=(n, c))).astype(np.float32)


def a_start(data, k, covariance_type="diag"):
    c = data.shape[1]
    variances = {"diag": np.ones((k, c)), "spherical": np.ones(k), "tied": np.eye(c), "full": np.stack([np.eye(c)] * k)}
    return Mixture(np.full(k, 1 / k), data[:k].astype(np.float64), variances[covariance_type], covariance_type)


def run(data, start, max_iter, chunk_size=64, dtype=torch.float64, tol=0.0, reg_covar=1e-6, **options):
    rows = Rows(lambda a, b: data[a:b], len(data), chunk_size, ALONE)
    return list(
        em_iterations(rows, EMState(start), max_iter=max_iter, tol=tol, reg_covar=reg_covar, dtype=dtype, **options)
    )[-1]  # fmt: skip


def token_store(path, data, classes=2):
    labels = np.arange(len(data)) % classes
    tokens.create(path, len(data), data.shape[1], len(data), labels)[:] = data
    import zarr

    zarr.open_group(path, mode="r+").attrs.update({"digest": "tokens", "listing_digest": "listing"})
    return tokens.TokenStore.open(path)


@pytest.fixture
def store_of_tokens(tmp_path):
    return token_store(tmp_path / "cls_tokens.zarr", clustered(512))


def fit_tokens(tokens, settings, out_dir, ranks=ALONE):
    """Run the stage on opened tokens."""
    return stage.fit(StageConfig("fit_gmm", gmm=settings), tokens, Path(out_dir), ranks)


def result(folder):
    """Everything that must be equal after a kill, to the bit."""
    parts = []
    for name in ("gmm.safetensors", "assignment.safetensors"):
        arrays, metadata = map_arrays(folder / name)
        parts.append((metadata, {name: array.tobytes() for name, array in arrays.items()}))
    return parts


def run_processes(program, arguments, folder, world=2):
    """Run a program as ``world`` processes that meet over a file-less TCP store, as torchrun would start them."""
    with reserve_port() as reserved:
        base = {**os.environ, **meeting_point(reserved), "WORLD_SIZE": str(world), "CUDA_VISIBLE_DEVICES": ""}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, *arguments],
                env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        deadline = time.monotonic() + 600
        for process in processes:
            _, errors = process.communicate(timeout=deadline - time.monotonic())
            assert process.returncode == 0, errors
