"""Posteriors, EM, latents and a detector's features are in full float32, whatever the caller allows."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmfm.autoencoder.encoders import load_encoder
from mmfm.evaluation.detector import load_detector
from mmfm.infra.distributed import Ranks
from mmfm.mixture.em import EMState, em_iterations
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.initial import kmeans_plusplus
from mmfm.mixture.kmeans import lloyd
from mmfm.mixture.streaming import Rows
from mmfm.mixture.truncated import Truncation
from support.places import DEMO

BACKENDS = {
    "cuda.matmul": torch.backends.cuda.matmul,
    "cudnn.conv": torch.backends.cudnn.conv,
    "mkldnn.matmul": torch.backends.mkldnn.matmul,
    "mkldnn.conv": torch.backends.mkldnn.conv,
}
PRODUCTS = ("mm", "mv", "dot", "addmm", "addmv", "bmm", "baddbmm", "convolution")


def precisions() -> dict[str, str]:
    return {name: backend.fp32_precision for name, backend in BACKENDS.items()}


@pytest.fixture(autouse=True, params=["old", "new"])
def fast(request) -> Iterator[None]:
    """A caller who allows TF32 and bfloat16, by PyTorch's older or newer switches."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    old, before = (matmul.allow_tf32, cudnn.allow_tf32), precisions()
    if request.param == "old":
        matmul.allow_tf32 = cudnn.allow_tf32 = True
    else:
        for name, backend in BACKENDS.items():
            backend.fp32_precision = "tf32" if name.startswith("cu") else "bf16"
    allowed = precisions()
    yield
    assert precisions() == allowed, "the caller's choice is as it was"
    if request.param == "old":
        assert matmul.allow_tf32 and cudnn.allow_tf32, "readable, so not mixed with the newer switches"
    matmul.allow_tf32, cudnn.allow_tf32 = old
    for name, backend in BACKENDS.items():
        backend.fp32_precision = before[name]


class Exact(TorchDispatchMode):
    """Requires that every product and convolution of float32 tensors is in full precision."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        name = operation.overloadpacket.__name__
        operands = [t.dtype for t in tree_leaves((arguments, keywords)) if isinstance(t, torch.Tensor)]
        if name in PRODUCTS or name.startswith("_scaled_dot_product"):
            assert set(operands) <= {torch.float32, torch.float64}, f"{name} of {operands}"
            if torch.float32 in operands:
                self.seen[name] += 1
                assert set(precisions().values()) == {"ieee"}, f"{name} with {precisions()}"
        return operation(*arguments, **(keywords or {}))


@contextmanager
def exact(*expected: str) -> Iterator[None]:
    """Check the block, in which there must be these kinds of products."""
    with torch.autocast("cpu", torch.bfloat16), Exact() as mode:
        yield
    assert mode.seen.keys() >= set(expected), mode.seen


TOKENS = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
TOKENS += 4 * torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).repeat(100, 1)
K = 6


def rows() -> Rows:
    return Rows(lambda start, stop: np.asarray(TOKENS[start:stop]), len(TOKENS), 200, Ranks(0, 1, torch.device("cpu")))


def mixture() -> Mixture:
    return Mixture(torch.full((K,), 1 / K), TOKENS[:K].double(), torch.ones(K, 8))


def test_the_posterior():
    with exact("addmm"):
        mixture().posterior(TOKENS)


@pytest.mark.parametrize("truncation", [None, Truncation(candidates=3, refresh=2)])
def test_em(truncation):
    kinds = ("addmm",) if truncation is None else ("addmm", "baddbmm", "bmm")
    options = {"tol": 0.0, "reg_covar": 1e-6, "dtype": torch.float32, "truncation": truncation}
    with exact(*kinds):
        list(em_iterations(rows(), EMState(mixture()), max_iter=3, **options))


def test_the_starts_of_em():
    with exact("mm"):
        chosen = kmeans_plusplus(TOKENS, K, 0)
    with exact("addmm", "baddbmm"):
        lloyd(rows(), TOKENS[chosen])


def test_latents_and_tokens(tiny_pipeline):
    encoder = load_encoder("dinov2", tiny_pipeline.encoder, 32)
    with exact("convolution", "addmm"):
        encoder(torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize("kind", ["fashion", "encoder"])
def test_features(kind, tiny_pipeline):
    folder = {"fashion": DEMO / "detector", "encoder": tiny_pipeline.encoder}[kind]
    (weights,) = folder.glob("*.safetensors")
    detector = load_detector(kind, weights)
    with exact("convolution"):
        detector.features(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_a_product_outside_is_found():
    with pytest.raises(AssertionError, match=r"mm with .*tf32"), Exact():
        TOKENS @ TOKENS.T
