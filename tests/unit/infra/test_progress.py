"""Progress lines of a log."""

import pytest

from mmfm.infra.progress import Progress, duration


def test_lines_show_rate_and_time_left(capsys):
    with Progress("stage", 100, "images", every=0) as progress:
        progress.advance(25, "loss 0.5")
        progress.advance(75)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("stage: 25/100 images (25 %)") and "/s  left " in lines[0] and "loss 0.5" in lines[0]
    assert lines[-1].startswith("stage: 100 images done in ")
    assert len(lines) == 3


def test_resumption_is_said(capsys):
    Progress("stage", 10, "steps", done=4)
    assert "resuming at 4 of 10 steps" in capsys.readouterr().err


def test_other_processes_are_silent(capsys):
    with Progress("stage", 2, "steps", enabled=False, every=0) as progress:
        progress.advance(2)
    assert capsys.readouterr().err == ""


def test_no_success_after_an_error(capsys):
    with pytest.raises(RuntimeError), Progress("stage", 2, "steps", every=99):
        raise RuntimeError
    assert "done" not in capsys.readouterr().err


def test_duration():
    assert (duration(61), duration(3661)) == ("01:01", "1:01:01")
