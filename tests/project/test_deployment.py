"""What others deploy from: the catalog's file, CI, the container, the environments. They agree with the project."""

import re
import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from support.places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


ENVIRONMENTS = [ROOT / "envs" / f"{name}.yaml" for name in ("gpu", "mmfm")]
"""The package's environments; the original evaluator has one without the package."""


def test_the_catalog_finds_what_it_looks_for():
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    methods = usage["software-stack-deployment"]
    assert set(usage) == {"software-stack-deployment"}, "no flag is mandatory"
    assert set(methods) == {"conda", "apptainer", "apptainer+conda", "report"}
    assert (ROOT / "workflow" / "Snakefile").is_file() and (ROOT / "config" / "README.md").is_file()
    images = [path for path in (ROOT / "rules").glob("*.smk") if re.search(r"^\s*container", path.read_text(), re.M)]
    assert methods["apptainer"] == bool(images), "only rules that name an image run in one"


def test_ci_runs_the_whole_check():
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    assert job["container"].startswith("debian:") and job["timeout-minutes"] <= 90
    assert job["env"]["PIP_EXTRA_INDEX_URL"].endswith("/whl/cpu"), "gigabytes of CUDA"
    *_, check = job["steps"]
    assert "bash .ci/run" in check["run"].splitlines() and check["timeout-minutes"] < job["timeout-minutes"]


def test_the_image_holds_the_workflow_and_runs_it_as_nobody():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*" and {line[1:] for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)
    assert {"Snakefile", "rules", "config", "profiles", "workflow", "envs", "resources", "src"} <= copied
    users = [line for line in lines if line.startswith("USER ")]
    assert users and users[-1] != "USER root"


def test_python_is_the_same_everywhere():
    envs = [yaml.safe_load(path.read_text())["dependencies"][0] for path in ENVIRONMENTS]
    image = re.search(r"^FROM python:(\d+\.\d+)-", (ROOT / "Dockerfile").read_text(), re.M)[1]
    assert len(envs) == 2 and set(envs) == {f"python={image}"}
    assert image in SpecifierSet(PROJECT["requires-python"])


def test_the_locked_versions_fit_the_environments():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M))
    for path in ENVIRONMENTS:
        for line in yaml.safe_load(path.read_text())["dependencies"][-1]["pip"]:
            wanted = Requirement(line)
            if wanted.name.startswith("faiss-gpu"):
                continue  # another build of faiss; the lock has the CPU's
            assert wanted.specifier.contains(pins[wanted.name]), f"{path.name}: {line}, locked {pins[wanted.name]}"


def test_every_rule_runs_in_the_one_environment():
    """Also on a GPU: an environment that depended on the machine would rerun everything with `--sdm conda`."""
    for path in (ROOT / "rules").glob("*.smk"):
        text = path.read_text()
        bodies = re.split(r"^ *(?:rule|checkpoint) (\w+):$", text, flags=re.M)
        for name, body in zip(bodies[1::2], bodies[2::2], strict=True):
            own = {"adm_evaluator": "tf-evaluator"}.get(name, "mmfm")  # TensorFlow wants another NumPy and Python
            assert re.findall(r'conda:\n +"([^"]+)"', body)[:1] == [f"../envs/{own}.yaml"], name
