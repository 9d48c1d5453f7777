"""Run guided-diffusion's evaluator.py on a reference and generated images, and keep the numbers that it prints.

    python run_evaluator.py --evaluator evaluator.py --reference reference.npz --images images.npz --out result.txt

It runs in the evaluator's environment (envs/tf-evaluator.yaml), which lacks this package, so it needs nothing but
Python 3.9. The evaluator fetches its network into its own folder unless that has it. docs/metrics.md explains the
numbers.
"""

import argparse
import ast
import hashlib
import importlib.util
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

PRINTED = ("Inception Score", "FID", "sFID", "Precision", "Recall")
"""What the evaluator prints, each on a line of its own with a number."""

_MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")


def check(path: Path, what: str) -> None:
    """Raise ValueError unless an .npz has what the evaluator reads, which would otherwise stop only after hours."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name[: -len(".npy")] for name in archive.namelist() if name.endswith(".npy")}
            if "arr_0" not in names:
                raise ValueError(f"the {what} '{path}' has no images (arr_0), but the evaluator needs them")
            with archive.open("arr_0.npy") as member:
                header = _header(member.read(4096))
    except zipfile.BadZipFile as error:
        raise ValueError(f"the {what} '{path}' is truncated or not an .npz file ({error}); make it again") from error
    shape = header["shape"]
    if header["descr"] != "|u1" or len(shape) != 4 or shape[3] != 3:
        raise ValueError(f"the {what} '{path}' has arr_0 {shape} {header['descr']}, but images are uint8 (n, S, S, 3)")
    there = [name for name in _MOMENTS if name in names]
    if there and there != list(_MOMENTS):
        lacking = ", ".join(name for name in _MOMENTS if name not in names)
        raise ValueError(f"the {what} '{path}' has {', '.join(there)}, but lacks {lacking}; make it with sfid, too")


def _header(start: bytes) -> dict[str, Any]:
    """Return the header of a .npy file: descr, fortran_order and shape."""
    length, first = struct.unpack("<H", start[8:10])[0], 10
    if start[6] > 1:
        length, first = struct.unpack("<I", start[8:12])[0], 12
    header: dict[str, Any] = ast.literal_eval(start[first : first + length].decode("latin1"))
    return header


def run(evaluator: Path, reference: Path, images: Path) -> list[str]:
    """Run the evaluator, show what it prints, and return the lines with the numbers, in the order of :data:`PRINTED`.

    Raises:
        ValueError: it fails, or prints other lines.
    """
    command = [sys.executable, "-u", evaluator.name, str(reference.resolve()), str(images.resolve())]
    process = subprocess.Popen(command, cwd=str(evaluator.resolve().parent), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = {}
    for line in process.stdout:
        print(line, end="", flush=True)
        match = re.match(rf"({'|'.join(PRINTED)}): (\S+)$", line)
        if match:
            found[match.group(1)] = match.group(2)
    if process.wait():
        if importlib.util.find_spec("tensorflow") is None:
            raise ValueError(
                f"'{sys.executable}' has no TensorFlow; make the environment envs/tf-evaluator.yaml and set "
                "EVALUATOR_PYTHON to its python, or run snakemake with --sdm conda"
            )
        raise ValueError(f"'{evaluator}' ended with status {process.returncode}; its last lines say why")
    missing = [name for name in PRINTED if name not in found]
    if missing:
        raise ValueError(f"'{evaluator}' printed no {', '.join(missing)}; is it guided-diffusion's evaluator.py?")
    return [f"{name}: {found[name]}" for name in PRINTED]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def main() -> int:
    """Check the files, run the evaluator and write the result; 2 with one line on standard error for a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluator", type=Path, required=True, help="guided-diffusion/evaluations/evaluator.py")
    parser.add_argument("--reference", type=Path, required=True, help=".npz with arr_0 and, usually, moments")
    parser.add_argument("--images", type=Path, required=True, help=".npz with the generated images in arr_0")
    parser.add_argument("--out", type=Path, required=True, help="the numbers, as the evaluator prints them (output)")
    options = parser.parse_args()
    files = {"evaluator": options.evaluator, "reference": options.reference, "images": options.images}
    try:
        for name in ("reference", "images"):
            check(files[name], name)
        lines = [*run(*files.values()), ""]
        lines += [f"{name:<11}{path.name}, sha256 {_digest(path)}" for name, path in files.items()]
    except (ValueError, OSError) as error:
        print(f"adm_evaluator: error: {error} (see docs/metrics.md)", file=sys.stderr)
        return 2
    partial = options.out.with_name(f".{options.out.name}.partial")
    partial.write_text("\n".join(lines) + "\n")
    os.replace(str(partial), str(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
