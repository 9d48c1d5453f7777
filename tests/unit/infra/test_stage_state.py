"""State directories: whose they are, and one process at a time."""

import subprocess
import sys

import pytest

from mmfm.infra import disk, heartbeat, stage_state


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
