"""State directories: whose they are, and one process at a time."""

import subprocess
import sys

import pytest

from mmfm.infra import disk, file_lock, heartbeat, stage_state


def test_state_depends_on_identity_version_and_inputs(tmp_path):
    def directory(version=1, identity=None, inputs=None):
        return stage_state.state_directory(
            tmp_path / "out", "fit", version, identity or {"k": 1}, inputs or {"tokens": "a"}
        )

    same = directory()
    assert directory() == same and (same / "about.json").exists()
    assert len({same, directory(version=2), directory(identity={"k": 2}), directory(inputs={"tokens": "b"})}) == 4


def test_two_processes_never_share_a_state(tmp_path):
    script = (
        "from mmfm.infra import stage_state; import sys; "
        f"stage_state.state_directory({str(tmp_path / 'out')!r}, 'fit', 1, {{}}, {{}}); "
        "print('held', flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=f"process {other.pid} is already running this fit"):
        stage_state.state_directory(tmp_path / "out", "fit", 1, {}, {})
    other.kill()
    other.wait()
    assert stage_state.state_directory(tmp_path / "out", "fit", 1, {}, {}).is_dir()


@pytest.fixture
def before_locking(monkeypatch):
    """Return a function that lets something happen once, between the next opening of a lock and its locking."""
    try_lock = file_lock.try_lock

    def arrange(happens):
        def late(handle):
            monkeypatch.setattr(file_lock, "try_lock", try_lock)
            happens()
            return try_lock(handle)

        monkeypatch.setattr(file_lock, "try_lock", late)

    return arrange


def test_a_state_that_is_removed_while_it_is_locked_is_made_anew(tmp_path, before_locking):
    def open_state():
        return stage_state.state_directory(tmp_path / "out", "fit", 1, {}, {})

    state = open_state()
    stage_state.unlock(state)
    before_locking(lambda: stage_state.remove_idle_state(state))
    assert open_state() == state and (state / "about.json").exists()
    assert stage_state.remove_idle_state(state) is False, "it is in use"
    stage_state.unlock(state)
    assert stage_state.remove_idle_state(state) and not list(tmp_path.iterdir())


def test_a_state_made_anew_while_it_is_cleaned_away_stays(tmp_path, before_locking):
    """Two calls of clean at once, and a start between them."""

    def open_state():
        return stage_state.state_directory(tmp_path / "out", "fit", 1, {}, {})

    state = open_state()
    stage_state.unlock(state)

    def another_clean_and_a_start():
        assert stage_state.remove_idle_state(state)
        (open_state() / "unit-0").touch()

    before_locking(another_clean_and_a_start)
    assert stage_state.remove_idle_state(state) is False
    assert {path.name for path in state.iterdir()} == {"about.json", "lock", "unit-0"}
    stage_state.unlock(state)


def test_publishing_leaves_the_heartbeat_to_its_thread(tmp_path):
    """It may be replaced at any moment, so it is not the publication that removes it."""
    state = stage_state.state_directory(tmp_path / "out", "fit", 1, {}, {})
    for name in (*heartbeat.FILES, "unit-0"):
        (state / name).touch()
    with stage_state.finishing(state, {"out": tmp_path / "out"}) as finished:
        (finished / "out").write_text("done")
    assert {path.name for path in state.iterdir()} == {*heartbeat.FILES, "about.json", "lock", "finished"}
    stage_state.unlock(state)
    assert stage_state.remove_idle_state(state) and not state.exists()


def test_a_file_that_vanishes_while_sizes_are_added_does_not_count(tmp_path, monkeypatch):
    (tmp_path / "one").write_bytes(b"123")
    monkeypatch.setattr(disk.os, "walk", lambda folder: [(str(folder), [], ["one", "gone"])])
    assert disk.used(tmp_path) == 3
