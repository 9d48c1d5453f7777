"""Other workflows import this one as a module; calls from other folders; environments and containers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmfm.workflow import last_run
from support.places import ROOT

KEYS = {"run": "flow", "gpus": 0, "gmm": {"n_components": 8}, "sample": {"n_images": 50}}
OWN_IMAGES = {
    "encoders": {"dinov2": {"family": "dinov2", "weights": f"{ROOT}/resources/demo/encoder", "input_size": 32}},
    "image": {"size": 32},
    "gmm": {"n_components": 2},
    "decoder": {"weights": "train", "horizon": 4, "steps": 4},
    "train": {"model": "tiny", "epochs": 1},
    "sample": {"n_images": 8, "time_points": 3},
    "fid": {"detector": "fashion", "weights": f"{ROOT}/resources/demo/detector/detector.safetensors"},
}
OWN = """
module mmfm:
    snakefile: "{root}/workflow/Snakefile"
    config: {keys}
    {more}


use rule * from mmfm as mmfm_*


onstart:
    mmfm.onstart()


onerror:
    mmfm.onerror()


rule mine:
    default_target: True
    input:
        "results/flow/fid/dinov2_mode.txt",
    output:
        "results/flow/mine/page.txt",
    shell:
        "cp {{input}} {{output}}"
"""
DEPLOYED = """
configfile: "config/config.yaml"


module mmfm:
    snakefile:
        "{root}/workflow/Snakefile"
    config:
        config


use rule * from mmfm
"""
"""What snakedeploy 0.17 writes, but for the address."""


def snakemake(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Return the exit status of a call and what it printed."""
    line = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
    result = subprocess.run(line, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})
    return result.returncode, result.stdout + result.stderr


def importing(folder: Path, keys: dict | None = None, more: str = "") -> Path:
    """Write a workflow of one's own that imports this one, and return its folder."""
    (folder / "Snakefile").write_text(OWN.format(root=ROOT, keys=KEYS if keys is None else keys, more=more))
    return folder


def test_a_workflow_of_ones_own_plans_the_rules_under_other_names(tmp_path):
    status, said = snakemake(importing(tmp_path), "-n", "-p")
    assert status == 0, said
    for name in ("demo_images", "extract", "fit_gmm", "train", "sample", "fid", "short_fid"):
        assert f"rule mmfm_{name}:" in said
    assert "rule mine:" in said and "results/flow/gmm/dinov2/k8/gmm.safetensors" in said
    assert f"{ROOT}/resources/demo/encoder/config.json" in said
    assert '"epochs":2' in said, "the demo's value, which is none of the defaults"
    assert "localrules directive specifies rules" not in said and "No target was named" not in said


def test_an_imported_stage_runs(tmp_path):
    """One stage and what it needs; the plan of the rest is in the test above."""
    folder = importing(tmp_path)
    listing = "results/flow/list_images/listing.train.safetensors"
    status, said = snakemake(folder, listing)
    assert status == 0, said
    assert (folder / listing).exists() and not (folder / "results" / "logs").exists()
    last = last_run.load(folder / "results" / "flow")
    assert last.configuration.gmm.n_components == 8
    assert "gmm" in last.folders and "mine" not in last.folders, "`mmfm clean` would think the folder mine its own"
    status, said = snakemake(folder, listing, "-n")
    assert status == 0 and "Nothing to be done" in said


def test_a_failed_stage_ends_with_what_matters_if_the_importing_workflow_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    keys = KEYS | OWN_IMAGES | {"data": {"root": "empty"}}
    status, said = snakemake(importing(tmp_path, keys), "results/flow/list_images/listing.train.safetensors")
    assert status != 0 and "(list_images) failed\n  reason:   no images in 'empty'" in said, said


def test_a_module_is_read_from_a_repository_file_by_file(tmp_path):
    """As from GitHub: Snakemake fetches what the Snakefile names; the demo's folders are not among that."""
    folder, project = tmp_path / "work", tmp_path / "repository" / "project"
    folder.mkdir()
    project.mkdir(parents=True)
    for name in ("Snakefile", "rules", "config", "workflow", "envs"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, project / name)
    for words in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path / "repository", check=True)
    address = f"git+file://{project}/workflow/Snakefile@main"
    keys = KEYS | OWN_IMAGES | {"data": {"root": "images"}}
    (folder / "images").mkdir()
    for given, expected in ((keys, "rule mmfm_fit_gmm:"), (KEYS, "the demo's files are in a clone only; import that")):
        importing(folder, given)
        text = (folder / "Snakefile").read_text().replace(f"{ROOT}/workflow/Snakefile", address)
        (folder / "Snakefile").write_text(text)
        status, said = snakemake(folder, "-n", XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert expected in said and (status == 0) == (given is keys), said


def test_own_files_in_results_are_none_of_this_workflows_targets(tmp_path):
    folder = importing(tmp_path)
    with (folder / "Snakefile").open("a") as file:
        file.write('\n\nrule other:\n    output:\n        "results/other/fid/x.txt",\n')
        file.write('    shell:\n        "touch {output}"\n')
    status, said = snakemake(folder, "-n", "results/other/fid/x.txt")
    assert status == 0 and "rule other:" in said, said
    status, said = snakemake(folder, "-n", "results/flow/fid/dinov2_moed.txt")
    assert status != 0 and "did you mean 'results/flow/fid/dinov2_mode.txt'" in said


@pytest.mark.parametrize("more", ['prefix: "elsewhere"', 'pathvars:\n        results="elsewhere"'])
def test_results_are_moved_by_the_key_alone(tmp_path, more):
    status, said = snakemake(importing(tmp_path, more=more), "-n")
    assert status != 0 and "a module can't move the results with `prefix` or `pathvars`; set the key 'run'" in said


def test_two_imports_side_by_side(tmp_path):
    folder = importing(tmp_path)
    again = OWN.split("onstart")[0].replace("mmfm", "second").format(root=ROOT, keys=KEYS | {"run": "b"}, more="")
    with (folder / "Snakefile").open("a") as file:
        file.write(again.replace("use rule * from second as second_*", "\n\nuse rule * from second as second_*"))
    target = "results/b/list_images/listing.train.safetensors"
    status, said = snakemake(folder, target, "results/flow/fid/dinov2_gmm.txt", "-n")
    assert status == 0, said
    assert "rule second_list_images:" in said and "rule mmfm_list_images:" in said and "another Snakemake" not in said


def test_the_deployed_form(tmp_path):
    """With a copy of config/, which holds every default: the demo's values count nevertheless, and so do changes."""
    (tmp_path / "workflow").mkdir()
    (tmp_path / "workflow" / "Snakefile").write_text(DEPLOYED.format(root=ROOT))
    (tmp_path / "config").mkdir()
    text = (ROOT / "config" / "config.yaml").read_text()
    assert "\n  seed: 0\n" in text
    (tmp_path / "config" / "config.yaml").write_text(text.replace("gpus: auto", "gpus: 0"))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"sample": {"n_images": 77}}))
    status, said = snakemake(tmp_path, "-n", "-p", "--configfile", "mine.yaml")
    assert status == 0, said
    assert "rule all:" in said and "results/comparison.txt" in said, "a bare call compares"
    assert '"n_images":77' in said and '"epochs":2' in said and "k256" in said


def test_the_demo_runs_in_any_folder(tmp_path):
    """The Snakefile named by its path, in a folder without config/."""
    for name in ("Snakefile", "workflow/Snakefile"):
        status, said = snakemake(tmp_path, "-n", "-s", str(ROOT / name), "--config", "gpus=0")
        assert status == 0, said
        assert f"{ROOT}/resources/demo/detector/detector.safetensors" in said
        assert "results/comparison.txt" in said.splitlines()[-1], "a bare call compares"


CONDA = """#!/bin/sh
case "$*" in
    config*) echo '{"get": {"channel_priority": "strict"}}' ;;
    *--json*) echo '{"conda_prefix": "/opt/conda", "platform": "linux-64", "conda_version": "25.1.0"}' ;;
    *) echo "conda 25.1.0" ;;
esac
"""
"""A stand-in that answers what a dry run asks of conda; nothing is installed."""


@pytest.mark.parametrize("methods", [["conda"], ["apptainer"], ["conda", "apptainer"]])
def test_dry_runs_with_software_deployment(tmp_path, methods):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "conda").write_text(CONDA)
    (tmp_path / "bin" / "conda").chmod(0o755)
    line = ["-n", "-s", str(ROOT / "Snakefile"), "--config", "gpus=0", "--sdm", *methods]
    status, said = snakemake(tmp_path, *line, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert status == 0, said
    assert ("envs/mmfm.yaml will be created" in said) == ("conda" in methods)
    assert "gpu.yaml" not in said
