"""How an encoder's precision is computed, whatever the caller allows."""

import pytest
import torch

from mmfm.infra.precision import encoding, exact_float32

CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


@pytest.mark.parametrize(
    ("precision", "device", "products", "autocast"),
    [
        ("float32", "cuda", "ieee", False),
        ("tf32", "cuda", "tf32", False),
        ("tf32", "cpu", "ieee", False),
        ("bf16", "cpu", "ieee", True),
    ],
)
def test_an_encoders_precision_holds_in_the_block_alone(precision, device, products, autocast):
    before = CUDA.fp32_precision, CPU.fp32_precision
    with torch.autocast("cpu", torch.bfloat16, enabled=not autocast), encoding(precision, device):
        assert CUDA.fp32_precision == products
        assert device == "cuda" or torch.is_autocast_enabled("cpu") == autocast
        with exact_float32(device):  # a posterior keeps its own
            assert CUDA.fp32_precision == CPU.fp32_precision == "ieee"
        assert CUDA.fp32_precision == products
    assert (CUDA.fp32_precision, CPU.fp32_precision) == before
