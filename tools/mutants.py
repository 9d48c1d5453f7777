"""Mutation testing: change one operator or constant of the code at a time, and see whether a test fails.

python tools/mutants.py                          20 mutants of every package
python tools/mutants.py flow data --number 50    50 of each of these; others with another --seed

Mutants are made in a copy of the repository, so the tree is never changed. Of the test files of TESTS those tests run
that call the mutated function, the quickest first, without the slow ones; which these are is kept in results/mutants/.
Prints every mutant, and writes the survivors to results/mutants.md, also after Ctrl-C.
"""

import argparse
import ast
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")

# These once for all mutants, each of which is tested in a fork; the package itself is imported there.
import hypothesis  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import omegaconf  # noqa: F401
import pytest
import scipy.optimize  # noqa: F401
import sklearn.metrics
import sklearn.mixture  # noqa: F401
import torch._dynamo  # noqa: F401
import zarr  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
import mmfm.infra.torchvision_ops  # noqa: F401  # isort: skip  (before transformers)
import transformers

transformers.Dinov2WithRegistersModel  # noqa: B018  (imports it)

TESTS = {
    "data": "data moments demo extraction", "data/survey": "survey",
    "flow": "flow source", "models": "dit flow checkpoint",
    "mixture": "gaussian em truncated initial split_merge bad_mixtures",
    "mixture/coupling": "spatial", "mixture/images_by_mode": "spatial", "mixture/mapped_rows": "source",
    "mixture/spatial": "source spatial", "mixture/validity": "validity", "mixture/gaussian": "gaussian em bad_mixtures",
    "training": "trainer history training broken_runs resuming settings weighting milestones",
    "training/loggers": "loggers wandb", "training/runlog": "trainer loggers fid_curve training broken_runs",
    "training/checkpoint": "checkpoint trainer training broken_runs resuming", "training/fid_curve": "fid_curve",
    "training/parallel": "parallel checkpoint trainer", "training/previews": "fid_curve",
    "training/weighting": "weighting",
    "generation": "sampling api published_precision settings", "evaluation": "fid reference",
    "evaluation/frechet": "frechet", "evaluation/detector": "detector",
    "evaluation/contact_sheet": "contact_sheet", "evaluation/mixture_report": "em",
    "evaluation/adm": "adm", "evaluation/collected": "collected scoring", "evaluation/heldout": "heldout",
    "evaluation/image_sets": "scoring", "evaluation/inception_score": "inception_score", "evaluation/kid": "kid",
    "evaluation/manifold": "manifold", "evaluation/memorisation": "memorisation", "evaluation/neighbours": "manifold",
    "evaluation/mode_quality": "mode_quality", "evaluation/mode_sheet": "mode_sheet",
    "evaluation/reconstruction": "reconstruction", "evaluation/scores": "collected", "evaluation/scoring": "scoring",
    "evaluation/self_test": "scoring",
    "stages/runner": "runner extraction spatial stage_state",
}  # fmt: skip
"""Test files by the beginning of the path in src/mmfm that they are for; of several the longest counts."""

SWAPS = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn,
         ast.Add: ast.Sub, ast.Mult: ast.Div, ast.And: ast.Or}  # fmt: skip
SWAPS |= {there: here for here, there in SWAPS.items()} | {ast.FloorDiv: ast.Div}
UNTESTED = ("strict", "help", "desc", "non_blocking", "pin_memory", "figsize", "dpi", "fontsize", "linewidth",
            "markersize", "alpha", "frameon", "pad_inches", "h_pad")  # fmt: skip
"""Keyword arguments that change no result: guards against mistakes, help, time on a GPU, taste in pictures."""
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
        if isinstance(node, ast.Raise):
            parts.append(node.exc)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[0] in ("print", "warnings", "progress"):
            parts.append(node)
        elif isinstance(node, ast.keyword) and node.arg in UNTESTED:
            parts.append(node.value)
        exempt.update(inner for part in parts if part for inner in ast.walk(part))
    return [(path, i, j) for i, node in enumerate(nodes) if node not in exempt for j, _ in enumerate(changes(node))]


def mutate(path: Path, node_number: int, change: int) -> tuple[str, int, str]:
    """Return the text of a mutated file, the line that was changed, and what was changed."""
    tree = ast.parse(path.read_text())
    node = list(ast.walk(tree))[node_number]
    before, (field, value) = ast.unparse(node), list(changes(node))[change]
    setattr(node, field, value)
    return ast.unparse(tree), node.lineno, " ".join(f"{path}:{node.lineno} `{before}` -> `{ast.unparse(node)}`".split())


Tests = dict[str, tuple[float, list[tuple[str, int]]]]
"""Seconds that tests take and the functions (file, line) that they call, by the name of the test."""


class Trace:
    """A pytest plugin that notes how long each test takes and which functions it and its fixtures call."""

    def __init__(self, source: Path) -> None:
        self.source = f"{source}{os.sep}"
        self.called: dict[str, set[tuple[str, int]]] = {}
        self.seconds: dict[str, float] = {}
        self.closures: dict[str, list[str]] = {}
        self.now = ""

    def note(self, frame: FrameType, event: str, _: object) -> None:
        """Note a call of a function (for sys.settrace, which is not asked for lines)."""
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(self.source):
            where = code.co_filename.removeprefix(self.source), code.co_firstlineno
            self.called.setdefault(self.now, set()).add(where)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Time a test, and note its calls under its name."""
        self.now, start = item.nodeid, time.monotonic()
        self.closures[item.nodeid] = list(getattr(item, "fixturenames", []))
        threading.settrace(self.note)
        sys.settrace(self.note)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)
            self.seconds[item.nodeid] = time.monotonic() - start

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef) -> Iterator[None]:
        """Note the calls of a fixture under its name: all tests that use it share them."""
        before, self.now = self.now, fixturedef.argname
        try:
            return (yield)
        finally:
            self.now = before

    def tests(self) -> Tests:
        """Return the seconds and the called functions (file, line) of every test."""
        nothing: set[tuple[str, int]] = set()
        return {
            name: (seconds, sorted(set.union(nothing, *(self.called.get(k, nothing) for k in (name, *fixtures)))))
            for (name, seconds), fixtures in zip(self.seconds.items(), self.closures.values(), strict=True)
        }


def tests_pass(copy: Path, names: list[str], limit: int, trace: Path | None = None) -> bool:
    """Run tests in a copy of the repository, in a process group of their own that ends after ``limit`` seconds."""
    if not (child := os.fork()):
        os.setsid()
        signal.alarm(limit)
        os.dup2(os.open(copy / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os.chdir(copy)
        os.environ["PYTHONPATH"] = sys.path[0] = str(copy / "src")
        # The copy's package is imported; ours stays referenced, and with it torchvision's operators.
        ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "mmfm"}
        for name in ours:
            del sys.modules[name]
        options = ["-x", "-n0", "-mnot slow and not gpu", "-pno:cacheprovider", f"--basetemp={copy / 'tmp'}"]
        plugin = Trace(copy.resolve() / "src/mmfm")
        status = pytest.main([*options, *names], [plugin] if trace else [])
        if trace:
            trace.write_text(json.dumps(plugin.tests()))
        os._exit(status)
    try:
        return os.waitpid(child, 0)[1] == 0
    finally:
        with contextlib.suppress(ProcessLookupError):  # none is left
            os.killpg(child, signal.SIGKILL)


def trace(copy: Path, file: str) -> Tests:
    """Return the seconds and the called functions of the tests of a file, measured now or kept from an earlier run."""
    digest = hashlib.sha256()
    for path in sorted([copy / file, *(copy / "src").rglob("*.py")]):
        digest.update(path.read_bytes())
    kept = Path(f"results/mutants/{Path(file).stem}.{digest.hexdigest()[:16]}.json")
    if not kept.exists():
        if not tests_pass(copy, [file], 3600, copy / "trace"):
            sys.exit(f"the tests fail or hang without a mutant:\n{(copy / 'log').read_text()[-3000:]}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(copy / "trace", kept)
    return json.loads(kept.read_text())


def tests_for(path: Path, line: int, tests: Tests) -> list[str]:
    """Return the tests that call the function around a line, the quickest first.

    Where there is no function around, these are all tests, those that call a function of the file first.
    """
    around = [
        range(min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno + 1)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.body[0].lineno <= line <= node.end_lineno
    ]
    span, file = min(around, key=len, default=range(1 << 30)), str(path.relative_to("src/mmfm"))
    calling = {name for name, (_, called) in tests.items() if any(f == file and at in span for f, at in called)}
    return sorted(calling if around else tests, key=lambda name: (name not in calling, tests[name][0]))


def survives(copy: Path, mutant: tuple[Path, int, int], traces: dict[str, Tests], longest: float) -> str | None:
    """Test a mutant; return what was changed if no test fails. ``traces`` keeps what :func:`trace` says of a file."""
    path, *where = mutant
    tests: Tests = {}
    for name in TESTS[max((key for key in TESTS if f"src/mmfm/{key}" in str(path)), key=len)].split():
        if name not in traces:
            (file,) = copy.glob(f"tests/**/test_{name}.py")
            traces[name] = trace(copy, str(file.relative_to(copy)))
        tests |= {test: what for test, what in traces[name].items() if what[0] <= longest}
    text, line, about = mutate(path, *where)
    names = tests_for(path, line, tests)
    (copy / path).write_text(text)
    survived = not names or tests_pass(copy, names, 30 + 3 * int(sum(tests[name][0] for name in names)))
    shutil.copy(path, copy / path)
    print("survived" if survived else "found   ", about, flush=True)
    return about if survived else None


def main() -> None:
    """Choose mutants, test them, and write what survived."""
    packages = list(dict.fromkeys(key if key.startswith("stages") else key.split("/")[0] for key in TESTS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", default=packages, help=f"of {', '.join(packages)} (all)")
    parser.add_argument("--number", type=int, default=20, help="of mutants of a package (20)")
    parser.add_argument("--longest", type=float, default=10, help="seconds of a test that is still run (10)")
    parser.add_argument("--seed", type=int, default=0, help="of their choice (0)")
    arguments = parser.parse_args()
    os.chdir(Path(__file__).parent.parent)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results: dict[str, list[str | None]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        copy, traces = Path(folder) / "copy", {}
        shutil.copytree(".", copy, ignore=shutil.ignore_patterns(".*", "results", "__pycache__"), symlinks=True)
        for package in arguments.packages:
            files = [path for path in Path("src").rglob("*.py") if f"src/mmfm/{package}" in str(path)]
            every = [mutant for path in sorted(files) for mutant in mutants(path)]
            results[package] = []
            for mutant in sorted(random.Random(arguments.seed).sample(every, min(arguments.number, len(every)))):
                results[package].append(survives(copy, mutant, traces, arguments.longest))
    lines = ["| package | made | found | survived |", "|---|---|---|---|"]
    lines += [f"| {name} | {len(r)} | {r.count(None)} | {len(r) - r.count(None)} |" for name, r in results.items()]
    lines += ["", *(f"* {about}" for each in results.values() for about in each if about)]
    Path("results").mkdir(exist_ok=True)
    Path("results/mutants.md").write_text("\n".join([*lines, ""]))
    print("", *lines, sep="\n")


if __name__ == "__main__":
    main()
