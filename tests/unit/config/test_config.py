"""Configuration: strictness, kinds of keys, documents in step."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mmfm import config
from mmfm.config import reading
from support.places import DEFAULTS, ROOT


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
        ("gmm.tol=small", "got 'small'$"),
        ('gmm.tol="1e-3"', "write 1.0e-3"),
        ("fid.metrics=[fid]", r"'fid.metrics' is 'fid' \(did you mean 'frechet'\?\)"),
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
        ("data.limit.images=0", "'data.limit.images' is 0.0; it must be above 0 and at most 1"),
        ("data.limit.classes=1.5", "'data.limit.classes' is 1.5; it must be above 0 and at most 1"),
        ("run=a b/../c", "'run' is 'a b/../c', which is no folder in results/; take a name, such as flowers"),
        ("run=..", "no folder in results/"),
        ("run=./a", "no folder in results/"),
        ("run=/a", "no folder in results/"),
        ("run=a/", "no folder in results/"),
        ("extract.crop=encodr", r"'extract.crop' is 'encodr' \(did you mean 'encoder'\?\)"),
    ],
)
def test_a_bad_key_is_named(override, message):
    with pytest.raises(ValueError, match=message):
        config.load([DEFAULTS], [override])


@pytest.mark.parametrize("run", ["a b", "a/b", "a..b", ".hidden"])
def test_a_run_is_a_folder_in_the_results(run):
    assert config.load([DEFAULTS], [f"run={run}"]).run == run


def test_the_demo_and_the_imagenet_preset_resolve_to_the_pinned_values():
    pinned = json.loads((ROOT / "tests" / "pinned" / "resolved.json").read_text())
    for name, files in {"demo": [], "imagenet256": [ROOT / "config" / "imagenet256.yaml"]}.items():
        assert json.loads(json.dumps(dataclasses.asdict(config.load([DEFAULTS, *files])))) == pinned[name]


def test_other_images_inherit_nothing_from_the_demo():
    required = "'encoders', 'image.size', 'gmm.n_components', 'decoder.horizon', .*'train.model', 'train.epochs'"
    with pytest.raises(ValueError, match=required + r".* are not set and have no default; `mmfm init FOLDER`"):
        config.load([DEFAULTS], ["data.root=pictures"])


@pytest.mark.parametrize("override", ["train.modle=B", "train.preview.evry=3"])
def test_a_mistyped_key_is_named_before_those_that_are_missing(override):
    with pytest.raises(ValueError, match=f"unknown configuration key '{override.split('=')[0]}'.*did you mean"):
        config.load([DEFAULTS], ["data.root=pictures", override])


@pytest.mark.parametrize("key", reading.RETIRED)
def test_a_retired_key_is_accepted_with_one_hint(key, capsys):
    reading._say_retired.cache_clear()
    loaded = config.load([DEFAULTS], [f"{key}=2.5"])
    assert loaded == config.load([DEFAULTS]) == config.load([DEFAULTS], [f"{key}=0.0"])
    stage = {"decoder": "train_decoder", "train": "train"}[key.split(".")[0]]
    values = json.loads(json.dumps(dataclasses.asdict(loaded)))
    values |= {"encoder": values["encoders"]["dinov2"], "model": values["models"]["tiny"]}
    config.StageConfig.build(stage, values, config.parse_overrides([f"{key}=1"]))
    assert capsys.readouterr().err.splitlines() == [
        f"the key {key} has no effect any more and can be removed: {reading.RETIRED[key]}"
    ]


@pytest.mark.parametrize(("given", "kept"), [("off", "off"), ("on", "on"), ("auto", "auto"), ("false", "off")])
def test_on_and_off_may_be_what_yaml_makes_of_them(given, kept, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"latents:\n  cache: {given}\n")
    assert config.load([DEFAULTS, tmp_path / "mine.yaml"]).latents.cache == kept
    assert config.load([DEFAULTS], [f"latents.cache={given}"]).latents.cache == kept
    with pytest.raises(ValueError, match=r"'latents\.cache' is 'of' \(did you mean 'off'\?\); it must be one of"):
        config.load([DEFAULTS], ["latents.cache=of"])


def test_where_latents_are_kept_is_no_part_of_any_parameter_or_fingerprint():
    plain = config.load([DEFAULTS])
    other = config.load([DEFAULTS], ["latents.cache=on", "latents.folder=/scratch/latents"])
    for stage in ("extract", "spatial_gmm", "train_decoder", "train"):
        before, after = (config.StageConfig.of(loaded, stage, encoder="dinov2") for loaded in (plain, other))
        assert "latents" not in after.parameter() and after.parameter() == before.parameter()
        assert after.identity() == before.identity()
        flags = ["latents.cache=on", "latents.folder=/scratch/latents"]
        assert [flag for flag in after.operation() if flag not in before.operation()] == flags
        assert config.StageConfig.build(stage, before.values("identity", "budget", "operation")) == before


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no configuration file '.*absent\.yaml'; correct the path, or let"):
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
    assert (loaded.guide.model, loaded.guide.steps, loaded.guide.scale) == ("S", 25_000, 1.5)
    assert loaded.guide.interval == (0, 1)
    assert (loaded.train.steps, loaded.train.milestone_steps) == (100_000, (25_000,))
    assert (loaded.train.betas, loaded.train.weight_decay, loaded.train.clip_norm) == ((0.9, 0.95), 0, 1.0)
    assert (loaded.train.assignment, loaded.train.init, loaded.train.means_precision) == (
        "soft",
        "pytorch",
        "reference",
    )
    assert (loaded.extract.crop, loaded.spatial_gmm.crop, loaded.latent_stats.mean) == ("encoder", "encoder", True)
    assert (loaded.gmm.reg_covar, loaded.gmm.tol, loaded.gmm.max_iter, loaded.gmm.seed) == (1e-6, 1e-3, 100, 42)


@pytest.mark.parametrize(
    ("setting", "model", "phase", "warmup"),
    [
        ("uncond", "XL", (20, 2e-4, 0.995), None),
        ("gmm", "XL", (20, 4e-4, 0.999), 2500 / 8),
        ("mode", "XL", (20, 4e-4, 0.999), 2500 / 32),
        ("uncond", "S", None, None),
        ("gmm", "S", None, 2500 / 2),
        ("mode", "S", None, 2500 / 2),
    ],
)
def test_the_imagenet_recipes_are_the_published_ones(setting, model, phase, warmup):
    """DINOv2's; the warm-up is 2500 micro-batches over those of a GPU per step."""
    loaded = config.load([DEFAULTS, ROOT / "config" / "imagenet256.yaml"])
    train = loaded.train_of(setting, model, guide=model == "S")
    assert train.target_step(1251) == (25_000 if model == "S" else 100_000)
    assert (train.lr, train.final_lr, train.constant_epochs, train.decay_end_epoch) == (2e-4, 2e-5, 40, 800)
    assert train.ema_decay == 0.9995 and dataclasses.astuple(train.initial_phase) == (phase or (0, 0.0, 0.0))
    rule = train.loss_weighting
    if warmup is None:
        assert rule.rule == "none"
    else:
        assert (rule.rule, rule.by, rule.gamma, rule.bounds) == ("focal", "mode", 2.0, (0.3, 3.0))
        assert abs(rule.warmup_steps - warmup) <= 0.5 and rule.decay == pytest.approx(0.9995 ** (1 / 8), abs=1e-7)


def test_a_list_passes_through_the_shell_and_back():
    loaded = config.load([DEFAULTS], ["train.milestones=[20,80]"])
    assert loaded.train.milestones == (20, 80)
    flags = config.StageConfig.of(loaded, "train", encoder="dinov2").operation()
    assert "train.milestones=[20,80]" in flags
    assert config.load([DEFAULTS], flags).train.milestones == (20, 80)


def test_a_workflow_that_imports_this_one_lays_its_values_over_the_defaults():
    """Its own keys, or an edited copy of config.yaml: the same configuration, with the demo's values between."""
    folder = ROOT / "config"
    files = folder / "config.yaml", folder / "demo.yaml"
    own = {"gpus": 0, "train": {"epochs": 7}, "sweep": {"modes": [4]}}
    copy = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(files[0]), own))
    layered = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.load, files), own))
    for values in (own, copy):
        found = config.imported(values, *files, Path("/clone"))
        assert found["encoders"]["dinov2"]["weights"] == "/clone/resources/demo/encoder"
        assert found["fid"]["weights"] == "/clone/resources/demo/detector/detector.safetensors"
        assert {k: v for k, v in found.items() if k not in ("encoders", "decoder", "fid")} == {
            k: v for k, v in layered.items() if k not in ("encoders", "decoder", "fid")
        }
    assert config.imported({}, *files, Path("/clone"))["train"]["epochs"] == 2


def test_other_images_of_an_importing_workflow_inherit_nothing_of_the_demo():
    files = ROOT / "config" / "config.yaml", ROOT / "config" / "demo.yaml"
    own = {"data": {"root": "pictures"}, "decoder": {"weights": "resources/demo/mine"}}
    found = config.imported(own, *files, Path("/clone"))
    assert "encoders" not in found and found["data"]["root"] == "pictures"
    assert found["decoder"]["weights"] == "resources/demo/mine", "the user's path stays as it is"
    assert found["models"] == OmegaConf.to_container(OmegaConf.load(files[0]))["models"]


def test_kid_needs_as_many_images_as_it_draws():
    asked = ["fid.metrics=[frechet,kid]", "fid.reference_images=500"]
    with pytest.raises(ValueError, match=r"kid, which draws subsets of 1,000 images, .* one is 500; raise it"):
        config.load([DEFAULTS], asked)
