"""State directories: whose they are, and one process at a time."""

import subprocess
import sys

import pytest

from mmfm.infra import stage_state


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
