"""Metrics against evaluations, training step, guidance scale and number of modes."""

import pytest
from PIL import Image

from mmfm.cli.__main__ import main
from mmfm.evaluation.curve import collect
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


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("t", {"seed": 4}, r"differ in more than evaluations of the network \(NFE\): seed is 4 and 0"),
        ("t", {}, r"NFE\): 24, 24; a curve needs two points or more, and each value once"),
        ("k", {"n_modes": 8, "mode_draw": "x", "time_points": 4}, "more than modes: time_points is 4 and 25"),
    ],
)
def test_what_is_no_curve_is_refused(record, part, change, message):
    with pytest.raises(ValueError, match=message):
        collect({"a": record, "b": changed(record, 1.0, **change)}, part)
    with pytest.raises(ValueError, match="not a result of fid"):
        collect({"a": record, "b": {"stage": "sweep"}}, part)
