"""The tour runs on finished results; `.ci/run` makes them first."""

import os
import sys
from pathlib import Path

import pytest

from support.places import ROOT

TOUR = ROOT / "docs" / "tour.ipynb"
RESULT = ROOT / "results" / "fid" / "dinov2_mode.txt"


def test_tour_holds_its_pictures():
    import nbformat

    cells = nbformat.read(TOUR, 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert TOUR.stat().st_size < 1_500_000


@pytest.mark.slow
@pytest.mark.skipif(not RESULT.exists(), reason=f"no {RESULT.relative_to(ROOT)}; make it with Snakemake")
def test_tour_runs(monkeypatch):
    """In the notebook's own folder, by the Python that runs the test."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(TOUR, 4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(TOUR.parent)}}).execute()
