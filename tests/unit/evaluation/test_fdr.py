"""FDr: the mean ratio over detectors, from results of the workflow and of `mmfm evaluate`."""

import pytest

from mmfm.cli.__main__ import main
from mmfm.evaluation.fdr import collect, mean_ratio
from mmfm.infra import store


def test_mean_ratio_over_encoders():
    assert mean_ratio({"a": 6.0, "b": 100.0}, {"b": 50.0, "a": 2.0}) == 2.5
    with pytest.raises(ValueError, match=r"features of a, floors in those of b; give both for the same encoders"):
        mean_ratio({"a": 1.0}, {"b": 1.0})
    with pytest.raises(ValueError, match="none"):
        mean_ratio({}, {})
    for floor in (0.0, float("nan")):
        with pytest.raises(ValueError, match=r"held-out images are at distance .* in a"):
            mean_ratio({"a": 1.0}, {"a": floor})


def of_fid(name, distance, floor, images="aa"):
    return {
        "frechet_distance": distance, "floor": floor, "floor_n_images": 50,
        "samples": {"images_digest": images, "n_images": 100},
        "detector": {"name": name, "digest": name * 2}, "reference": {"digest": f"content for {name}"},
    }  # fmt: skip


def evaluated(name, distance, images="aa"):
    return {
        "metrics": {"frechet": distance}, "samples": {"digest": f"file {images}", "n_images": 100},
        "detector": {"name": name, "digest": name * 2}, "reference": {"digest": f"file for {name}"},
    }  # fmt: skip


def test_results_of_fid_and_of_evaluate(tmp_path, capsys):
    files = {"a": of_fid("a", 6.0, 2.0), "b": evaluated("b", 100.0), "b.real": evaluated("b", 50.0, "bb")}
    for name, content in files.items():
        store.write_json(tmp_path / f"{name}.json", content)
    a, b, real = (str(tmp_path / f"{name}.json") for name in files)
    assert main(["fdr", a, b, "--floors", real, "--out-json", str(tmp_path / "fdr.json")]) == 0
    assert "over 2 detectors: 2.5000" in (text := capsys.readouterr().out) and "3.0000  (6.0000 against 2.0000)" in text
    assert text.count("WARNING") == 1 and "a: 100 generated images, but 50 held-out ones" in text
    assert store.read_json(tmp_path / "fdr.json")["ratios"] == {"a": 3.0, "b": 2.0}
    assert main(["fdr", a]) == 0 and "over 1 detector: 3.0000" in capsys.readouterr().out


OTHER_REFERENCE = evaluated("b", 1.0, "real") | {"reference": {"digest": "another"}}


@pytest.mark.parametrize(
    ("results", "floors", "message"),
    [
        ([of_fid("a", 1.0, 1.0), of_fid("b", 1.0, 1.0, "cc")], [], "of different images"),
        ([of_fid("a", 1.0, 1.0), of_fid("a", 1.0, 1.0)], [], "two results have the detector a"),
        ([of_fid("a", 1.0, None)], [], "held-out real images is unknown for a .* --floors"),
        ([of_fid("a", 1.0, 1.0)], [evaluated("a", 1.0)], "the result for a has a floor already"),
        ([of_fid("a", 1.0, 1.0)], [evaluated("b", 1.0)], "no result for the detector of a floor: b"),
        ([evaluated("b", 1.0)], [OTHER_REFERENCE], "floor for b is of another reference"),
        ([{"stage": "sweep"}], [], "not a result of fid or of 'mmfm evaluate'"),
    ],
)
def test_what_has_no_fdr_is_refused(results, floors, message):
    with pytest.raises(ValueError, match=message):
        collect(results, floors)


def test_a_floor_for_a_result_of_the_workflow():
    found = collect([of_fid("a", 6.0, None)], [evaluated("a", 3.0, "real")])
    assert found["fdr"] == 2.0 and not found["warnings"]
