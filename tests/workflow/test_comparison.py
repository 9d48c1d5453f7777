"""The target ``comparison``: what it requires, in which order its command gets it, and what makes it again."""

import shlex
import subprocess
import sys

import pytest
import yaml

from support.checkout import dry_runs, link_workflow

SETTINGS = ("uncond", "gmm", "mode")


@pytest.fixture
def checkout(tmp_path):
    return link_workflow(tmp_path)


def test_it_requires_the_three_settings_and_follows_them(checkout):
    keys, target = {"gpus": 0}, ["results/comparison.png"]
    made, graph, bare, again, sampled, other = dry_runs(
        checkout,
        [
            {"keys": keys, "targets": target, "touch": True},
            {"keys": keys, "targets": target, "graph": True},
            {"keys": keys, "targets": []},
            {"keys": keys, "targets": target},
            {"keys": {**keys, "sample": {"n_images": 100}}, "targets": target},
            {"keys": {**keys, "guide": {"scale": 2.0}}, "targets": target},
        ],
    )
    assert {"train", "sample", "fid", "comparison"} <= set(made) and "short_fid" not in made
    assert graph["comparison"]["outputs"] == ["comparison.png", "comparison.txt", "comparison.json", "comparison.html"]
    assert graph["comparison"]["parents"] == ["fid", "sample", "spatial_gmm", "train"]
    assert bare == [
        "all",
        "short_fid",
    ]  # the default target has the comparison, and the distances by their short names
    assert again == other == []
    assert sampled == ["comparison", "fid", "sample"]


def test_every_encoder_of_a_run_is_in_it_in_order(checkout):
    encoder = {"family": "dinov2", "weights": "resources/demo/encoder", "input_size": 32}
    keys = {"gpus": 0, "run": "flowers", "data": {"root": "demo"}, "encoders": {"second": encoder}}
    (checkout / "mine.yaml").write_text(yaml.safe_dump(keys))
    line = [sys.executable, "-m", "snakemake", "-n", "-p", "--cores", "1", "--configfile", "mine.yaml"]
    result = subprocess.run(
        [*line, "--", "results/flowers/comparison.txt"], cwd=checkout, capture_output=True, text=True
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    (command,) = (text for text in result.stdout.splitlines() if "mmfm.cli compare" in text)
    words = shlex.split(command)
    results = words[words.index("compare") + 1 : words.index("--out")]
    names = [path.removeprefix("results/flowers/fid/").partition(".")[0] for path in results]
    encoders = [name.removesuffix("_uncond") for name in names[::3]]
    assert sorted(encoders) == ["dinov2", "second"]
    assert names == [f"{encoder}_{setting}" for encoder in encoders for setting in SETTINGS]
