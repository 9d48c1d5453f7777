"""Pin all Python packages that the project and its extras need, in requirements.txt.

python tools/lock.py            resolve pyproject.toml (needs uv: pip install uv); keep valid pins
python tools/lock.py --upgrade  the same, but upgrade all pins to the newest releases
python tools/lock.py --check    check the file against pyproject.toml and the installed packages, without network access

CUDA packages are left out: each PyTorch wheel pins its own, and a CPU build needs none.
"""

import argparse
import itertools
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.txt"
HEADER = """\
# Made by `python tools/lock.py`; don't edit.
# pip install -r requirements.txt -e .    everything, as used by the tests
# pip install -c requirements.txt -e .    only what the program needs, in these versions
"""
CUDA = ("nvidia-", "cuda-", "triton")


def write(upgrade: bool) -> None:
    """Resolve for Linux and the oldest supported Python; newer Python versions use the same packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    line = ["uv", "pip", "compile", "pyproject.toml", "--all-extras", "--no-annotate", "--no-header", "--quiet",
            "--python-platform=linux", "--python-version", project["requires-python"].removeprefix(">="),
            "--output-file", str(LOCK), *(["--upgrade"] if upgrade else [])]  # fmt: skip
    subprocess.run(line, cwd=ROOT, check=True)  # uv keeps the pins in the output file where possible
    pins = [pin for pin in LOCK.read_text().splitlines() if pin[0] not in "# " and not pin.startswith(CUDA)]
    LOCK.write_text(HEADER + "\n".join(pins) + "\n")


def faults() -> list[str]:
    """Return the packages that are missing in the file or pinned to versions that violate a requirement.

    Checks the requirements of pyproject.toml and, recursively, of the installed packages that they name.
    """
    lines = [line for line in LOCK.read_text().splitlines() if line and line[0] != "#"]
    pins = {canonicalize_name(r.name): r for r in map(Requirement, lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(itertools.chain(project["dependencies"], *project["optional-dependencies"].values()))
    waiting, seen, found = [(Requirement(line), "pyproject.toml") for line in lines], set(), []
    while waiting:
        requirement, by = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name.startswith(CUDA) or (name, by) in seen:
            continue
        seen.add((name, by))
        if name not in pins:
            found.append(f"{name} is missing: {by} requires it")
            continue
        (pin,) = pins[name].specifier
        if not requirement.specifier.contains(pin.version, prereleases=True):
            found.append(f"{pins[name]} conflicts with {requirement}, required by {by}")
        try:
            below = [Requirement(line) for line in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:  # belongs to an extra that is not installed
            continue
        extras = requirement.extras or {""}
        needed = [r for r in below if not r.marker or any(r.marker.evaluate({"extra": extra}) for extra in extras)]
        if metadata.version(name).split("+")[0] == pin.version:  # another release may have other requirements
            waiting += [(r, f"{name} {pin.version}") for r in needed]
    return sorted(found)


def main() -> None:
    """Write the file, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--upgrade", action="store_true")
    arguments = parser.parse_args()
    if not arguments.check:
        write(arguments.upgrade)
    if found := faults():
        sys.exit("\n".join([*found, "to update requirements.txt, run python tools/lock.py"]))


if __name__ == "__main__":
    main()
