"""Training divided among processes, whole or in shards: the same numbers, and checkpoints that fit either way."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmfm.infra.distributed import Ranks
from mmfm.training import checkpoint, parallel
from mmfm.workflow import costs
from support.places import ROOT
from support.tiny_training import HALF, STEPS, run

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Runs of two gloo processes; see support/tiny_training.py."""
    folder = tmp_path_factory.mktemp("two")
    script = ROOT / "tests" / "support" / "tiny_training.py"
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(folder),
    ]
    on_the_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(line, capture_output=True, text=True, env=on_the_cpu)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The same run in one process."""
    state = tmp_path_factory.mktemp("one") / "state-x"
    run(state, ALONE, "ddp", micro_batch=0)
    return state


def numbers(state: Path) -> list[float]:
    lines = [json.loads(line) for line in (state / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line[name] for line in lines for name in ("loss", "grad_norm")]


def assert_close(state: Path, other: Path) -> None:
    ours, theirs = (checkpoint.find(path, STEPS) for path in (state, other))
    for part in ("model", "ema"):
        for name, tensor in ours.tensors(part).items():
            torch.testing.assert_close(tensor, theirs.tensors(part)[name], atol=1e-5, rtol=1e-4)
    for index, values in ours.optimizer()["state"].items():
        for name, tensor in values.items():
            torch.testing.assert_close(tensor, theirs.optimizer()["state"][index][name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "name",
    ["ddp", "fsdp", "ddp-from-fsdp", "fsdp-from-ddp", "fsdp-whole-share", "fsdp-compiled", "ddp-compiled"],
)
def test_two_processes_train_as_one(two, one, name):
    assert numbers(two / name / "state-x") == pytest.approx(numbers(one), rel=1e-5)
    assert_close(two / name / "state-x", one)


def test_shards_hold_half_of_the_weights_and_the_average(two):
    assert json.loads((two / "found.json").read_text())["share"] == pytest.approx(0.5, abs=0.05)


def test_a_checkpoint_of_shards_is_gathered_on_the_main_process_alone(two):
    """Bytes a parameter, which needs counts there."""
    main, other = json.loads((two / "found.json").read_text())["gathered"]
    assert main == pytest.approx(costs.TRAINED_BYTES - costs.FLOAT + costs.EMA_BYTES, rel=0.05) and other < 0.5


def test_a_nan_stops_a_sharded_run_too(two):
    for message, _ in json.loads((two / "found.json").read_text())["said"]:
        assert f"NaN or Inf in step {HALF + 2}, in the loss of image" in message
    assert checkpoint.find(two / "poisoned" / "state-x", STEPS).step == HALF


def test_weights_broken_in_one_process_are_saved_by_none(two):
    for _, overflow in json.loads((two / "found.json").read_text())["said"]:
        assert all("weights are NaN, Inf or too large" in overflow[sharding] for sharding in ("ddp", "fsdp"))
    assert not list(two.glob("overflow-*/state-x/step-*"))


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_process_goes_on_from_two(two, one, tmp_path, name):
    state = tmp_path / "state-x"
    shutil.copytree(two / name / "state-x", state, ignore=shutil.ignore_patterns(f"step-*{STEPS}"))
    run(state, ALONE, "fsdp", micro_batch=4)
    assert numbers(state) == pytest.approx(numbers(one), rel=1e-5)
    assert_close(state, one)


def test_an_unknown_sharding_is_refused():
    with pytest.raises(ValueError, match="one of ddp, fsdp"):
        parallel.divide("zero", torch.nn.Linear(2, 2), None, ALONE, False)
