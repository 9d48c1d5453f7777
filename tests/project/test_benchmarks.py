"""The benchmarks' own arithmetic, on made-up measurements."""

import importlib.util
import json
import sys

import pytest

from support.places import ROOT

FOLDER = ROOT / "benchmarks"
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
    effect.draw(found, tmp_path / "curve.png", 10)
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_model_arithmetic(tmp_path, monkeypatch, capsys):
    model = load("model")
    monkeypatch.setattr(model, "SIZES", {"tiny": (model.dit.DiTConfig(4, 1, 8, (16, 16), (1, 1), (2, 2), 3, 0.0), 2)})
    model.main(["--rounds", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "model.json").read_text())["sizes"]["tiny"]
    assert found["relative_difference"] < 1e-5
    assert set(found["gain"]) == {*model.PLAIN, "all"} and "| all | " in capsys.readouterr().out


def test_loss_weights_are_the_published_ones_where_one_gpu_takes_whole_steps(tmp_path):
    """With one micro-batch a step both are the same, but the published ones begin a micro-batch after the warm-up."""
    bench = load("weighting")
    mine, theirs, losses = bench.ours(6, 0.9, 5), bench.Published(6, 0.9, 5), bench.Losses(6, 0)
    bench_ranks = bench.Ranks(0, 1, bench.torch.device("cpu"))
    for step in range(12):
        weights = (mine.weights.tolist(), theirs.weights().tolist())
        assert step == 5 or weights[0] == pytest.approx(weights[1], rel=1e-4)
        assert (max(weights[0]) > 1) == (step >= 5) and (max(weights[1]) > 1) == (step >= 6)
        labels, values = (part[:7] for part in losses.step(step))
        theirs.update(values, labels)
        mine.weigh(bench.torch.from_numpy(values), bench.torch.from_numpy(labels))
        mine.after_step(bench_ranks, step + 1)
    assert bench.main(["--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "weighting.json").read_text())["accumulations"]["2"]
    assert found["warmup_steps"] == 10 and found["steps"]["40"]["ours_theirs"]["correlation"] > 0.95


def test_equivalent_loss_weighting():
    """The warm-ups of the published configurations, and the exponent of the decay for rare and for frequent labels."""
    equivalent = load("weighting").equivalent
    assert [equivalent(n, 8192)["warmup_steps"] for n in (32, 8, 4, 2)] == [78, 313, 625, 1250]
    assert equivalent(8, 8192)["decay"] == pytest.approx(0.9995**0.125)
    assert equivalent(8, 10**9)["decay_for_equal_frequencies"] == pytest.approx(0.9995**0.125, abs=1e-9)
    assert equivalent(8, 2)["decay_for_equal_frequencies"] == pytest.approx(0.9995**8, abs=1e-4)


@pytest.mark.slow
def test_killed_training(tmp_path, capsys):
    kill = load("train_kill")
    assert kill.main(["--quick", "--out", str(tmp_path)]) == 0
    (series,) = json.loads((tmp_path / "train_kill.json").read_text())["series"]
    assert series["bit_equal"] and 1 <= len(series["kills"]) <= 2 and series["steps"] == 60
    assert not kill.passed({**series, "bit_equal": False}), "one process must be equal to the bit"


@pytest.mark.slow
def test_divided_training(tmp_path):
    names = ["1 process", "1 process, micro-batches of 5"]
    assert load("train_processes").main(["--steps", "10", "--variants", *names, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "train_processes.json").read_text())
    assert found["steps"] == 10 and 0 < found["variants"][names[1]]["loss"] < 1e-4


@pytest.mark.slow
def test_training_speed(tmp_path):
    speed = load("train_speed")
    speed.main(
        [
            "--steps",
            "2",
            "--images",
            "64",
            "--out",
            str(tmp_path),
            "--overrides",
            "train.global_batch=16",
            *load("runs").SMALL,
        ]
    )
    found = json.loads((tmp_path / "train_speed.json").read_text())
    (run,) = found["measured"]
    assert sum(run["parts"].values()) == pytest.approx(1) and all(share > 0 for share in run["parts"].values())
    assert 0 < run["bare_share"] < 1.5 and run["batch"] == 16
    assert "Bare forward and backward pass" in (tmp_path / "train_speed.md").read_text()


def test_steps_of_the_real_size_in_small(tmp_path, monkeypatch, capsys):
    full = load("full_size")
    assert full.needed_gb("XL", 1) == pytest.approx(18.0, rel=0.05), "as measured"
    for name, value in (("SHAPE", (8, 4, 4)), ("LABELS", 5)):
        monkeypatch.setattr(full, name, value)
    found = full.train("tiny_guide", 2, 1, tmp_path / "state-x", True)
    assert found["flops_per_step"] > 1e6 and found["gflops"] > 0 and found["gflops_of_passes"] > found["gflops"]
    assert found["loss"] == pytest.approx(2, abs=0.3)  # two independent normals
    assert found["checkpoint_gb"] == pytest.approx(16 * found["parameters"] / 1e9, rel=0.05)
    again = full.resume("tiny_guide", 2, 1, tmp_path / "state-x")
    run = {"model": "tiny_guide", "threads": 1, "batch": 2, **found, **again}
    assert "| DiTDH-tiny_guide | 1 | 2 |" in full.report([run])
    monkeypatch.setattr(full, "free_gb", lambda: 3.0)
    assert full.main(["--models", "XL", "--out", str(tmp_path)]) == 0
    assert "| DiTDH-XL | 1 | 1 | does not fit: about 17.2 GB, 3.0 free |" in capsys.readouterr().out


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


@pytest.mark.slow
def test_the_loops_of_a_gpu_on_a_cpu(tmp_path, capsys):
    gpu = load("gpu")
    call = ["--tiny", "--models", "tiny", "--micro-batches", "2", "--compile", "off", "--steps", "1"]
    assert gpu.main([*call, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(gpu.PARTS) <= set(found) and found["train"][0]["loss"] == pytest.approx(2, abs=0.3)
    assert [row["what"] for row in found["sample"]][:2] == ["tiny", "tiny, guided by tiny"]
    assert "| DiTDH-tiny | 2 | off |" in (tmp_path / "gpu.md").read_text()


def test_covariances_agree_with_the_reports_and_are_listed_in_order(tmp_path):
    """The coupling cost is that of the stage: the mean squared distance of two draws of one mode."""
    bench = load("covariances")
    torch = bench.torch
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, 2, 3, 3, generator=generator, dtype=torch.float64)
    labels = bench.np.arange(60) % 3
    values += 4 * torch.tensor(labels)[:, None, None, None]
    cost = bench.coupling_cost(values, labels, bench.np.full(3, 1 / 3))
    union = [torch.cat([part, part.flip(-1)]) for part in (values[labels == mode] for mode in range(3))]
    within = sum(float((part - part.mean(0)).square().mean()) for part in union) / 3
    assert cost == pytest.approx(2 * within)
    assert list(bench.kinds([0.0, 4.0])) == ["diag", "diag, 4 rows", *bench.OTHERS]
    row = {"train": 2.0, "heldout": 1.0, "standard_error": 0.1, "bic": 3.0, "coupling_cost": 1.5}
    row["heldout_images"], better = [0.0, 2.0], {**row, "heldout_images": [1.0, 5.0]}
    labelled = ["512/diag", "64/tied", "64/diag, 16 rows", "64/diag, 4 rows", "64/diag"]
    found = {"train_images": 8, "heldout_images": 2, "fits": dict.fromkeys(labelled, row) | {"64/tied": better},
             "distances": {"64/tied": {"source": 2.5, "flow": 1.25}}}  # fmt: skip
    lines = bench.table(found).splitlines()[-5:]
    order = ["64 | diag |", "64 | diag, 4", "64 | diag, 16", "64 | tied", "512 | diag"]
    assert all(f"| {start}" in line for start, line in zip(order, lines, strict=True))
    assert lines[3].endswith("| 2.50 | 1.25 |") and "| 1.0 |  | 1.0 | 3.0 | 1.500 |" in lines[0]
    assert "| 1.0 | +2.0 (1.0) | 1.0 |" in lines[3], "differences 1 and 3, standard error 1"


def test_startup(tmp_path):
    """That it measures what it says; the limits are for a quiet machine."""
    startup = load("startup")
    startup.main(["--rounds", "1", "--targets", "3", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "startup.json").read_text())
    assert found["targets"] == 3 and len(startup.MANY) == 200
    assert all(0 < found[name][0] < 120 for name in ("empty", "nothing to do", "many"))
    assert "| 3 results | " in (tmp_path / "startup.md").read_text()
    slow = {"empty": [1.0, 1.1, 9.0], "nothing to do": [1.4, 1.2, 1.5], "many": [3.0], "targets": 3}
    assert startup.summary(slow)["ratio"] == pytest.approx(1.4 / 1.1)
    assert startup.passed(slow) and not startup.passed(slow | {"many": [11.0]})
    assert not startup.passed(slow | {"nothing to do": [1.5]})


def test_metrics_agree_with_what_they_are_timed_against(tmp_path):
    bench = load("metrics")
    bench.main(["--images", "60", "--reference", "50", "--features", "8", "--subsets", "2", "--rounds", "2",
                "--out", str(tmp_path)])  # fmt: skip
    found = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    for metric, tolerance in {"Frechet distance": 1e-6, "Inception Score": 1e-9, "KID": 1e-3}.items():
        ours = found[metric]["value"].pop(bench.OURS)
        assert list(found[metric]["value"].values()) == pytest.approx(
            [ours] * len(found[metric]["value"]), rel=tolerance
        )
    assert "| Frechet distance | SciPy sqrtm |" in (tmp_path / "metrics.md").read_text()
