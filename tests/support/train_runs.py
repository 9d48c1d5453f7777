"""The command ``train`` on the tiny pipeline, and what it leaves."""

import json
from pathlib import Path

import pytest
import torch

from mmfm.cli import train as command
from mmfm.config import STAGES
from mmfm.models.weights import load_ema
from mmfm.training.objective import FlowMatching
from support.tiny import Pipeline, settings

STEPS_PER_EPOCH = 5


NUMBERS = ("step", "epoch", "loss", "grad_norm", "lr")


def arguments(files: Pipeline, out: Path, setting: str, latents: dict | None = None, **train) -> list[str]:
    sections = settings(STAGES["train"].sections, train=train, latents=latents or {})
    return ["--setting", setting, "--settings", sections, "--out-dir", str(out), *files.train_arguments]


def run(files: Pipeline, out: Path, setting: str = "mode", **train) -> Path:
    assert command.main(arguments(files, out, setting, **train)) == 0
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_ema(out / "ema.safetensors")[0].state_dict()


def history(out: Path, *keys: str) -> list:
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in keys) for line in lines]


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


def assert_same(one: Path, other: Path) -> None:
    """Same bits of the weights, same lines of history but for the clock."""
    assert_equal(weights(one), weights(other))
    assert history(one, *NUMBERS) == history(other, *NUMBERS)


def state_of(out: Path) -> Path:
    (state,) = out.glob("state-*")
    return state


def steps_kept(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in state_of(out).glob("step-*"))


def poison(monkeypatch: pytest.MonkeyPatch, image: int, how: str) -> None:
    """Make loss or gradient of one image NaN in epoch 1 (steps 6 to 10)."""
    clean = FlowMatching.losses

    def losses(self, model, micro, inputs):
        values = clean(self, model, micro, inputs)
        hit = (micro.indices == image) & (micro.keys.start // 8 >= STEPS_PER_EPOCH)
        if how == "loss":
            return values + torch.where(hit.to(values.device), float("nan"), 0.0)
        if hit.any() and values.requires_grad:
            values.register_hook(lambda gradient: gradient * float("inf"))
        return values

    monkeypatch.setattr(FlowMatching, "losses", losses)
