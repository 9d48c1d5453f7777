"""Training on a GPU: one process of nccl, runs that repeat, compiled blocks, a profile."""

import os

import pytest
import torch
import torch.distributed as dist

from mmfm.infra import distributed
from mmfm.infra.distributed import Ranks
from mmfm.training.usage import bf16_peak
from support.tiny_training import STEPS
from support.tiny_training import run as run_tiny
from support.train_runs import assert_same, history, run, state_of, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

DEVICE = torch.device("cuda", 0)

if torch.cuda.is_available():
    # PyTorch looks for it once in a process, when it first multiplies: before the deterministic runs here.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def nccl(monkeypatch):
    """A process group of one, which the program takes for two, so that it divides model and gradients."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    distributed.join_group(DEVICE)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_nccl_with_one_process_takes_the_steps_of_one_without(nccl, tmp_path, sharding, monkeypatch):
    from mmfm.training import parallel

    alone = run_tiny(tmp_path / "alone" / "state-x", Ranks(0, 1, DEVICE), "ddp")
    kind = {"ddp": _Wrapped, "fsdp": parallel.Sharded}[sharding]
    monkeypatch.setattr(
        "mmfm.training.trainer.divide", lambda _, model, average, ranks, compiled: kind(model, average, ranks, compiled)
    )
    divided = run_tiny(tmp_path / "divided" / "state-x", Ranks(0, 1, DEVICE), sharding)
    assert alone.step == divided.step == STEPS
    for ours, theirs in zip(alone.average().parameters(), divided.average().parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def _Wrapped(model, average, ranks, compiled):
    """The whole model, wrapped by DDP although there is one process."""
    from mmfm.training.parallel import Whole, replicated

    made = Whole(model, average, ranks)
    made.wrapped = lambda compiled: replicated(model, ranks.device)
    return made


def test_a_deterministic_run_repeats_to_the_last_bit(tiny_pipeline, tmp_path):
    try:
        for name in ("one", "other"):
            run(tiny_pipeline, tmp_path / name, deterministic=True)
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(tmp_path / "one", tmp_path / "other")


def test_compiled_blocks_change_only_the_rounding(tiny_pipeline, tmp_path):
    for compiled in (False, True):
        run(tiny_pipeline, tmp_path / str(compiled), compile=compiled, precision="float32")
    plain, compiled = (weights(tmp_path / str(name)) for name in (False, True))
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, compiled[name], atol=1e-3, rtol=1e-2, msg=name)


def test_the_history_has_memory_and_shares_of_time_and_the_profile_the_kernels(tiny_pipeline, tmp_path):
    run(tiny_pipeline, tmp_path, profile=[3, 4], latents={"cache": "off"})
    assert all(0 < peak < 10 and 0 < share <= 1 for peak, share in history(tmp_path, "peak_gb", "encoder_share"))
    if bf16_peak(DEVICE):
        assert all(0 <= share < 0.1 for (share,) in history(tmp_path, "mfu")), "a tiny model"
    assert "Self CUDA" in (state_of(tmp_path) / "profile" / "table-0.txt").read_text()
