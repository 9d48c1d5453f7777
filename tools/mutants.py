"""Mutation testing: change one operator or constant of the code at a time, and see whether a test fails.

python tools/mutants.py                          20 mutants of every package
python tools/mutants.py flow data --number 50    50 of each of these; others with another --seed

Mutants are made in a copy of the repository, so the tree is never changed, and only the test files of TESTS are run,
without the slow ones. Prints every mutant, and writes the survivors to results/mutants.md, also after Ctrl-C.
"""

import argparse
import ast
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")

import pytest
import torch  # noqa: F401  (once for all mutants, each of which is tested in a fork)
import zarr  # noqa: F401

TESTS = {
    "data": "data statistics demo extraction", "flow": "flow source", "models": "dit flow checkpoint",
    "mixture": "gaussian em truncated initial split_merge bad_mixtures",
    "mixture/spatial": "source spatial", "mixture/validity": "validity", "mixture/gaussian": "gaussian em bad_mixtures",
    "training": "training", "training/loggers": "loggers", "training/checkpoint": "checkpoint training",
    "training/fid_curve": "fid_curve", "training/parallel": "parallel checkpoint", "training/previews": "fid_curve",
    "training/weighting": "weighting",
    "generation": "sampling", "evaluation": "frechet detector contact_sheet em reference fid",
    "stages/runner": "runner extraction spatial stage_state",
}  # fmt: skip
"""Test files by the beginning of the path in src/mmfm that they are for; of several the longest counts."""

SWAPS = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn,
         ast.Add: ast.Sub, ast.Mult: ast.Div, ast.And: ast.Or}  # fmt: skip
SWAPS |= {there: here for here, there in SWAPS.items()} | {ast.FloorDiv: ast.Div}
NAMES = {"min": "max", "max": "min", "amin": "amax", "amax": "amin", "mean": "sum"}


def changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    """Yield fields of a node and what they become in a mutant."""
    for i, operator in enumerate(getattr(node, "ops", [])):
        if type(operator) in SWAPS:
            yield "ops", [*node.ops[:i], SWAPS[type(operator)](), *node.ops[i + 1 :]]
    if type(getattr(node, "op", None)) in SWAPS:
        yield "op", SWAPS[type(node.op)]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "operand", ast.UnaryOp(ast.Not(), node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "value", not node.value if isinstance(node.value, bool) else node.value + 1
    for field in ("id", "attr"):
        if (name := getattr(node, field, None)) in NAMES:
            yield field, NAMES[name]


def mutants(path: Path) -> list[tuple[Path, int, int]]:
    """Return all mutants of a file as (path, number of the node, number of the change)."""
    nodes, exempt = list(ast.walk(ast.parse(path.read_text()))), set()
    for node in nodes:
        parts = [
            *getattr(node, "decorator_list", []),
            *(getattr(node, name, None) for name in ("annotation", "returns")),
        ]
        if isinstance(node, ast.keyword) and node.arg == "strict":  # zip's, which guards against mistakes only
            parts.append(node.value)
        exempt.update(inner for part in parts if part for inner in ast.walk(part))
    return [(path, i, j) for i, node in enumerate(nodes) if node not in exempt for j, _ in enumerate(changes(node))]


def mutate(path: Path, node_number: int, change: int) -> tuple[str, str]:
    """Return the text of a mutated file, and what was changed."""
    tree = ast.parse(path.read_text())
    node = list(ast.walk(tree))[node_number]
    before, (field, value) = ast.unparse(node), list(changes(node))[change]
    setattr(node, field, value)
    return ast.unparse(tree), " ".join(f"{path}:{node.lineno} `{before}` -> `{ast.unparse(node)}`".split())


def tests_pass(copy: Path, names: str, limit: int) -> bool:
    """Run test files in a copy of the repository, in a process group of their own that ends after ``limit`` seconds."""
    if not (child := os.fork()):
        os.setsid()
        signal.alarm(limit)
        os.dup2(os.open(copy / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os.chdir(copy)
        os.environ["PYTHONPATH"] = sys.path[0] = str(copy / "src")
        options = ["-x", "-n0", "-mnot slow and not gpu", "-pno:cacheprovider", f"--basetemp={copy / 'tmp'}"]
        os._exit(pytest.main([*options, *(f"tests/test_{name}.py" for name in names.split())]))
    try:
        return os.waitpid(child, 0)[1] == 0
    finally:
        with contextlib.suppress(ProcessLookupError):  # none is left
            os.killpg(child, signal.SIGKILL)


def survives(copy: Path, mutant: tuple[Path, int, int], limits: dict[str, int]) -> str | None:
    """Test a mutant; return what was changed if no test fails. ``limits`` keeps how many seconds tests may take."""
    path, *where = mutant
    names = TESTS[max((key for key in TESTS if f"src/mmfm/{key}" in str(path)), key=len)]
    if names not in limits:
        start = time.monotonic()
        if not tests_pass(copy, names, 0):
            sys.exit(f"the tests fail without a mutant:\n{(copy / 'log').read_text()[-3000:]}")
        limits[names] = 30 + 3 * int(time.monotonic() - start)
    text, about = mutate(path, *where)
    (copy / path).write_text(text)
    survived = tests_pass(copy, names, limits[names])
    shutil.copy(path, copy / path)
    print("survived" if survived else "found   ", about, flush=True)
    return about if survived else None


def main() -> None:
    """Choose mutants, test them, and write what survived."""
    packages = list(dict.fromkeys(key if key.startswith("stages") else key.split("/")[0] for key in TESTS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", default=packages, help=f"of {', '.join(packages)} (all)")
    parser.add_argument("--number", type=int, default=20, help="of mutants of a package (20)")
    parser.add_argument("--seed", type=int, default=0, help="of their choice (0)")
    arguments = parser.parse_args()
    os.chdir(Path(__file__).parent.parent)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results: dict[str, list[str | None]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        copy, limits = Path(folder) / "copy", {}
        shutil.copytree(".", copy, ignore=shutil.ignore_patterns(".*", "results", "__pycache__"), symlinks=True)
        for package in arguments.packages:
            files = [path for path in Path("src").rglob("*.py") if f"src/mmfm/{package}" in str(path)]
            every = [mutant for path in sorted(files) for mutant in mutants(path)]
            results[package] = []
            for mutant in sorted(random.Random(arguments.seed).sample(every, min(arguments.number, len(every)))):
                results[package].append(survives(copy, mutant, limits))
    lines = ["| package | made | found | survived |", "|---|---|---|---|"]
    lines += [f"| {name} | {len(r)} | {r.count(None)} | {len(r) - r.count(None)} |" for name, r in results.items()]
    lines += ["", *(f"* {about}" for each in results.values() for about in each if about)]
    Path("results").mkdir(exist_ok=True)
    Path("results/mutants.md").write_text("\n".join([*lines, ""]))
    print("", *lines, sep="\n")


if __name__ == "__main__":
    main()
