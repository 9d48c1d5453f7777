"""The command line: every stage explains itself, and mistakes are one line."""

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
import typing

import pytest

from mmfm import config
from mmfm.cli.__main__ import COMMANDS, main
from support.places import ROOT

STAGES = [name for name in COMMANDS if name in config.STAGES]


def keys(section, prefix):
    for name, hint in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}"


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_every_key_and_an_example(stage, capsys):
    with pytest.raises(SystemExit) as done:
        main([stage, "--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0 and f"mmfm {stage} " in text
    for section in config.STAGES[stage].sections:
        for name in keys(config.SECTIONS[section], section):
            assert f"  {name} " in text, f"--help of {stage} does not explain {name}"


def test_every_command_exists():
    for command in COMMANDS:
        with pytest.raises(SystemExit) as done:
            main([command, "--help"])
        assert done.value.code == 0


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["extrat"]) == 2
    assert "did you mean 'extract'" in capsys.readouterr().err


def test_the_version_and_the_package_as_a_command():
    for program in ("mmfm", "mmfm.cli"):
        run = subprocess.run([sys.executable, "-m", program, "--version"], capture_output=True, text=True, check=True)
        assert run.stdout == f"mmfm {importlib.metadata.version('mmfm')}\n"


def test_a_users_mistake_is_one_line():
    line = [sys.executable, "-m", "mmfm.cli", "latent_stats", "--settings", "{}", "--moments", "absent.safetensors"]
    result = subprocess.run([*line, "--out", "a", "--out-json", "b"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "absent.safetensors" in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("extract --encoder-weights e --listing l --out-tokens t --out-moments m", "no listing at 'l'; make one with"),
        ("sweep --fits absent --spatial s --out-dir o", "there is no 'absent'; correct the path, or run the stage"),
        ("scale --configfile absent.yaml", "there is no configuration file 'absent.yaml'; correct the path"),
    ],
)
def test_a_missing_file_is_named_with_a_remedy(line, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert message in error and "Errno" not in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--settings", "{}", "gmm.tolerance=1"], "gmm.tolerance"),
        (["--settings", "{}", "train.lr=1"], "fit_gmm does not read the section 'train'"),
        (["--settings", '{"gmm": {}}'], "'gmm.n_components', "),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_bad_settings_are_named(arguments, message, capsys):
    assert main(["fit_gmm", "--tokens", "x", "--out-dir", "y", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_doctor_measures_steps_and_collectives():
    """Its CPU form: two processes and a toy model."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")}
    line = [sys.executable, "-m", "mmfm.cli", "doctor", "--gpu", "--micro-batch", "2"]
    result = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 x CPU" in result.stdout and "all-reduce of 4 MB" in result.stdout
    assert "training step of a toy model, 2 images per process: " in result.stdout
