"""The scripts that made the demo's weights: a few steps of each, and what they write loads."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from support.places import ROOT

IMAGES = ROOT / "resources" / "demo" / "fashion-mnist"


def run(script, *arguments):
    line = [sys.executable, ROOT / "tools" / script, "--data", IMAGES, *map(str, arguments)]
    result = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_pretrain_encoder_and_grow(tmp_path):
    from mmfm.autoencoder.encoders import load_encoder

    base = ("--width", 32, "--batch", 16, "--steps", 3)
    run("pretrain_encoder.py", *base, "--depth", 1, "--out", tmp_path / "base")
    run("pretrain_encoder.py", *base, "--depth", 2, "--grow", tmp_path / "base", "--out", tmp_path / "grown")
    encoder = load_encoder("dinov2", tmp_path / "grown", 32)
    assert encoder.hidden_size == 32 and encoder.model.config.num_hidden_layers == 2
    with safe_open(tmp_path / "grown" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["script"] == "tools/pretrain_encoder.py" and "grown_from" in " ".join(metadata)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["siglip2", "mae"])
def test_pretrain_other_architectures(family, tmp_path):
    from mmfm.autoencoder.encoders import load_encoder

    run("pretrain_encoder.py", "--family", family, "--width", 32, "--batch", 16, "--steps", 3, "--depth", 1,
        "--out", tmp_path / "made")  # fmt: skip
    latent, token = load_encoder(family, tmp_path / "made", 32)(torch.full((1, 3, 32, 32), 0.5))
    assert latent.shape == (1, 32, 4, 4) and token.shape == (1, 32)
    assert latent.flatten(2).std(2).mean() > 1e-2, "equal patches differ by their positions"


@pytest.mark.slow
def test_train_detector(tmp_path):
    from mmfm.evaluation.detector import load_detector

    run("train_detector.py", "--steps", 3, "--out", tmp_path / "detector.safetensors")
    detector = load_detector("fashion", tmp_path / "detector.safetensors", torch.device("cpu"))
    assert detector.features(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 64)


def test_mutants_differ_in_one_operator_or_constant(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.syspath_prepend(ROOT / "tools")
    loaded = {name: module for name, module in sys.modules.items() if name.startswith("mmfm")}
    import mutants

    assert loaded and loaded.items() <= sys.modules.items()  # other tests patch them
    path = tmp_path / "code.py"
    path.write_text(
        "@dataclass(frozen=True)\n"
        "class C:\n    n: Literal[1] = 1\n"
        "zip(a, b, strict=True)\n"
        "if not a or b - 1 < 0.5:\n    c //= min(a).mean()\n"
    )
    found = {mutants.mutate(*mutant)[2].removeprefix(f"{path}:") for mutant in mutants.mutants(path)}
    assert found == {
        "3 `1` -> `2`", "5 `not a or b - 1 < 0.5` -> `not a and b - 1 < 0.5`", "5 `not a` -> `not not a`",
        "5 `b - 1 < 0.5` -> `b - 1 <= 0.5`", "5 `b - 1` -> `b + 1`", "5 `1` -> `2`", "5 `0.5` -> `1.5`",
        "6 `c //= min(a).mean()` -> `c /= min(a).mean()`", "6 `min(a).mean` -> `min(a).sum`", "6 `min` -> `max`",
    }  # fmt: skip
