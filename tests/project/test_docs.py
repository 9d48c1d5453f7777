"""The documents: links lead somewhere, environments are those of the package."""

import re
import tomllib

import pytest
import yaml

from support.places import ROOT

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "config" / "README.md",
    ROOT / "resources" / "demo" / "README.md",
]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_conda_environments_hold_the_packages_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name, faiss in (("mmfm", "faiss-cpu"), ("gpu", "faiss-gpu")):
        listed = yaml.safe_load((ROOT / "envs" / f"{name}.yaml").read_text())["dependencies"][-1]["pip"]
        assert [d for d in listed if "faiss" not in d] == [d for d in project if "faiss" not in d]
        assert next(d for d in listed if "faiss" in d).startswith(faiss)


def test_every_promise_names_a_test_that_exists():
    promised = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "guarantees.md").read_text())
    lines = [line for line in (ROOT / "docs" / "guarantees.md").read_text().splitlines() if line.startswith("| ")]
    assert len(promised) == sum(not line.startswith(("| promise", "| mistake")) for line in lines) > 50
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for file, name in promised:
        assert f"\ndef {name}(" in files[file], f"{file}::{name}"


def test_every_number_of_the_method_names_a_test_that_exists():
    """In the table of docs/parity.md; ``::name`` is in the file named before it."""
    section = (ROOT / "docs" / "parity.md").read_text().split("## The method's numbers")[1].split("## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)?::(test_\w+)`", row)
        assert named and named[0][0], row
        file = ""
        for other, name in named:
            file = other or file
            assert f"\ndef {name}(" in files[file], f"{file}::{name}"
