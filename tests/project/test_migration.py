"""docs/migration.md and docs/imagenet256.md: every target is made, by the right jobs, and every key is one."""

import re

import pytest
import yaml

from mmfm import config
from support.checkout import dry_runs, link_workflow
from support.places import DEFAULTS, ROOT

PRESET = ROOT / "config" / "imagenet256.yaml"
LEFT_OUT = ("`--configfile", "not yet", "not needed", "not there", "run it on")
SETTINGS = ("uncond", "gmm", "mode", "class", "class_gmm")


def rows(document: str) -> list[list[str]]:
    """Return the cells of the tables of a document, without their heads."""
    text = (ROOT / "docs" / document).read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [cells for cells in lines if not cells[0].startswith(("published", "target", "--"))]


def answers() -> list[str]:
    """Return what takes the place of the published commands, flags and keys; not what says why nothing does."""
    return [cells[1] for cells in rows("migration.md") if not cells[1].startswith(LEFT_OUT)]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The resources of all jobs, by first output, of every target of the preset and of the documents."""
    folder = link_workflow(tmp_path_factory.mktemp("imagenet"), without=("resources",))
    keys = yaml.safe_load(PRESET.read_text())
    (folder / keys["data"]["root"]).mkdir(parents=True)
    names = [f"{encoder}_{setting}" for encoder in keys["encoders"] for setting in SETTINGS]
    targets = [f"results/imagenet256/fid/{name}{guide}.txt" for name in names for guide in ("", "_ag")]
    targets += [f"results/imagenet256/fid/{cells[0].strip('`')}" for cells in rows("imagenet256.md")]
    targets += [answer.strip("`") for answer in answers() if "results/" in answer]
    return dry_runs(folder, [{"keys": keys, "targets": sorted(set(targets)), "resources": True}])[0]


def test_every_target_of_the_preset_has_its_jobs_and_their_resources(jobs):
    trained = sorted(name.removeprefix("results/imagenet256/train/") for name in jobs if "/train/" in name)
    weights = {name for name in trained if "/step" not in name and ".step" not in name}
    for encoder in ("dinov2", "siglip2", "mae"):
        for setting in SETTINGS:
            modes = ".k8192" if setting in ("gmm", "mode", "class_gmm") else ""
            main = f"{encoder}_{setting}/seed0.XL{modes}/ema.safetensors"
            assert {main, f"{encoder}_{setting}/seed0.S{modes}.guide/ema.safetensors"} <= weights
            need = jobs[f"results/imagenet256/train/{main}"]
            assert (
                need["gpu"] == 1 and need["runtime"] == 24 * 60 and need["mem_mb"] > 10_000 and need["disk_mb"] > 50_000
            )
    assert len(weights) == 3 * 5 * 2, "an autoguided target shares the training of the plain one"


def test_a_milestone_is_of_the_same_training(jobs):
    assert any("dinov2_mode" in name and "25000" in name for name in jobs)


def test_every_key_is_one():
    overrides = [answer.replace("`", "").split(" and ") for answer in answers() if "=" in answer]
    assert len(overrides) > 25
    for keys in overrides:
        config.load([DEFAULTS, PRESET], keys)


def test_every_published_flag_is_there():
    """The flags of the published scripts."""
    table = " ".join(cells[0] for cells in rows("migration.md"))
    flags = """config data-path results-dir image-size precision wandb ckpt global-seed sample-dir
    per-proc-batch-size num-fid-samples tf32 label-sampling output-dir n-components covariance-type init-params max-iter
    reg-covar batch-size num-workers cls-tokens-path data-limit-percentage data-limit-seed flush-interval chunk-size
    skip-pass1 keep-temp-files encoder-cls encoder-config num-samples device compute-mean local-rank ref samples"""
    assert [flag for flag in flags.split() if not re.search(rf"--{flag}\b", table)] == []
