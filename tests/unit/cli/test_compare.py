"""The command ``compare``: table, marks, picture, and what it says if nothing is finished."""

import json
import platform
import re
import shutil
import subprocess
import sys
from html import unescape

import numpy as np
import pytest
from PIL import Image

from mmfm.cli.__main__ import main
from mmfm.evaluation import comparison, comparison_picture
from mmfm.infra import store
from mmfm.infra.pictures import save_picture
from mmfm.workflow import compared as compared_results
from support.fid_runs import garments  # noqa: F401 (fixture)
from support.finished_results import WARNING, write_mixture, write_result

DISTANCES = {"mode": 6.7, "uncond": 35.6, "gmm": 7.1}
OTHER_DETECTOR = {"detector": {"name": "Inception v3", "digest": "00" * 32}}


@pytest.fixture
def results(garments, tmp_path):
    """The three settings, with their short names."""
    for setting, distance in DISTANCES.items():
        made = write_result(tmp_path / "results", garments[:40], setting, distance)
        shutil.copy(made, made.with_name(f"dinov2_{setting}.json"))
    return tmp_path / "results"


def compared(capsys, *arguments):
    assert main(["compare", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def table(text):
    """Return the rows of the table as lists of words."""
    lines = text.split("\n\n")[1].splitlines()
    return [line.split() for line in lines[1:]]


def test_settings_stand_in_their_order_with_the_best_marked(results, capsys):
    text = compared(capsys, results)
    assert table(text) == [
        ["dinov2", "uncond", "35.6000", "40", "0", "620", "79,360", "01:01", "24", "00:09", "-", "2.000"],
        ["dinov2", "gmm", "7.1000", "40", "0", "620", "79,360", "01:01", "24", "00:09", "64", "0.750"],
        ["*", "dinov2", "mode", "6.7000", "40", "0", "620", "79,360", "01:01", "24", "00:09", "64", "0.750"],
    ]
    assert "floor:     0.2500 (distance of 70 held-out real images)" in text and text.count(WARNING) == 1
    assert "differ" not in text and "[1]" not in text
    header, *rows = text.split("\n\n")[1].splitlines()
    assert {row.index("620") + 3 for row in rows} == {header.index("steps") + 5}  # numbers end below their title


def test_results_without_a_time_of_sampling_are_taken(results, capsys):
    """Those of before it was recorded."""
    for path in (results / "fid").glob("dinov2_*.seed0.*.json"):
        record = store.read_json(path)
        del record["samples"]["seconds"]
        store.write_json(path, record)
    text = compared(capsys, *(results / "fid").glob("dinov2_*.seed0.*.json"))
    assert "sampling" not in text and "training" in text and "00:09" not in text


def test_distances_that_look_equal_are_both_the_best(results, garments, capsys):
    write_result(results, garments[:40], "gmm", DISTANCES["mode"] + 1e-6)
    assert [row[0] == "*" for row in table(compared(capsys, results))] == [False, True, True]


@pytest.mark.parametrize("more", [5e-4, 1e-6])
def test_what_looks_equal_is_marked_alike_in_picture_and_page(results, garments, tmp_path, capsys, more):
    write_result(results, garments[:40], "gmm", DISTANCES["mode"] + more)
    write_result(results, garments[:40], "uncond", DISTANCES["mode"] + more)
    compared(capsys, results, "--out", tmp_path / "c.html")
    page = unescape((tmp_path / "c.html").read_text())
    found = comparison.compare(compared_results.find([results]))
    titles = [next(iter(comparison_picture._titles(row, found.rows))) for row in found.rows]
    marks: dict[str, set[bool]] = {}
    for title in titles:
        name, shown, *mark = title.split()
        assert f"<strong>{name[:-1]}</strong>, {shown}<" in page
        marks.setdefault(shown, set()).add(bool(mark))
    assert all(len(each) == 1 for each in marks.values()) and marks["6.7000"] == {True}
    said = "mode has the" if len(marks) == 2 else "uncond, gmm and mode have the"
    assert f"{said} smallest distance, 6.7000{', and' if len(marks) == 2 else '.'}" in re.sub("<[^>]*>", "", page)


def test_a_result_and_its_short_name_are_one(results, capsys):
    names = [results / "fid" / name for name in ("dinov2_mode.txt", "dinov2_mode.seed0.tiny.k64.t25.json")]
    assert compared(capsys, *names) == compared(capsys, names[1])
    assert table(compared(capsys, names[0])) == table(compared(capsys, names[1]))  # the short name's files are found


def test_the_weights_of_a_step_have_the_model_and_the_time_of_their_training(results, capsys):
    """`.step310` names no training of its own; the history of the whole one says when the step was reached."""
    made = results / "fid" / "dinov2_mode.seed0.tiny.k64.t25.json"
    record = store.read_json(made)
    record["samples"]["weights"]["step"] = 310
    step = made.with_name("dinov2_mode.seed0.tiny.k64.step310.t25.json")
    store.write_json(step, record)
    (results / "sample" / "dinov2_mode" / "seed0.tiny.k64.t25").rename(
        results / "sample" / "dinov2_mode" / "seed0.tiny.k64.step310.t25"
    )
    (found,) = compared_results.find([step])
    assert (found.model, found.training.history[-1]["seconds"]) == ("tiny", 30.0)


def test_files_that_were_made_anew_since_are_not_taken(results, garments, capsys, tmp_path):
    """Other images, a longer training, another mixture: the numbers and images of today are not the result's."""
    record = store.read_json(results / "fid" / "dinov2_mode.json")
    write_result(results, garments[40:80], "mode", 1.0)
    (results / "train" / "dinov2_mode" / "seed0.tiny.k64" / "history.jsonl").write_text('{"step": 700, "seconds": 9}\n')
    store.write_json(results / "spatial_gmm" / "dinov2" / "k64" / "report.json", {"digest": "n", "stats_digest": "n"})
    store.write_json(results / "fid" / "dinov2_mode.seed0.tiny.k64.t25.json", record)
    (row,) = table(compared(capsys, results / "fid" / "dinov2_mode.seed0.tiny.k64.t25.txt"))
    assert row == ["dinov2", "mode", "6.7000", "40", "0", "620", "79,360", "24", "00:09", "64"]
    assert main(["compare", str(results / "fid" / "dinov2_mode.txt"), "--out", str(tmp_path / "a.png")]) == 2
    assert "none of these results has its images any more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (OTHER_DETECTOR, "another detector, Inception v3."),
        ({"reference": {"source": "other images", "digest": "00" * 32}}, "another reference, other images."),
        ({"n_images": 41}, "another number of images, 41."),
        (
            {**OTHER_DETECTOR, "n_images": 41, "warnings": ["41 are few."]},
            "another detector, Inception v3; another number of images, 41.",
        ),
    ],
)
def test_what_cannot_be_compared_is_marked_and_explained(results, garments, capsys, changes, why):
    write_result(results, garments[:40], "class", 0.5, **changes)
    text = compared(capsys, results)
    assert [row[-1] == "[1]" for row in table(text)] == [False, False, False, True]
    assert f"\n[1] Don't compare this row with the others: {why}\n" in text
    assert [row[0] for row in table(text)] == ["dinov2", "dinov2", "*", "dinov2"]  # the smallest of all is not the best
    assert ("WARNING: 41 are few." in text) == ("warnings" in changes)
    assert ("Inception v3  " in text.split("\n\n")[1]) == ("detector" in changes)


def test_each_encoder_measured_by_its_own_tokens_has_its_own_best(results, garments, capsys):
    for setting, distance in (("uncond", 3.0), ("gmm", 2.0)):
        write_result(results, garments[:40], setting, distance, encoder="mae", **OTHER_DETECTOR)
    text = compared(capsys, results)
    assert [(row[0], row[-1]) for row in table(text) if row[0] == "*"] == [("*", "0.750"), ("*", "[1]")]
    assert "[1] Compare these rows only with one another: another detector, Inception v3." in text


def test_what_else_differs_is_said(results, garments, capsys):
    write_result(results, garments[:40], "mode", 6.5, seed=3)
    text = compared(capsys, results)
    assert "\nThe rows also differ in seed, so not only the settings are compared.\n" in text
    assert [row[-8] for row in table(text)] == ["0", "0", "0", "3"] and table(text)[3][0] == "*"


def test_the_files_say_the_same(results, tmp_path, capsys):
    made = {kind: tmp_path / "out" / f"comparison.{kind}" for kind in ("txt", "json", "png")}
    text = compared(capsys, results, *(word for path in made.values() for word in ("--out", path)))
    assert made["txt"].read_text() == text
    found = json.loads(made["json"].read_text())
    assert [(row["setting"], row["distance"], row["best"], row["group"]) for row in found["rows"]] == [
        ("uncond", 35.6, False, 0), ("gmm", 7.1, False, 0), ("mode", 6.7, True, 0),
    ]  # fmt: skip
    assert found["warnings"] == [WARNING] and found["notes"] == []
    assert (found["rows"][1]["training_seconds"], found["rows"][1]["sampling_seconds"]) == (61.5, 9.25)
    assert found["rows"][1]["model"] == "tiny"


def test_the_picture_shows_the_same_images_in_the_order_of_the_table(results, garments, tmp_path, capsys):
    """Three panels of 5 x 5 images, twice as large, side by side; another encoder below."""
    write_result(results, garments[40:80], "gmm", 7.1)  # its own images, to tell the panels apart
    write_result(results, garments[80:120], "uncond", 30.0, encoder="mae")
    compared(capsys, results, "--out", tmp_path / "comparison.png")
    with Image.open(tmp_path / "comparison.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    panel = 5 * 66 - 2
    assert pixels.shape[1] >= 3 * panel + 4 * 16 and 2 * panel < pixels.shape[0] < 2 * panel + 150
    large = [garments[start].repeat(2, axis=0).repeat(2, axis=1) for start in (0, 40, 0, 80)]
    tops = [top for top in range(len(pixels) - 64) if np.array_equal(pixels[top : top + 64, 16:80], large[0])]
    below = [top for top in range(len(pixels) - 64) if np.array_equal(pixels[top : top + 64, 16:80], large[3])]
    assert len(tops) == len(below) == 1 and below[0] > tops[0] + panel
    for i, first in enumerate(large[:3]):
        left = 16 + i * (panel + 16)
        assert np.array_equal(pixels[tops[0] : tops[0] + 64, left : left + 64], first), i


def test_large_images_are_shown_smaller_and_missing_ones_are_told(results, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), np.uint8)
    for setting in ("uncond", "gmm"):
        write_result(tmp_path / "large", noise, setting, 5.0)
    compared(capsys, tmp_path / "large", "--out", tmp_path / "comparison.png")
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.height < 200
    (tmp_path / "large" / "sample" / "dinov2_gmm" / "seed0.tiny.k64.t25" / "images.npz").unlink()
    compared(capsys, tmp_path / "large", "--out", tmp_path / "comparison.png")


def test_folders_of_several_runs_are_told_apart(results, garments, tmp_path, capsys):
    shutil.copytree(results, tmp_path / "results" / "again")
    for path in (tmp_path / "results" / "again" / "fid").iterdir():
        store.write_json(path, {**store.read_json(path), "frechet_distance": 9.0})
    both = table(compared(capsys, results, results / "again", "--out", tmp_path / "both.png"))
    assert [row[-13] for row in both] == [str(results)] * 3 + [str(results / "again")] * 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("results", "there is no finished result in 'results'; make it: snakemake results/comparison.txt --cores all"),
        (
            "results/flowers",
            "no 'results/flowers'; make it: snakemake results/flowers/comparison.txt --cores all "
            "--configfile YAML, the file with `run: flowers`",
        ),
        ("runs/birds/comparison.txt", "is a comparison itself; give results, or their folder: runs/birds"),
        ("runs/flowers", "no 'runs/flowers', there is runs/birds; give a folder of results"),
        ("results/fid/dinov2_mode", "make it: snakemake results/fid/dinov2_mode.txt --cores all"),
        (
            "results/fid",
            "there is no finished result in 'results/fid'; make it: snakemake results/comparison.txt --cores",
        ),
        ("results/fid/nope.txt", "no 'results/fid/nope.txt'; results are results/fid/ENCODER_SETTING.txt"),
        ("results/fid/dinov2_mode.txt", "make it: snakemake results/fid/dinov2_mode.txt --cores all"),
        ("runs", "there is no finished result in 'runs'; give runs/birds"),
        ("damaged.json", "damaged.json is not valid JSON"),
        ("other.json", "'other.json' is not a result of fid"),
        ("list.json", "'list.json' is not a result of fid"),
        ("picture.png", "'picture.png' is not a result; give FOLDER/fid/NAME.txt"),
    ],
)
def test_what_is_no_result_is_one_line(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results" / "fid").mkdir(parents=True)
    (tmp_path / "results" / "fid" / "dinov2_mode.json").write_text("{}")  # a short name alone is not a finished result
    (tmp_path / "runs" / "birds" / "fid").mkdir(parents=True)
    (tmp_path / "runs" / "birds" / "fid" / "dinov2_mode.seed0.tiny.k4.t2.json").touch()
    for name, text in (("damaged.json", "{"), ("other.json", '{"a": 1}'), ("list.json", "[]"), ("picture.png", "")):
        (tmp_path / name).write_text(text)
    if given.endswith("dinov2_mode.txt"):
        (tmp_path / "results" / "fid" / "dinov2_mode.json").unlink()
    assert main(["compare", given]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_record_without_its_numbers_is_named(results, capsys):
    path = results / "fid" / "dinov2_mode.seed0.tiny.k64.t25.json"
    record = store.read_json(path)
    del record["reference"]
    store.write_json(path, record)
    assert main(["compare", str(results)]) == 2
    assert f"'{path}' is not a result of fid (KeyError('reference')); make it again" in capsys.readouterr().err


def test_a_file_of_unknown_kind_is_refused_before_anything_is_read(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "nothing"), "--out", "comparison.jpg"]) == 2
    assert "ends in none of .txt, .json, .png and .html" in capsys.readouterr().err


def test_pytorch_is_not_imported(results, tmp_path):
    program = "import sys; from mmfm.cli.__main__ import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    line = [sys.executable, "-c", program, "compare", str(results), "--out", str(tmp_path / "comparison.png")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def page(results, capsys, tmp_path):
    """Return a function that makes the page of the results and returns its text."""

    def page():
        compared(capsys, results, "--out", tmp_path / "page.html")
        return (tmp_path / "page.html").read_text()

    return page


def words_of(html):
    """Return the words of a page, without its style."""
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(style|svg).*?</\1>", " ", html)).split())


def test_the_page_has_numbers_warnings_costs_and_configuration(results, garments, page):
    write_result(results, garments[:40], "class", 0.5, **OTHER_DETECTOR)
    write_mixture(results / "gmm" / "dinov2" / "k64")
    save_picture(Image.new("RGB", (40, 30), "red"), results / "gmm" / "dinov2" / "k64" / "modes.png")
    for name, seconds, peak in (("dinov2_gmm", 60.5, "900.0"), ("dinov2_mode", 61.0, "1200.0"), ("short", 1.0, "NA")):
        record = results / "benchmarks" / f"train.{name}.seed0.tsv"
        record.parent.mkdir(exist_ok=True)
        record.write_text(f"s\tmax_rss\n{seconds}\t{peak}\n")
    store.write_json(results / "configuration.json", {"configuration": {"run": "a <b> & c"}, "folders": []})
    html = page()
    words = words_of(html)
    assert (
        "uncond 35.6000 fashion-mnist" in words
        and "mode 6.7000 * fashion-mnist" in words
        and "620 79,360 01:01 24 00:09" in words
    )
    assert "mode has the smallest distance, 6.7000, and uncond the largest, 35.6000" in words
    assert WARNING in words and "[1] Don't compare this row with the others" in unescape(words)
    assert "class , 0.5000 (not comparable)" in words
    assert "63 of 64" in words and "coupling cost 0.750" in words
    assert "train 3 02:02 1.2 GB" in words
    assert "run: a &lt;b&gt; &amp; c" in html and f"python {platform.python_version()}" in words
    assert html.count("<img ") == 5 and html.count("<svg ") == 1 and ">uncond</text>" in html


def test_texts_of_results_are_escaped(results, garments, page):
    write_result(results, garments[:40], "class", 0.5, warnings=["<script>1</script> & more"])
    assert "<script" not in (html := page()) and "&lt;script&gt;1&lt;/script&gt; &amp; more" in html


def test_the_page_without_images_histories_and_mixtures(results, page):
    """Results that were kept alone, and those of published weights."""
    for name in ("sample", "train", "spatial_gmm"):
        shutil.rmtree(results / name)
    words = words_of(page())
    assert words.count("its images no longer exist") == 3
    assert "Learning curves" not in words and "The mixture" not in words and "What it cost" not in words


def test_on_the_page_seeds_have_names_and_a_curve_each(results, garments, page):
    write_result(results, garments[40:80], "mode", 6.8, seed=1)
    html = page()
    assert "<strong>mode, seed 1</strong>" in html and ">mode, seed 1</text>" in html
    assert "There is one seed" not in html


def test_the_page_has_finished_curves_that_are_still_true(results, page, capsys, tmp_path):
    made = results / "fid" / "dinov2_mode.seed0.tiny.k64.t25.json"
    record = store.read_json(made)
    record["samples"] |= {"time_points": 4, "function_evaluations": 3, "images_digest": "other"}
    other = made.with_name("dinov2_mode.seed0.tiny.k64.t4.json")
    store.write_json(other, {**record, "frechet_distance": 9.0})
    curve = results / "curve" / "dinov2_mode.t4,25.json"
    assert main(["curve", "t", str(made), str(other), "--out-json", str(curve)]) == 0
    html = page()
    assert "Distance by evaluations, steps" in html and ">evaluations of the network (NFE)</text>" in html
    assert "The smallest: dinov2_mode.t4,25 at 24." in html
    for damage in ("{}", "[]", "not JSON", '{"stage": "curve", "varies": "t", "results": []'):
        (results / "curve" / "dinov2_mode.t5,6.json").write_text(damage)
    assert "Distance by evaluations, steps" in page()
    record["samples"]["images_digest"] = "made anew"
    store.write_json(other, {**record, "frechet_distance": 8.0})
    assert "Distance by evaluations, steps" not in page()


def test_the_page_has_the_pictures_that_others_made_of_the_same_images(results, page):
    digest = store.read_json(results / "fid" / "dinov2_mode.seed0.tiny.k64.t25.json")["samples"]["images_digest"]
    for stage, about in (
        ("mode_quality", {"samples": {"images_digest": digest}}), ("memorisation", {"images_digest": digest}),
    ):  # fmt: skip
        made = results / stage / "dinov2_mode.seed0.tiny.k64.t25.png"
        made.parent.mkdir()
        save_picture(Image.new("RGB", (40, 30), "red"), made)
        store.write_json(made.with_suffix(".json"), {"stage": stage, **about})
    html = page()
    assert "Good and bad modes" in html and "Nearest training images" in html
    store.write_json(made.with_suffix(".json"), {"stage": "memorisation", "images_digest": "made anew"})
    html = page()
    assert "Good and bad modes" in html and "Nearest training images" not in html


def test_other_metrics_are_columns(results, garments, capsys, page):
    assert "recall" not in compared(capsys, results)
    write_result(results, garments[:40], "mode", 6.7, metrics={"recall": 0.5, "kid": 0.01, "kid_std": 0.002})
    text = compared(capsys, results)
    assert "recall" in text and "KID" in text and "0.5000" in text and "0.0100" in text and "0.0020" not in text
    assert ">recall</th>" in page()


def test_the_range_of_seeds_and_the_straightness_are_columns(results, garments, capsys):
    first = results / "fid" / "dinov2_mode.seed0.tiny.k64.t25.json"
    second = write_result(results, garments[40:80], "mode", 6.8, seed=1)
    record = store.read_json(first)
    record["samples"]["straightness"] = {"deviation": 0.0421, "n_images": 64}
    store.write_json(first, record)
    assert "straightness" in compared(capsys, results) and "range" not in compared(capsys, results)
    summary = results / "fid" / "dinov2_mode.seeds2.json"
    assert main(["seeds", str(first), str(second), "--out-json", str(summary)]) == 0
    text = compared(capsys, results)
    assert text.count("6.7 to 6.8 (2)") == 2 and text.count("0.042") == 1
    store.write_json(results / "fid" / "dinov2_mode.json", store.read_json(first))  # a copy, under its short name
    assert "6.7 to 6.8 (2)" in compared(capsys, results / "fid" / "dinov2_mode.txt")
    record = store.read_json(second)
    record["samples"]["images_digest"] = "made anew"
    store.write_json(second, {**record, "frechet_distance": 7.0})
    (results / "fid" / "dinov2_mode.seeds9.json").write_text("[]")
    assert compared(capsys, results).count("6.7 to 6.8 (2)") == 1


def test_results_of_one_training_share_its_curve(results, page):
    made = results / "fid" / "dinov2_mode.seed0.tiny.k64.t25.json"
    record = store.read_json(made)
    record["samples"] |= {"time_points": 4, "function_evaluations": 3, "images_digest": "gone"}
    store.write_json(made.with_name("dinov2_mode.seed0.tiny.k64.t4.json"), record)
    html = page()
    assert "<strong>mode, 4 time points</strong>" in html
    assert html.count(">mode</text>") == 1
