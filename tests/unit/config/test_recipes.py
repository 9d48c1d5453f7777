"""Recipes: other values of `train` for single settings and models, and what is refused."""

import json

import pytest

from mmfm import config
from mmfm.workflow import facts, garbage, jobs, last_run, resources, targets
from support.places import DEFAULTS

PHASE = "initial_phase: {epochs: 2, lr: 0.004, ema_decay: 0.9}"
MIXTURES = f"recipes: {{mixtures: {{settings: [gmm, mode], models: [tiny], train: {{{PHASE}, micro_batch: 16}}}}}}"
GUIDES = "recipes: {guides: {models: [tiny_guide], train: {lr: 0.5, micro_batch: 8, epochs: 7}}}"


@pytest.fixture
def load(tmp_path):
    """Return a function that lays YAML text over the defaults."""

    def loaded(text: str = "", *overrides: str) -> config.Config:
        (tmp_path / "mine.yaml").write_text(text or "{}")
        return config.load([DEFAULTS, tmp_path / "mine.yaml"], overrides)

    return loaded


def training(loaded, setting, model="", guide=False):
    return config.StageConfig.of(loaded, "train", encoder="dinov2", setting=setting, model=model, guide=guide)


def test_a_recipe_is_for_its_settings_and_models_only(load):
    plain, loaded = load(), load(MIXTURES)
    for setting in config.SETTINGS:
        for model in ("tiny", "S", "tiny_guide"):
            before, after = training(plain, setting, model), training(loaded, setting, model)
            if setting in ("gmm", "mode") and model == "tiny":
                keys = after.identity()["train"]
                assert keys.pop("initial_phase") == {"epochs": 2, "lr": 0.004, "ema_decay": 0.9}
                assert keys == before.identity()["train"] and "train.micro_batch=16" in after.operation()
            else:
                assert after == before
    for stage in ("extract", "fit_gmm", "sample", "fid"):
        read = [jobs.stage_parameter(each, stage, "dinov2", "mode") for each in (plain, loaded)]
        assert read[0] == read[1]


def test_a_recipe_for_the_guides_model_is_for_the_guide_which_keeps_its_budget(load):
    loaded = load(GUIDES, "guide.steps=30")
    train = training(loaded, "mode", "tiny_guide", guide=True).train
    assert (train.lr, train.micro_batch, train.epochs, train.steps) == (0.5, 8, 1, 30)
    assert training(loaded, "mode").train == training(load(), "mode").train


def test_estimates_follow_the_recipe_and_the_budget(load):
    def seconds(loaded, name="dinov2_mode_ag.txt"):
        target = targets.parse_target(name, loaded)
        found = resources.for_target(loaded, target, 1, False, facts.assumed(loaded))
        return found["train"].seconds, found["train (guide)"].seconds

    plain = seconds(load())
    assert seconds(load("recipes: {r: {settings: [mode], train: {epochs: 4}}}"))[0] == pytest.approx(2 * plain[0], 0.1)
    assert seconds(load("recipes: {r: {settings: [gmm], train: {epochs: 4}}}")) == plain
    assert seconds(load("", "train.steps=62"))[0] == pytest.approx(plain[0] / 2, rel=0.1)
    # Each image is encoded only once, so twice the steps take less than twice the time.
    assert 1.5 * plain[1] < seconds(load("", "guide.steps=124"))[1] < 2.1 * plain[1]
    wide = "recipes: {r: {models: [tiny_guide], train: {global_batch: 1280}}}"
    assert seconds(load(wide, "guide.steps=62"))[1] == pytest.approx(seconds(load("", "guide.steps=620"))[1], rel=0.1)


def test_label_dropout_of_a_recipe_gives_its_names_a_scale(load):
    loaded = load("recipes: {dropped: {settings: [mode], models: [S], train: {mode_dropout: 0.1}}}")
    assert str(targets.parse_variant(".S.g3", "mode", loaded)) == "seed0.S.k256.t25.g3"
    with pytest.raises(ValueError, match="without label dropout"):
        targets.parse_variant(".g3", "mode", loaded)


def test_a_recipes_state_is_used(load, tmp_path):
    loaded = load(MIXTURES)
    own, plain = (training(each, "mode").identity() for each in (loaded, load()))
    assert garbage._difference("train", "train", {**own, "setting": "mode"}, loaded) == ""
    assert "initial_phase" in garbage._difference("train", "train", {**plain, "setting": "mode"}, loaded)
    last_run.save(loaded, tmp_path, ["train"])
    assert last_run.load(tmp_path).configuration == loaded


def test_the_parameter_is_a_section_that_the_stage_takes(load):
    parameter = json.loads(jobs.stage_parameter(load(MIXTURES), "train", "dinov2", "mode", train={"seed": 3}))
    flags = training(load(MIXTURES), "mode").operation()
    built = config.StageConfig.build("train", parameter, config.parse_overrides(flags)).train
    assert (built.seed, built.initial_phase.lr, built.micro_batch) == (3, 0.004, 16)


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ("r: {train: {lrr: 1.0}}", r"'recipes\.r\.train\.lrr' \(did you mean 'lr'\?\)"),
        ("r: {train: {initial_phase: {epoch: 1}}}", r"'recipes\.r\.train\.initial_phase\.epoch'"),
        ("r: {train: {ema_decay: 1.0}}", r"'recipes\.r\.train\.ema_decay' is 1.0; it must be in \[0, 1\)"),
        ("r: {train: {lr: fast}}", r"'recipes\.r\.train\.lr' must be a number"),
        (
            "r: {train: {initial_phase: {epochs: 1}}}",
            r"'recipes\.r\.train\.initial_phase\.lr' is 0, so nothing is learnt",
        ),
        ("r: {train: {decay_end_epoch: 3}}", r"'recipes\.r\.train\.decay_end_epoch' must be above"),
        ("r: {settings: [mod], train: {}}", r"'recipes\.r\.settings' is 'mod' \(did you mean 'mode'\?\)"),
        ("r: {models: [XXL], train: {}}", r"'recipes\.r\.models' names 'XXL', which is not in 'models' \(did you mean"),
        ("r: {train: {model: S}}", r"'recipes\.r\.train\.model' can't be in a recipe"),
        ("r: {train: {seed: 1}}", r"'recipes\.r\.train\.seed' can't be in a recipe"),
        ("r: {settings: [mode]}", r"'recipes\.r\.train' is not set"),
        (
            "a: {settings: [mode], train: {}}, b: {models: [S], train: {}}",
            r"'recipes\.a' and 'recipes\.b' are both for the setting mode and the model S",
        ),
        (
            "r: {settings: [gmm, uncond], train: {loss_weighting: {rule: focal}}}",
            r"'recipes\.r\.train\.loss_weighting\.by' is mode, but the setting 'uncond' has no modes",
        ),
    ],
)
def test_a_wrong_recipe_is_one_line(load, recipes, message):
    with pytest.raises(ValueError, match=message) as raised:
        load(f"recipes: {{{recipes}}}")
    assert "\n" not in str(raised.value)


def test_weights_by_mode_in_train_are_no_fault_of_a_recipe(load):
    load("recipes: {r: {settings: [uncond], train: {lr: 1.0}}}", "train.loss_weighting.rule=focal")


def test_an_initial_phase_longer_than_the_budget(load):
    """The whole of a training in epochs can't be its initial phase; one in steps may end within it."""
    phase = ("train.initial_phase.epochs=3", "train.initial_phase.lr=0.1")
    with pytest.raises(
        ValueError, match=r"'train.initial_phase.epochs' is 3, more than 'train.epochs' 2; lower it, or"
    ):
        load("", *phase)
    load("", *phase, "train.epochs=3")
    read = training(load("", *phase, "train.steps=5"), "mode")
    flags = config.parse_overrides(read.operation())
    assert config.StageConfig.build("train", read.parameter(), flags).train.steps == 5
    long = "recipes: {r: {settings: [mode], train: {initial_phase: {epochs: 3, lr: 0.1, ema_decay: 0.9}}}}"
    with pytest.raises(ValueError, match=r"'recipes.r.train.initial_phase.epochs' is 3, more than 'train.epochs' 2"):
        training(load(long), "mode")
    training(load(long), "gmm")
    with pytest.raises(ValueError, match=r"'recipes.r.train.initial_phase.epochs' is 3, more than 'guide.epochs' 1"):
        training(load(long, "train.epochs=3"), "mode", "tiny_guide", guide=True)
    with pytest.raises(ValueError, match=r"'train.decay_end_epoch' must be above 'train.initial_phase.epochs'"):
        load("", "train.initial_phase.epochs=800", "train.initial_phase.lr=0.1", "train.epochs=900")


def test_epochs_do_not_count_beside_steps_nor_other_keys_beside_no_phase(load):
    def parameter(*overrides):
        return training(load("", *overrides), "mode").parameter()

    assert parameter("train.steps=5", "train.epochs=9") == parameter("train.steps=5")
    assert parameter("train.initial_phase.lr=0.5", "train.initial_phase.ema_decay=0.5") == parameter()
    assert training(load("", "train.milestone_steps=[3,5]"), "mode").parameter() == parameter()
    assert "train.milestone_steps=[3,5]" in training(load("", "train.milestone_steps=[3,5]"), "mode").operation()
    assert training(load("", "train.steps=5"), "mode").identity() == training(load(), "mode").identity()
