"""A run that the tests of this folder compare with."""

from pathlib import Path

import pytest

from support.train_runs import run


@pytest.fixture(scope="session")
def undisturbed(tiny_pipeline, tmp_path_factory) -> Path:
    """Three epochs of setting ``mode``, 15 steps."""
    return run(tiny_pipeline, tmp_path_factory.mktemp("undisturbed"))
