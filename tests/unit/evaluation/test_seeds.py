"""Mean and range of several seeds: the numbers, and results that are no seeds of one setting."""

import pytest

from mmfm.cli.__main__ import main
from mmfm.evaluation.seeds import summarise
from mmfm.infra import store
from mmfm.workflow import compared
from support.fid_runs import garments  # noqa: F401 (fixture)
from support.finished_results import write_result

DISTANCES = (7.0, 6.0, 8.5)


@pytest.fixture
def results(garments, tmp_path):
    return [
        write_result(tmp_path, garments[:40], "mode", distance, seed=seed, metrics={"recall": 0.5 + seed / 10})
        for seed, distance in enumerate(DISTANCES)
    ]


def test_mean_and_range_of_every_metric(results, tmp_path, capsys):
    out = tmp_path / "fid" / "dinov2_mode.seeds3"
    files = ["--out-txt", f"{out}.txt", "--out-json", f"{out}.json"]
    assert main(["seeds", *(str(path.with_suffix(".txt")) for path in results), *files]) == 0
    text, found = (tmp_path / "fid" / "dinov2_mode.seeds3.txt").read_text(), store.read_json(f"{out}.json")
    assert capsys.readouterr().out == text
    distance, recall = found["metrics"]["frechet"], found["metrics"]["recall"]
    assert [distance[name] for name in ("mean", "min", "max")] == pytest.approx([21.5 / 3, 6.0, 8.5])
    assert distance["std"] == pytest.approx((19 / 12) ** 0.5) and distance["values"] == list(DISTANCES)
    assert recall["mean"] == pytest.approx(0.6) and found["seeds"] == [0, 1, 2] and found["n_images"] == 40
    assert text.startswith("Frechet distance (not an FID), 3 seeds: 7.1667 (6.0000 to 8.5000)")
    assert text.count("WARNING") == 1 and "0, 1, 2, of sampling, of the same weights" in text
    assert [result.path for result in compared.find([tmp_path / "fid" / "dinov2_mode.seeds3.txt"])] == results


def test_a_seed_of_before_the_quantisation_was_recorded(results):
    records = {path.stem: store.read_json(path) for path in results}
    for name, record in records.items():
        record["samples"].pop("quantisation", None)
        if name != results[0].stem:
            record["samples"]["quantisation"] = "truncated to 8 bits"
    assert summarise(records)["seeds"] == [0, 1, 2]


def test_a_metric_that_only_some_have_is_left_out(results):
    records = {path.stem: store.read_json(path) for path in results}
    records[results[1].stem]["samples"]["weights"]["digest"] = "cd" * 32
    del records[results[2].stem]["metrics"]
    found = summarise(records)
    assert set(found["metrics"]) == {"frechet"} and found["trained"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["samples"].update(time_points=4), "differ in more than their seed: time_points is 4 and 25"),
        (lambda r: r["reference"].update(digest="0"), "differ in more than their seed: reference is 0"),
        (lambda r: r["samples"].update(guidance={"scale": 2.0}), "their seed: guidance is True and False"),
        (lambda r: r["samples"]["weights"].update(step=9), "step is 9 and 620"),
        (lambda r: r["samples"].update(seed=0), "the results have the seeds 0, 0, 2; give two or more"),
        (lambda r: r.pop("detector"), "a file is not a result of fid"),
    ],
)  # fmt: skip
def test_what_is_no_other_seed_is_refused(results, change, message):
    records = {path.stem: store.read_json(path) for path in results}
    change(records[results[1].stem])
    with pytest.raises(ValueError, match=message):
        summarise(records)


def test_one_result_has_no_range(results, capsys):
    assert main(["seeds", str(results[0])]) == 2
    assert "the results have the seeds 0; give two or more" in capsys.readouterr().err
