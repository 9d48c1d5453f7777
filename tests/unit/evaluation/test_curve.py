"""Metrics against evaluations, training step, guidance scale and number of modes."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from mmfm.cli.__main__ import main
from mmfm.evaluation.curve import collect, plot, render
from mmfm.infra import store
from support.fid_runs import garments  # noqa: F401 (fixture)
from support.finished_results import WARNING, write_result

POINTS = {25: 6.0, 5: 9.0, 10: 6.5}
"""Distances by time points, not in their order."""


@pytest.fixture
def record(garments, tmp_path):
    return store.read_json(write_result(tmp_path, garments[:40], "mode", 6.0, metrics={"recall": 0.5}))


def changed(record, distance, recall=0.5, weights=(), **samples):
    known = record["samples"]
    return {
        **record, "frechet_distance": distance, "metrics": {"recall": recall},
        "samples": {**known, **samples, "weights": {**known["weights"], **dict(weights)}},
    }  # fmt: skip


@pytest.fixture
def by_evaluations(record, tmp_path):
    """Return the paths of results with three numbers of time points."""
    paths = []
    for t, distance in POINTS.items():
        paths.append(tmp_path / "fid" / f"dinov2_mode.seed0.tiny.k64.t{t}.json")
        other = changed(
            record, distance, 1 - distance / 10, time_points=t, function_evaluations=t - 1, images_digest=str(t)
        )
        store.write_json(paths[-1], other)
    return paths


def test_points_in_order_with_the_best_of_every_metric(by_evaluations, tmp_path, capsys):
    out = tmp_path / "curve" / "dinov2_mode.t5,10,25"
    files = [f"--out-{kind}={out}.{kind}" for kind in ("png", "txt", "json")]
    assert main(["curve", "t", *(str(path.with_suffix(".txt")) for path in by_evaluations), *files]) == 0
    found, text = store.read_json(f"{out}.json"), (tmp_path / "curve" / f"{out.name}.txt").read_text()
    assert capsys.readouterr().out == text
    assert found["values"] == [4, 9, 24] and found["metrics"]["frechet"] == [9.0, 6.5, 6.0]
    assert found["best"] == {"frechet": 24, "recall": 24} and found["images_digests"] == ["5", "10", "25"]
    lines = [line.split() for line in text.splitlines()]
    assert ["evaluations", "Frechet", "distance", "recall"] in lines and ["24", "6.0000*", "0.4000*"] in lines
    assert ["4", "9.0000", "0.1000"] in lines and text.count(f"WARNING: {WARNING}") == 1
    with Image.open(f"{out}.png") as picture:
        assert picture.width > 700 and len(picture.convert("RGB").getcolors(2**20)) > 20


@pytest.mark.parametrize(
    ("part", "changes", "values"),
    [
        ("step", [{"weights": {"step": 310}}, {"weights": {"step": 620}}], [310, 620]),
        ("k", [{"n_modes": 256, "n_labels": 256}, {}], [64, 256]),
        ("g", [{"guidance": {"kind": "classifier-free", "scale": 2.5, "interval": [0, 1]}}, {}], [1.0, 2.5]),
    ],
)
def test_what_else_can_vary(record, part, changes, values):
    records = {f"r{i}": changed(record, 5.0 + i, **change) for i, change in enumerate(changes)}
    found = collect(records, part)
    assert found["values"] == values and found["best"]["frechet"] == (values[1] if part != "step" else values[0])


def test_guided_results_differ_in_their_scale_alone(record):
    guided = {"kind": "autoguidance", "scale": 2.0, "interval": [0, 1], "guide": {"digest": "aa"}}
    for name, value in (("kind", "classifier-free"), ("interval", [0, 0.5]), ("guide", {"digest": "bb"})):
        records = {"a": record, "b": changed(record, 5.0, guidance=guided)}
        records["c"] = changed(record, 4.0, guidance={**guided, "scale": 3.0, name: value})
        with pytest.raises(ValueError, match=f"'c' and 'b' differ in more than guidance scale: guidance {name} is"):
            collect(records, "g")
        records["c"]["samples"]["guidance"].update(guided, scale=3.0)
        assert collect(records, "g")["values"] == [1.0, 2.0, 3.0]


def test_the_source_alone_is_a_point_without_evaluations_or_guidance(record):
    guided = {"kind": "autoguidance", "scale": 2.0, "interval": [0, 1], "guide": {"digest": "aa"}}
    source = {"source_only": True, "solver": None, "function_evaluations": 0, "time_points": 1}
    records = {"a": changed(record, 5.0, guidance=guided), "b": changed(record, 9.0, **source)}
    assert collect(records, "t")["values"] == [0, 24]


def test_whole_numbers_keep_their_digits(record):
    records = {f"r{step}": changed(record, 1.0, weights={"step": step}) for step in (1_250_000, 1_250_001)}
    assert "1,250,000 " in render(collect(records, "step"))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("t", {"seed": 4}, r"differ in more than evaluations of the network \(NFE\): seed is 4 and 0"),
        ("t", {}, r"NFE\): 24, 24; a curve needs two points or more, and each value once"),
        ("t", {"time_points": 4, "weights": {"digest": "cd"}}, "weights is cd and abab"),
        ("k", {"n_modes": 8, "mode_draw": "x"}, "more than modes: mode_draw is x and k ~"),
        ("k", {"n_modes": 8, "weights": {"model": {"depth": 2}}}, "more than modes: model depth is 2 and None"),
        ("step", {"weights": {"step": None}}, "does not say its training step, as with weights that were given"),
    ],
)
def test_what_is_no_curve_is_refused(record, part, change, message):
    with pytest.raises(ValueError, match=message):
        collect({"a": record, "b": changed(record, 1.0, **change)}, part)
    with pytest.raises(ValueError, match="not a result of fid"):
        collect({"a": record, "b": {"stage": "sweep"}}, part)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("dinov2_mode.t1,2,3", "dinov2, setting mode"),
        (
            "my_mode_mode_ag.seed1.tiny.k64.g1,1.5,2.t25",
            "my_mode, setting mode_ag, seed 1, tiny, 64 modes, 25 time points",
        ),
        ("dinov2_mode.k64,256.step310.t5.g1.5", "dinov2, setting mode, step 310, 5 time points, guidance 1.5"),
        ("nfe", "nfe"),
        ("nfe_model", "nfe_model"),
    ],
)
def test_the_title_is_in_words(by_evaluations, tmp_path, monkeypatch, name, title):
    said = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **_: said.append(text))
    records = {path.stem: store.read_json(path) for path in by_evaluations}
    plot(collect(records, "t"), tmp_path / "a.png", name)
    assert said == [f"{title}; 40 images for each point"]
