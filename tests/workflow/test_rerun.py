"""What a changed key reruns: every key of the configuration, against the column "reruns" of config/README.md."""

import dataclasses
import functools
import json
import shutil
import typing

import pytest
from omegaconf import OmegaConf

from mmfm import config
from support.checkout import BASE, TARGETS, dry_runs, link_workflow
from support.places import DEMO, ROOT

OTHER = {
    "data.root": "other/images",
    "data.heldout_root": "other/heldout",
    "latents.folder": "other/latents",
    "latent_stats.weights": "other/stats.pt",
    "encoders.*.family": "mae",
    "encoders.*.weights": "other/encoder",
    "encoders.*.input_size": 40,
    "encoders.*.precision": "tf32",
    "encoders.*.norm_affine": True,
    "fid.encoder": "dinov2",
    "fid.metrics": ["frechet", "kid"],
    "decoder.hidden_size": 96,
    "decoder.num_heads": 3,
    "decoder.weights": "other/decoder.safetensors",
    "fid.weights": "other/detector.safetensors",
    "fid.reference": "other/reference.npz",
    "train.model": "S",
    "models.*.hidden_size": [96, 192],
    "models.*.depth": [2, 1],
    "models.*.num_heads": [3, 6],
    "train.betas": [0.9, 0.99],
    "train.label_dropout": 0.2,
    "train.milestones": [1],
    "train.loss_weighting.bounds": [0.4, 2.0],
    "train.initial_phase.epochs": 2,
    "train.milestone_steps": [60],
    "train.deterministic": True,
    "train.gpus": 1,
    "train.profile": [3, 5],
    "sample.compile": True,
    "card": "H100",
    "max_runtime_hours": 12,
    "recipes.*.settings": ["mode"],
    "recipes.*.models": ["tiny"],
    "recipes.*.train": {"lr": 0.5},
    "sample.guidance.interval": [0.1, 0.9],
    "gmm.init_means": "other/means.npy",
    "gmm.weights": "other/gmm.safetensors",
    "spatial_gmm.weights": "other/spatial_gmm.zarr",
    "train.weights": "other/ema.safetensors",
    "published.repository": "other/repository",
    "published.revision": "other",
    "published.root": "other/files",
    "published.folder": "other/published",
    "guide.weights": "other/guide.safetensors",
    "guide.model": "S",
    "guide.interval": [0.1, 0.9],
    "sweep.modes": [16, 64],
    "gpus": 1,
    "run": "other",
}
"""Other valid values of the keys that have neither choices nor a number one higher."""

WITH = {
    "data.heldout_root": {"data": {"holdout": 0}},
    "encoders.*.family": {"encoders": {"dinov2": {"weights": "other/mae"}}},
    "image.size": {"fid": {"detector": "inception"}},
    "fid.reference_images": {"fid": {"metrics": ["frechet", "kid"]}},
    "train.initial_phase.epochs": {"guide": {"steps": 5}},
    "gmm.weights": {"spatial_gmm": {"weights": "other/spatial_gmm.zarr"}},
    "recipes.*.settings": {"recipes": {"one": {"train": {"lr": 0.5}}}},
    "recipes.*.models": {"recipes": {"one": {"train": {"lr": 0.5}}}},
}
"""What must change with a key, and reruns no more than it does: the files are checked against one another."""

TARGETS_WITH = {"gmm.weights": TARGETS[:1], "train.weights": TARGETS[2:3]}
"""Of the targets, those that a key leaves possible: a given mixture is no sweep, given weights are of one setting."""

NOT_ALONE = {"run", "spatial_gmm.weights"}
"""Keys that are not tried: a given spatial mixture needs a given mixture, which is."""

DEMO_VALUES = OmegaConf.to_container(
    OmegaConf.merge(*(OmegaConf.load(ROOT / "config" / name) for name in ("config.yaml", "demo.yaml")))
)

FROM_SAMPLE = {"sample", "fid", "mode_quality"}
FROM_TRAIN = {"train"} | FROM_SAMPLE
FROM_SPATIAL = {"spatial_gmm", "sweep"} | FROM_TRAIN
FROM_MIXTURE = {"fit_gmm"} | FROM_SPATIAL
BELOW = {
    "list_images": set(config.STAGES),
    "extract": {"extract", "latent_stats"} | FROM_MIXTURE,
    "latent_stats": {"latent_stats"} | FROM_SPATIAL,
    "fit_gmm": FROM_MIXTURE,
    "spatial_gmm": FROM_SPATIAL,
    "train_decoder": {"train_decoder", "reconstruction"} | FROM_SAMPLE,
    "train": FROM_TRAIN,
    "sample": FROM_SAMPLE,
    "fid_reference": {"fid_reference", "fid"},
    "fid": {"fid"},
    "reconstruction": {"reconstruction"},
    "mode_quality": {"mode_quality"},
    "sweep": {"sweep"},
}
"""A stage and those that read, directly or not, what it makes."""


def documented() -> dict[str, tuple[str, set[str]]]:
    """Return kind and reruns of every key of config/README.md, by dotted name."""
    found, section = {}, ""
    for line in (ROOT / "config" / "README.md").read_text().splitlines():
        if line.startswith("## "):
            section = "" if line == "## Top level" else line[3:] + "."
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[0].startswith("`"):
            stages = set() if cells[5] == "nothing" else set(cells[5].split(", "))
            found[section + cells[0].strip("`")] = cells[4], stages
    return found


def configured(kind: type = config.Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Return every key of the dataclasses by dotted name; ``*`` stands for the name of an encoder or model."""
    found, hints = {}, typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        hint, name = hints[f.name], prefix + f.name
        if typing.get_origin(hint) is dict and not f.metadata.get("part_of"):
            found |= configured(typing.get_args(hint)[1], f"{name}.*.")
        elif dataclasses.is_dataclass(hint):
            found |= configured(hint, f"{name}.")
        else:
            found[name] = f
    return found


def changed(name: str, f: dataclasses.Field) -> dict:
    """Return the base overlay with one key at another valid value."""
    path = name.replace("encoders.*", "encoders.dinov2").replace("models.*", "models.tiny")
    path = path.replace("recipes.*", "recipes.one").split(".")
    value = None if name in OTHER else functools.reduce(lambda inner, part: inner[part], path, DEMO_VALUES)
    if name in OTHER:
        other = OTHER[name]
    elif f.metadata["choices"]:
        other = next(choice for choice in f.metadata["choices"] if choice != value)
    elif isinstance(value, bool):
        other = not value
    else:
        other = value + 1 if isinstance(value, int) else 0.9 * value + 0.01
    # Other images than the demo's inherit none of its values, so the overlay holds them all.
    inherited = DEMO_VALUES if name == "data.root" else {}
    nested = functools.reduce(lambda inner, part: {part: inner}, reversed(path), other)
    return OmegaConf.to_container(OmegaConf.merge(inherited, BASE, WITH.get(name, {}), nested))


def stages(rules: list[str]) -> set[str]:
    """Return the stages among rules; a given file stands where a made one would."""
    given = {
        "given_decoder": "train_decoder",
        "given_statistics": "latent_stats",
        "import_mixture": "fit_gmm",
        "import_spatial": "spatial_gmm",
        "import_weights": "train",
    }
    return {given.get(rule, rule) for rule in rules} & set(config.STAGES)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The workflow beside results that are complete as far as Snakemake knows."""
    folder = tmp_path_factory.mktemp("checkout")
    link_workflow(folder)
    for name, kind in (("encoder", "dinov2"), ("mae", "vit_mae")):
        shutil.copytree(DEMO / "encoder", folder / "other" / name)
        about = json.loads((DEMO / "encoder" / "config.json").read_text())
        (folder / "other" / name / "config.json").write_text(json.dumps({**about, "model_type": kind}))
    names = (
        "decoder.safetensors",
        "detector.safetensors",
        "reference.npz",
        "means.npy",
        "guide.safetensors",
        "stats.pt",
        "gmm.safetensors",
        "spatial_gmm.zarr",
        "ema.safetensors",
    )
    for name in names:
        (folder / "other" / name).touch()
    made = dry_runs(folder, [{"keys": BASE, "targets": TARGETS, "touch": True}])
    assert stages(made[0]) == set(config.STAGES)
    return folder


def test_the_document_names_every_key_with_its_kind():
    kinds = {name: f.metadata["kind"] for name, f in configured().items()}
    assert {name: kind for name, (kind, _) in documented().items()} == kinds


def test_every_key_reruns_what_its_document_says(checkout):
    table, fields = documented(), configured()
    tried = {name: changed(name, f) for name, f in fields.items() if name not in NOT_ALONE}
    calls = [{"keys": keys, "targets": TARGETS_WITH.get(name, TARGETS)} for name, keys in tried.items()]
    found = dict(zip(tried, dry_runs(checkout, calls), strict=True))
    wrong = {
        name: f"would run {sorted(stages(rules))}, documented {sorted(table[name][1])}"
        for name, rules in found.items()
        if stages(rules) != table[name][1] or (table[name][0] == "operation" and rules)
    }
    assert not wrong


def test_a_key_that_nothing_uses_reruns_nothing(checkout):
    """A setting's targets don't depend on what only another setting, or another rule or solver, looks at."""
    plain = {"gpus": 0, "decoder": {"weights": "train"}}
    idle = {
        "mode": {"train": {"label_dropout": 0.3}, "sample": {"label_draw": "random", "rtol": 0.1}},
        "class": {"train": {"mode_dropout": 0.3, "assignment": "hard"}, "sample": {"mode_draw": "stratified"}},
        "uncond": {
            "train": {"means_precision": "bf16", "loss_weighting": {"rule": "none", "gamma": 3.0}},
            "sample": {"atol": 0.1},
        },
    }
    calls = []
    for setting, keys in idle.items():
        target = [f"results/fid/dinov2_{setting}.txt"]
        calls += [{"keys": plain, "targets": target, "touch": True}, {"keys": plain, "targets": target}]
        calls += [{"keys": {**plain, **keys}, "targets": target}]
    found = dry_runs(checkout, calls)
    dry_runs(checkout, [{"keys": BASE, "targets": TARGETS, "touch": True}])  # as the other tests expect it
    assert [bool(rules) for rules in found] == [True, False, False] * 3


def test_what_measures_distances_during_training_retrains_nothing(checkout):
    """Detector and reference are with the operation keys of `train` where distances are asked for."""
    measured = {**BASE, "train": {**BASE["train"], "preview": {"fid_every": 50}}}
    other = {**measured, "fid": {"weights": "other/detector.safetensors", "reference": "other/reference.npz"}}
    asked, changed_with = dry_runs(checkout, [{"keys": keys, "targets": TARGETS} for keys in (measured, other)])
    assert asked == [] and stages(changed_with) == {"fid_reference", "fid", "reconstruction"}


def test_the_image_folder_is_listed_again_when_asked(checkout):
    """A dry run never walks the folder; asked for, the listing and all that depends on it are made again."""
    calls = [{"keys": BASE, "targets": TARGETS}, {"keys": BASE, "targets": TARGETS, "force": "list_images"}]
    unasked, asked = dry_runs(checkout, calls)
    assert unasked == [] and stages(asked) == set(config.STAGES)


def test_another_run_makes_everything_and_going_back_costs_nothing(checkout):
    other = {"keys": {**BASE, "run": "other"}, "targets": [t.replace("results", "results/other") for t in TARGETS]}
    base = {"keys": BASE, "targets": TARGETS}
    before, made, again, back = dry_runs(checkout, [other, {**other, "touch": True}, other, base])
    assert stages(before) == documented()["run"][1] == set(config.STAGES)
    assert before == made and again == back == []


def test_a_raised_version_reruns_its_stage_and_what_lies_below(checkout):
    calls = [{"keys": BASE, "targets": TARGETS, "version": name} for name in BELOW]
    assert [stages(rules) for rules in dry_runs(checkout, calls)] == list(BELOW.values())
