"""Versions of the software that the numbers depend on."""

import importlib.metadata
import platform

PACKAGES = ("torch", "torchvision", "transformers", "zarr", "snakemake", "torch-fidelity")
"""Distributions that results can depend on."""


def version(package: str) -> str | None:
    """Return the version of an installed distribution; None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed() -> dict[str, str]:
    """Return the versions of Python, this package and what it is built on, as far as they are installed."""
    found = {package: version(package) for package in ("mmfm", *PACKAGES, "numpy")}
    return {"python": platform.python_version(), **{name: text for name, text in found.items() if text}}
