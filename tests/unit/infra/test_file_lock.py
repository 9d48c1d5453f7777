"""Locks on files, also where the file system has none."""

import errno
import fcntl
import logging

import pytest

from mmfm.infra import file_lock, launch, stage_state
from mmfm.workflow import locks


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS])
def no_locks(request, monkeypatch):
    """A file system without locks, such as Lustre mounted without `flock`."""

    def refuse(*_):
        raise OSError(request.param, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_lock_is_taken_by_one_and_shared_by_readers(tmp_path):
    with open(tmp_path / "a", "w") as one, open(tmp_path / "a", "w") as other:
        assert file_lock.try_lock(one) is True
        assert file_lock.try_lock(other) is False
        assert file_lock.try_lock(other, file_lock.SHARED) is False
        assert file_lock.try_lock(one, file_lock.SHARED) is True
        assert file_lock.try_lock(other, file_lock.SHARED) is True


def test_no_locks_are_not_another_process(no_locks, tmp_path, caplog):
    (tmp_path / "state").mkdir()
    with caplog.at_level(logging.WARNING):
        stage_state.lock(tmp_path / "state", "extract")
    assert "on a file system without locks: do not start this extract twice" in caplog.text
    stage_state.unlock(tmp_path / "state")
    assert stage_state.remove_idle_state(tmp_path / "state") is False, "it may be in use"


def test_a_workflow_runs_without_locks(no_locks, tmp_path, capsys):
    (tmp_path / "a.log").write_text("")
    locks.clear_stale_locks(tmp_path / ".snakemake").close()
    locks.refuse_logs_in_use([str(tmp_path / "a.log"), str(tmp_path / "none.log")])
    assert capsys.readouterr().err == ""


def test_gpus_are_held_without_locks(no_locks, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(launch, "_LOCK_FOLDER", tmp_path / "locks")
    assert launch.hold_gpus(1)[0] == ["0"]
