"""Configuration: strictness, kinds of keys, documents in step."""

import subprocess
import sys
from pathlib import Path

import pytest

from mmfm import config

ROOT = Path(__file__).parent.parent
DEFAULTS = ROOT / "config" / "config.yaml"


def test_defaults_load():
    loaded = config.load([DEFAULTS])
    assert loaded.gmm.n_components == 256
    assert loaded.section("model").hidden_size == (192, 192)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gmm.n_componets=3", r"gmm.n_componets.*did you mean 'n_components'"),
        ("smaple.n_images=3", "smaple.*did you mean 'sample'"),
        ("gmm.tol=small", "'gmm.tol' must be a number"),
        ("gmm.n_components=1.5", "'gmm.n_components' must be a whole number"),
        ("gmm.n_components=0", "at least 1"),
        ("train.assignment=sof", "did you mean 'soft'"),
        ("train.betas=[0.9]", "list of 2"),
        ("train.ema_decay=1.0", r"in \[0, 1\)"),
        ("train.label_dropout=1.0", r"'train.label_dropout' is 1.0; it must be in \[0, 1\)"),
        ("train.loss_weighting.decay=1.0", r"'train.loss_weighting.decay' is 1.0"),
        ("train.loss_weighting.gamma=5000", "'train.loss_weighting.gamma' is 5000.0; it must be at most 20"),
        ("train.lr=.nan", "'train.lr' is nan; it must be a finite number"),
        ("train.lr=.inf", "'train.lr' is inf; it must be a finite number"),
        ("train.betas=[0.9,.nan]", "'train.betas' is nan"),
        ("train.loss_weighting.bounds=[0.5,.inf]", "'train.loss_weighting.bounds' is inf"),
        ("sample.guidance.scale=-.inf", "'sample.guidance.scale' is -inf"),
        ("guide.interval=[0.8,0.1]", "0 <= lowest <= highest <= 1"),
        ("sample.guidance.interval=[0,2]", "'sample.guidance.interval'"),
        ("sample.solver=dopri55", "did you mean 'dopri5'"),
        ("train.milestones=3", "'train.milestones' must be a list"),
        ("train.milestones=[0]", "at least 1"),
        ("train.milestones=[1.5]", "a whole number"),
        ("models.tiny.hidden_size=[190,192]", "models.tiny"),
        ("data=3", "'data' must be a section"),
    ],
)
def test_a_bad_key_is_named(override, message):
    with pytest.raises(ValueError, match=message):
        config.load([DEFAULTS], [override])


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.yaml"):
        config.load([tmp_path / "absent.yaml"])


def test_settings_hold_identity_and_budget_only():
    loaded = config.load([DEFAULTS])
    read = config.StageConfig.of(loaded, "train", encoder="dinov2")
    train = read.parameter()["train"]
    assert "epochs" in train and "lr" in train
    assert not {"workers", "checkpoint_every", "preview", "micro_batch"} & set(train)
    assert "epochs" not in read.identity()["train"]
    assert "train.preview.every=60" in read.operation()


def test_every_section_is_read_by_a_stage():
    assert set(config.SECTIONS) == {name for stage in config.STAGES.values() for name in stage.sections}


def test_documents_are_in_step():
    check = subprocess.run([sys.executable, ROOT / "tools/config_docs.py", "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


def test_the_imagenet_preset_carries_the_published_numbers():
    loaded = config.load([DEFAULTS, ROOT / "config" / "imagenet256.yaml"])
    assert (loaded.gmm.n_components, loaded.train.global_batch, loaded.train.ema_decay) == (8192, 1024, 0.9995)
    assert loaded.section("model").depth == (28, 2) and loaded.sample.time_points == 50
    assert (loaded.guide.model, loaded.guide.epochs, loaded.guide.scale, loaded.guide.interval) == (
        "S",
        20,
        1.5,
        (0, 1),
    )
    assert (loaded.train.label_dropout, loaded.train.mode_dropout, loaded.train.loss_weighting.rule) == (0.1, 0, "none")
    assert (loaded.gmm.reg_covar, loaded.gmm.tol, loaded.gmm.max_iter, loaded.gmm.seed) == (1e-6, 1e-3, 100, 42)


def test_a_list_passes_through_the_shell_and_back():
    loaded = config.load([DEFAULTS], ["train.milestones=[20,80]"])
    assert loaded.train.milestones == (20, 80)
    flags = config.StageConfig.of(loaded, "train", encoder="dinov2").operation()
    assert "train.milestones=[20,80]" in flags
    assert config.load([DEFAULTS], flags).train.milestones == (20, 80)
