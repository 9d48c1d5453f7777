"""requirements.txt pins what pyproject.toml asks for, and the check of it notices what is missing or does not fit."""

import pytest

from support.places import ROOT


@pytest.fixture
def lock(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import lock

    return lock


def test_the_lock_fits_the_project(lock):
    assert lock.faults() == []


@pytest.mark.parametrize(
    ("pin", "instead", "said"),
    [
        ("zarr==", "", "zarr is missing: pyproject.toml requires it"),
        ("zarr==", "zarr==2.18.0", "zarr==2.18.0 conflicts with zarr<4,>=3.1.6, required by pyproject.toml"),
        ("donfig==", "", "donfig is missing: zarr"),
    ],
)
def test_a_lock_that_does_not_fit_is_noticed(lock, tmp_path, monkeypatch, pin, instead, said):
    lines = lock.LOCK.read_text().splitlines()
    assert sum(line.startswith(pin) for line in lines) == 1
    (tmp_path / "lock").write_text("\n".join(instead if line.startswith(pin) else line for line in lines))
    monkeypatch.setattr(lock, "LOCK", tmp_path / "lock")
    assert any(fault.startswith(said) for fault in lock.faults())
