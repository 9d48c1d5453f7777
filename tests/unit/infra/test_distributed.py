"""Device and process group: a GPU is never replaced by the CPU in silence, and every wait has a limit of its own."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from mmfm.infra import distributed


def test_a_reserved_gpu_that_pytorch_cannot_use_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("MMFM_HELD_GPUS", raising=False)
    assert distributed.choose_device() == torch.device("cpu")
    monkeypatch.setenv("MMFM_HELD_GPUS", "GPU-1")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        ValueError, match=r"this job has GPU GPU-1 on .*, but .* it is a build for the CPU; install .* Or set `gpus: 0`"
    ):
        distributed.choose_device()


def test_a_process_without_a_gpu_of_its_own_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("MMFM_HELD_GPUS", "GPU-a,GPU-b,GPU-c,GPU-d")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert distributed.choose_device(2) == torch.device("cuda", 2)
    with pytest.raises(ValueError, match="has 4 processes, but PyTorch sees only 3 of the GPUs GPU-a,GPU-b"):
        distributed.choose_device(3)


def test_an_old_driver_is_named_with_the_one_that_is_needed(monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update\nmore")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(distributed, "driver_version", lambda: "470.57.02")
    said = distributed.why_no_cuda()
    assert said.startswith(
        "The NVIDIA driver on your system is too old (found version 11040) (the NVIDIA driver is 470"
    )
    assert "needs 580 or newer" in said and "more" not in said
    monkeypatch.setattr(distributed, "driver_version", lambda: None)
    assert "there is no NVIDIA driver" in distributed.why_no_cuda()


@pytest.fixture
def alone(monkeypatch):
    """The environment of a process group of one."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_the_host_waits_for_hours(alone):
    distributed.join_group(torch.device("cpu"))
    group = dist.distributed_c10d._get_default_group()
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(hours=12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_collectives_of_gpus_give_up_after_minutes_and_those_of_hosts_after_hours(alone):
    device = torch.device("cuda", 0)
    distributed.join_group(device)
    ranks = distributed.Ranks(0, 2, device)  # as if there were another one: this makes every call a collective
    for place in ("cpu", "cuda"):
        assert ranks.sum(torch.ones(3, device=place)).tolist() == [1, 1, 1]
    ranks.barrier()
    assert ranks.from_main(lambda: "made") == "made"
    group = dist.distributed_c10d._get_default_group()
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(hours=12)
    assert group._get_backend(device).options._timeout == timedelta(minutes=15)
