"""``mmfm doctor``: check this installation."""

import argparse
import importlib.metadata
import os
import platform
import shutil

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PACKAGES = ("torch", "torchvision", "transformers", "zarr", "snakemake", "torch-fidelity")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: list[str]) -> int:
    """Print versions, devices and free disk space; return 1 if something would stop the workflow."""
    parser = argparse.ArgumentParser(
        prog="mmfm doctor",
        description="Check this installation: package versions, faiss build, GPUs, free disk space. "
        "The exit status is 1 if something would stop the workflow.",
    )
    parser.add_argument("--threads", action="store_true", help="print only the thread settings of this process")
    options = parser.parse_args(arguments)
    if options.threads:
        print(*(f"{name}={os.environ.get(name, '')}" for name in _THREADS), sep="\n")
        return 0
    problems = []
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    for package in _PACKAGES:
        version = _version(package)
        print(f"{package:<16}{version or 'missing'}")
        if version is None:
            problems.append(f"{package} is missing; run pip install -e .")
    from mmfm.mixture.initial import faiss_wheels

    builds = faiss_wheels()
    print(f"{'faiss':<16}{', '.join(f'{b} {_version(b)}' for b in builds) or 'missing'}")
    if len(builds) != 1:
        problems.append(
            f"exactly one build of faiss must be installed, found {builds or 'none'}; pip uninstall the others"
        )
    from mmfm.infra import torchvision_ops

    if torchvision_ops._declared is not None:
        print("torchvision was built for another PyTorch; its missing operators are stubbed (harmless here)")
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            print(f"GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GB")
    else:
        print("no GPU: stages run on the CPU")
    print(f"free disk here: {shutil.disk_usage('.').free / 1e9:.0f} GB")
    for problem in problems:
        print(f"problem: {problem}")
    print("problems found" if problems else "no problems found")
    return 1 if problems else 0
