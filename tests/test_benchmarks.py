"""The benchmarks' own arithmetic, on made-up measurements."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(FOLDER))


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo_effect_tables(tmp_path):
    effect = load("demo_effect")
    runs = [(setting, seed, t) for setting in effect.SETTINGS for seed in (0, 1, 2) for t in (1, 4, 25)]
    distances = {f"{setting}/{seed}/10/{t}": 10.0 * t + seed for setting, seed, t in runs}
    distances |= {"uncond/0/3/25": 400.0, "uncond/0/30/25": 100.0}
    found = {"distances": distances, "floor": 0.5, "steps_per_epoch": 62, "detector": "d"}
    rows = effect.table(found, 10)
    assert "| `gmm` | 11.00 (10.00 to 12.00) | 41.00 (40.00 to 42.00) | 251.00 (250.00 to 252.00) | 0.163 |" in rows
    assert effect.curve(found, 25)["uncond"] == [(186, 400.0), (620, 250.0), (1860, 100.0)]
    effect.draw(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_model_arithmetic(tmp_path, monkeypatch, capsys):
    model = load("model")
    monkeypatch.setattr(model, "SIZES", {"tiny": (model.dit.DiTConfig(4, 1, 8, (16, 16), (1, 1), (2, 2), 3, 0.0), 2)})
    model.main(["--rounds", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "model.json").read_text())["sizes"]["tiny"]
    assert found["relative_difference"] < 1e-5
    assert set(found["gain"]) == {*model.PLAIN, "all"} and "| all | " in capsys.readouterr().out


def test_stage_times(tmp_path, capsys, monkeypatch):
    times = load("stage_times")
    (tmp_path / "benchmarks").mkdir()
    for name, seconds in (("train.dinov2_mode.seed0", 100.5), ("extract.dinov2", 10.25), ("short_name.x", 1)):
        (tmp_path / "benchmarks" / f"{name}.tsv").write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0\t1500.0\n")
    monkeypatch.setattr("sys.argv", ["stage_times.py", str(tmp_path)])
    times.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| `extract` | dinov2 | 10.2 | 1.5 GB |" and lines[-1] == "| sum | | 110.8 | |"


def test_guidance(tmp_path, capsys, monkeypatch):
    guidance = load("guidance")
    found = guidance.summary({"model": [2.0, 9.0, 2.0], "guide": [1.0], "autoguided": [3.0, 3.6, 3.3]})
    assert found["ratio"] == pytest.approx(1.1) and found["median_seconds"]["model"] == 2.0
    small = ["--model", "tiny_guide", "--batch", "2", "--labels", "3", "--quick", "--out-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["guidance.py", *small])
    guidance.main()
    text = capsys.readouterr().out
    assert "tiny_guide guided by tiny_guide" in text and "| autoguided |" in text
    (written,) = tmp_path.glob("guidance-tiny_guide-*.json")
    seconds = json.loads(written.read_text())["seconds"]
    assert {len(values) for values in seconds.values()} == {7} and len(seconds) == 4
