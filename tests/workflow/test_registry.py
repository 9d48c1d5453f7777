"""The registry of stages says what rules, commands, estimates and documents say, and a new key remakes nothing."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmfm.cli.__main__ import COMMANDS
from mmfm.config import STAGES
from mmfm.workflow.resources import Estimator
from support.checkout import BASE, TARGETS, dry_runs, link_workflow
from support.places import ROOT


@pytest.fixture
def checkout(tmp_path):
    return link_workflow(tmp_path)


def test_rules_read_and_write_what_the_registry_says(checkout):
    """Parents and outputs of every stage, from the graph of the real rules."""
    (graph,) = dry_runs(checkout, [{"keys": BASE, "targets": TARGETS, "graph": True}])
    for name, stage in STAGES.items():
        parents = set(graph[name]["parents"]) & set(STAGES)
        assert parents == set(stage.parents), name
        outputs = graph[name]["outputs"]
        assert len(outputs) == len(stage.outputs), name
        assert all(out.endswith(known) for out, known in zip(sorted(outputs), sorted(stage.outputs), strict=True)), name


def test_parents_come_first():
    seen: set[str] = set()
    for name, stage in STAGES.items():
        assert set(stage.parents) <= seen, name
        seen.add(name)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_its_module_command_and_documents(name):
    """One module with a contract, one function and one command of its name, one row in every table."""
    module = importlib.import_module(f"mmfm.stages.{name}")
    assert module.__doc__.startswith(f"``{name}``: ") and re.search("kill|nothing to resume", module.__doc__)
    assert callable(getattr(module, name)) and callable(importlib.import_module(f"mmfm.cli.{name}").main)
    assert COMMANDS[name] == STAGES[name].summary
    assert hasattr(Estimator, name) == STAGES[name].estimated
    stages = (ROOT / "docs" / "stages.md").read_text()
    assert f"\n## {name}\n" in stages
    assert re.search(rf"^    ({name} --> \w+|\w+ --> {name})$", (ROOT / "README.md").read_text(), re.MULTILINE)


def with_a_new_key(folder: Path) -> Path:
    """Copy the package, and add a key to the section `train` as a later version would."""
    shutil.copytree(ROOT / "src", folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    sections = folder / "mmfm" / "config" / "training.py"
    text, first = sections.read_text(), '    model: str = key("name of an entry of `models`")\n    seed: int'
    assert text.count(first) == 1
    added = first.replace("    seed", '    warmth: float = key("a new key", minimum=0, as_before=0.0)\n    seed')
    sections.write_text(text.replace(first, added))
    return folder


def test_a_new_key_remakes_nothing_until_it_is_used(checkout, tmp_path):
    """Whether configurations leave it out or name it: at the value that means "as before" nothing is to be done."""
    keys = {"gpus": 0}
    target = ["results/fid/dinov2_mode.txt"]
    before = dry_runs(checkout, [{"keys": keys, "targets": target, "touch": True}])
    assert "train" in before[0]
    source = with_a_new_key(tmp_path / "src")
    same, other = {**keys, "train": {"warmth": 0.0}}, {**keys, "train": {"warmth": 0.5}}
    calls = [{"keys": k, "targets": target} for k in (keys, same, other)]
    left_out, as_before, used = dry_runs(checkout, calls, source)
    assert left_out == as_before == [] and {"train", "sample", "fid"} <= set(used) and "extract" not in used
    program = (
        "import json, sys\nfrom mmfm.config import StageConfig, load\n"
        "read = StageConfig.of(load(['config/config.yaml'], sys.argv[1:]), 'train', encoder='dinov2', setting='mode')\n"
        "print(json.dumps([read.parameter(), read.identity()]))"
    )

    def found(source: Path, *overrides: str) -> list[dict]:
        line = [sys.executable, "-c", program, *overrides]
        environment = {"PYTHONPATH": str(source), "PATH": "/usr/bin:/bin"}
        result = subprocess.run(line, cwd=checkout, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    today = found(ROOT / "src")
    assert found(source) == found(source, "train.warmth=0") == today
    changed = found(source, "train.warmth=0.5")
    assert [part["train"].pop("warmth") for part in changed] == [0.5, 0.5] and changed == today


def test_the_configuration_files_name_the_schema_and_keep_it():
    """Editors complete and check them by it."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "workflow" / "schemas" / "config.schema.json").read_text())
    for name in ("config.yaml", "imagenet256.yaml"):
        path = ROOT / "config" / name
        first = path.read_text().splitlines()[0]
        named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)[1]
        assert (path.parent / named).resolve() == ROOT / "workflow" / "schemas" / "config.schema.json"
        values = yaml.safe_load(path.read_text())
        jsonschema.validate(values, schema)
        for section, key, value in (("train", "learning_rate", 1), ("sample", "solver", "eulr"), ("gmm", "tol", "x")):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate({**values, section: {**values.get(section, {}), key: value}}, schema)
