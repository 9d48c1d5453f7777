"""What makes work run again stays byte for byte: the parameters of the rules, and the fingerprints of the states.

A change here remakes results that users have. It is right where a stage's VERSION is raised or a key was added to what
the pinned configurations say, and nowhere else. ``PYTHONPATH=tests python tests/workflow/test_pinned.py`` writes
tests/pinned anew.
"""

import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml

from mmfm.infra import store
from support.checkout import dry_runs, link_workflow
from support.places import ROOT

PINNED = ROOT / "tests" / "pinned"
SETTINGS = ("uncond", "gmm", "mode", "class", "class_gmm")
DEMO = {"gpus": 0}
TRAINED = {"gpus": 0, "decoder": {"weights": "train"}, "sample": {"guidance": {"scale": 2.0}}}
"""Keys that the embedded demo does not use: a decoder of its own, classifier-free guidance."""


def parameters(folder: Path, preset: str, overlay: dict) -> dict[str, str]:
    """Return the parameter of every job of every target by the job's first output.

    Args:
        folder: empty; gets the workflow with the pinned configuration in the place of config.yaml.
        preset: a pinned file laid over it; empty for none.
    """
    link_workflow(folder, without=("config", "resources"))
    (folder / "config").mkdir()
    (folder / "resources").mkdir()  # files that the preset names are made here, not in the repository
    (folder / "resources" / "demo").symlink_to(ROOT / "resources" / "demo")
    shutil.copy(PINNED / "demo.yaml", folder / "config" / "config.yaml")
    keys = yaml.safe_load((PINNED / preset).read_text()) if preset else {}
    (folder / keys.get("data", {}).get("root", "images")).mkdir(parents=True)
    given = [keys.get("decoder", {}).get("weights", ""), *keys.get("fid", {}).values()]
    for path in (folder / str(name).format(encoder=e) for name in given for e in keys.get("encoders", {})):
        if path.suffix in (".npz", ".pth", ".safetensors"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    results = f"results/{keys['run']}" if keys.get("run") else "results"
    encoders = keys.get("encoders", {"dinov2": {}})
    names = [f"{encoder}_{setting}{guide}" for encoder in encoders for setting in SETTINGS for guide in ("", "_ag")]
    targets = [f"{results}/fid/{name}.txt" for name in names] + [f"{results}/gmm/{e}/sweep.png" for e in encoders]
    call = {"keys": keys | overlay, "targets": targets, "parameters": True}
    return dry_runs(folder, [call])[0]


CASES = {"demo": ("", DEMO), "demo_trained": ("", TRAINED), "imagenet256": ("imagenet256.yaml", DEMO)}


def state(folder: Path) -> dict[str, object]:
    """Return what the only state of a folder says of itself, its inputs' digests replaced by their names."""
    (about,) = (store.read_json(path) for path in folder.glob("state-*/about.json"))
    about["inputs"] = {name: name for name in about["inputs"]}
    named = {name: about[name] for name in ("stage", "version", "identity", "inputs")}
    text = re.sub(r"/[^\"]*/resources", "resources", store.canonical_json(named))
    return {"fingerprint": store.fingerprint(json.loads(text)), "about": text}


@pytest.mark.parametrize("case", CASES)
def test_the_parameters_of_all_rules_are_the_pinned_ones(case, tmp_path):
    assert parameters(tmp_path, *CASES[case]) == store.read_json(PINNED / "parameters.json")[case]


@pytest.mark.slow
def test_the_fingerprints_of_all_states_are_the_pinned_ones(stages):
    pinned = store.read_json(PINNED / "states.json")
    assert {name: state(stage.made) for name, stage in stages.items() if stage.units} == pinned


def write() -> None:
    """Write the pinned values of today's code."""
    import mmfm.infra.torchvision_ops  # noqa: F401 (before transformers is imported)
    from support import stage_commands
    from support.tiny import write_encoder

    found = {}
    for case, (preset, overlay) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            found[case] = parameters(Path(folder), preset, overlay)
    store.write_json(PINNED / "parameters.json", found)
    with tempfile.TemporaryDirectory() as folder:
        encoder = write_encoder(Path(folder) / "encoder")
        made = stage_commands.make(Path(folder), encoder)
        store.write_json(PINNED / "states.json", {n: state(s.made) for n, s in made.items() if s.units})


if __name__ == "__main__":
    write()
