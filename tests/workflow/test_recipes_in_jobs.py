"""Recipes, budgets in steps and steps in names, in dry runs of the real rules."""

import json

import pytest

from support.checkout import dry_runs, link_workflow

TRAIN, GUIDE = "seed0.tiny.k256/ema.safetensors", "seed0.tiny_guide.k256.guide/ema.safetensors"
TARGETS = [f"results/fid/dinov2_{name}.txt" for name in ("uncond", "gmm", "mode", "mode_ag")]
KEYS = {
    "gpus": 0,
    "recipes": {
        "modes": {"settings": ["mode"], "models": ["tiny"], "train": {"lr": 0.5, "micro_batch": 16}},
        "guides": {"models": ["tiny_guide"], "train": {"weight_decay": 0.25, "micro_batch": 8}},
    },
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return link_workflow(tmp_path_factory.mktemp("checkout"))


def test_a_recipe_is_in_the_jobs_that_it_is_for(checkout):
    plain = {"keys": {"gpus": 0}, "targets": TARGETS}
    recipes = {"keys": KEYS, "targets": TARGETS}
    calls = [{**call, wanted: True} for wanted in ("parameters", "operation") for call in (plain, recipes)]
    before, after, flags_before, flags_after = dry_runs(checkout, calls)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    mode, guide = (f"results/train/dinov2_mode/{name}" for name in (TRAIN, GUIDE))
    assert changed == {mode, guide}
    assert json.loads(after[mode])["train"]["lr"] == 0.5 and json.loads(after[guide])["train"]["weight_decay"] == 0.25
    assert {name for name in flags_before if flags_before[name] != flags_after[name]} == changed
    assert "train.micro_batch=16 " in flags_after[mode] and "train.micro_batch=8 " in flags_after[guide]


def test_a_recipe_reruns_what_it_is_for(checkout):
    calls = [{"keys": {"gpus": 0}, "targets": TARGETS, "touch": True}, {"keys": {"gpus": 0}, "targets": TARGETS}]
    calls += [{"keys": KEYS, "targets": [target]} for target in TARGETS]
    _, again, uncond, gmm, mode, guided = dry_runs(checkout, calls)
    assert again == uncond == gmm == []
    assert {"train", "sample", "fid"} <= set(mode) and "fit_gmm" not in mode and {"train", "sample"} <= set(guided)


def test_a_step_is_a_milestone_of_the_same_training(checkout):
    """The job `train` of both is the same; it is told to keep the steps that the targets of the run ask for."""
    names = [
        f"results/fid/dinov2_{name}.txt" for name in ("mode", "mode.step60", "mode_ag.step60.t4", "mode.seed1.step9")
    ]
    keys = {"gpus": 0, "train": {"milestone_steps": [30]}, "guide": {"steps": 7}, "run": "steps"}
    names = [name.replace("results", "results/steps") for name in names]
    calls = [{"keys": keys, "targets": names, wanted: True} for wanted in ("parameters", "operation", "graph")]
    parameters, flags, graph = dry_runs(checkout, calls)
    folder = "results/steps/train/dinov2_mode/"
    trained = {name.removeprefix(folder): json.loads(value) for name, value in parameters.items() if folder in name}
    assert set(trained) == {TRAIN, GUIDE, TRAIN.replace("seed0", "seed1")}
    assert trained[GUIDE]["train"]["steps"] == 7 and "steps" not in trained[TRAIN]["train"]
    kept = {name: flags[folder + name].split("train.milestone_steps=")[1].split()[0] for name in trained}
    assert kept == {TRAIN: "[30,60]", TRAIN.replace("seed0", "seed1"): "[9,30]", GUIDE: "[30]"}
    assert graph["milestone"]["parents"] == ["train"] and "milestone" in graph["sample"]["parents"]
    several = ["results/steps/fid/dinov2_mode.seeds2.step9.txt"], ["results/steps/curve/dinov2_mode.step9,20.png"]
    flags, of_curve = dry_runs(checkout, [{"keys": keys, "targets": asked, "operation": True} for asked in several])
    assert of_curve[folder + TRAIN].split("steps=")[1].split()[0] == "[9,20,30]"
    kept = [flags[folder + TRAIN.replace("seed0", f"seed{i}")].split("steps=")[1].split()[0] for i in range(2)]
    assert kept == ["[9,30]", "[9,30]"]
    judged = [{"keys": keys, "targets": ["results/steps/mode_quality/dinov2_mode.step9.png"], "operation": True}]
    (flags,) = dry_runs(checkout, judged)
    assert flags[folder + TRAIN].split("milestone_steps=")[1].split()[0] == "[9,30]"
    plain = [{"keys": keys, "targets": names[:1], "touch": True}, {"keys": keys, "targets": names[:2]}]
    later = dry_runs(checkout, plain)[1]
    assert later == ["fid", "milestone", "sample", "short_fid"]
