"""Budgets in steps, and the weights of an earlier step of a training."""

import shutil

import pytest

from mmfm.cli.__main__ import main
from mmfm.models.weights import weights_metadata
from support.train_runs import assert_equal, history, run, state_of, steps_kept, weights


@pytest.fixture(scope="module")
def long(tiny_pipeline, tmp_path_factory):
    """Three epochs of 5 steps, with an initial phase and weights by mode; step 7 is kept, step 9 is not."""
    out = tmp_path_factory.mktemp("long")
    return run(tiny_pipeline, out, "mode", **RECIPE, milestone_steps=[7], keep_checkpoints=1)


RECIPE = {
    "initial_phase": {"epochs": 1, "lr": 3e-3, "ema_decay": 0.5},
    "loss_weighting": {
        "rule": "focal", "by": "mode", "decay": 0.9, "gamma": 2.0, "warmup_epochs": 0, "warmup_steps": 3,
        "bounds": [0.3, 3.0],
    },
}  # fmt: skip


def milestone(out, step, to):
    return main(["milestone", "--ema", str(out / "ema.safetensors"), "--step", str(step), "--out", str(to)])


def test_a_kept_step_gives_the_file_of_a_training_that_ends_there(long, tiny_pipeline, tmp_path):
    """The same bytes, provenance included; the last step's are the published weights."""
    assert steps_kept(long) == [7, 12, 15]
    short = run(tiny_pipeline, tmp_path / "short", "mode", **RECIPE, steps=7)
    assert milestone(long, 7, tmp_path / "step7" / "ema.safetensors") == 0
    assert (tmp_path / "step7" / "ema.safetensors").read_bytes() == (short / "ema.safetensors").read_bytes()
    about = weights_metadata(short / "ema.safetensors")
    assert (about["step"], about["epochs"], about["images_seen"]) == (7, 1.4, 56)
    assert milestone(long, 15, tmp_path / "last.safetensors") == 0
    assert (tmp_path / "last.safetensors").read_bytes() == (long / "ema.safetensors").read_bytes()


def test_the_initial_phase_has_its_own_rate_and_decay(long):
    rates = dict(history(long, "step", "lr"))
    assert (rates[4], rates[6]) == (3e-3, 1e-3) and rates[15] < 1e-3


def test_a_budget_in_steps_ends_at_exactly_that_step_and_continues(long, tiny_pipeline, tmp_path):
    """In the middle of an epoch; raised, or given in epochs again, it comes to the same weights."""
    for steps in (7, 13):
        run(tiny_pipeline, tmp_path, "mode", **RECIPE, steps=steps)
        assert history(tmp_path, "step")[-1] == (steps,) and steps_kept(tmp_path)[-1] == steps
    run(tiny_pipeline, tmp_path, "mode", **RECIPE)
    assert_equal(weights(tmp_path), weights(long))
    run(tiny_pipeline, tmp_path, "mode", **RECIPE, steps=7)
    assert weights_metadata(tmp_path / "ema.safetensors")["step"] == 7


def test_a_step_that_is_not_there_is_explained(long, tmp_path, capsys):
    assert milestone(long, 9, tmp_path / "x") == 2
    line = capsys.readouterr().err
    assert "step 9" in line and "there are: 7, 12, 15" in line and "add 9 to train.milestone_steps" in line
    assert milestone(long, 16, tmp_path / "x") == 2
    line = capsys.readouterr().err
    assert "ends at step 15" in line and "raise train.steps or train.epochs" in line and line.count("\n") == 1


def test_a_damaged_checkpoint_is_not_published(long, tmp_path, capsys):
    copy = shutil.copytree(long, tmp_path / "copy")
    file = state_of(copy) / "step-00000007" / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert milestone(copy, 7, tmp_path / "x") == 2 and not (tmp_path / "x").exists()
    assert "is damaged (ema.safetensors is missing, truncated or changed)" in capsys.readouterr().err
