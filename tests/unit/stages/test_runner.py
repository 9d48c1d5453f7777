"""What the runner of cut stages does by itself: only what is missing, and progress that adds up."""

import contextlib
import types

import pytest
import torch

from mmfm.infra import distributed
from mmfm.stages import runner
from mmfm.stages.runner import Context

UNITS = [range(0, 4), range(4, 8), range(8, 10)]


class Half(distributed.Ranks):
    """The main one of two processes, whose other one is never waited for."""

    def barrier(self):
        pass

    def from_main(self, make):
        return make()


ALONE, HALF = distributed.Ranks(0, 1, torch.device("cpu")), Half(0, 2, torch.device("cpu"))


def run(folder, ranks=ALONE, units=UNITS, bytes_written=lambda: 0):
    """Run a stage of files; return what it said of an earlier run, and the units made."""
    (folder / "state").mkdir(exist_ok=True)
    config = types.SimpleNamespace(stage="extract")
    context = Context(config, ranks, None, {}, {"result": folder / "result"}, folder / "state")
    made = []

    def marker(unit):
        return folder / "state" / f"unit-{unit.start}"

    def make(mine, advance):
        for unit in mine:
            advance(len(unit))
            marker(unit).touch()
            made.append(unit)

    def publish(finished):
        (finished / "result").write_text("done")

    work = runner.Work(units, make, is_done=lambda unit: marker(unit).exists())
    finished = runner.run_units(context, work, publish=publish, bytes_written=bytes_written)
    return finished, made


def test_a_stage_says_whether_it_was_finished_and_makes_what_is_missing(tmp_path, capsys):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "unit-4").touch()
    assert run(tmp_path) == (False, [UNITS[0], UNITS[2]])
    assert (tmp_path / "result").read_text() == "done"
    first = capsys.readouterr().err
    assert "extract: resuming at 4 of 10 images" in first and "extract: 10 images done" in first
    assert "10 of 10" not in first, "a stage that made units does not say that nothing was left to make"
    assert run(tmp_path) == (True, [])
    assert "extract: resuming at 10 of 10 images" in capsys.readouterr().err


def test_a_process_counts_the_images_of_the_others_and_no_more_than_there_are(tmp_path, monkeypatch):
    """The larger hand of two is dealt 6 of 10 images; the other is taken to be as far."""
    steps = []
    advance = runner.Progress.advance
    monkeypatch.setattr(
        runner.Progress, "advance", lambda self, images=1, note="": steps.append(images) or advance(self, images, note)
    )
    assert run(tmp_path, HALF)[1] == [UNITS[0], UNITS[2]]
    assert steps == [8, 2, 0]


def test_disk_space_is_asked_for_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="extract"):
        run(tmp_path, bytes_written=lambda: 1 << 60)
    assert not list((tmp_path / "state").glob("unit-*"))


def test_units_that_are_all_there_are_only_published(tmp_path, capsys):
    """As after a kill between the last unit and the results."""
    (tmp_path / "state").mkdir()
    for unit in UNITS:
        (tmp_path / "state" / f"unit-{unit.start}").touch()
    assert run(tmp_path) == (False, []) and (tmp_path / "result").read_text() == "done"
    assert "extract: resuming at 10 of 10 images" in capsys.readouterr().err


@pytest.mark.parametrize("rank, error, expected", [(0, False, 1), (1, False, 0), (0, True, 0), (1, True, 0)])
def test_the_main_process_lets_go_of_the_state_of_a_stage_that_came_to_its_end(
    tmp_path, monkeypatch, rank, error, expected
):
    freed = []
    monkeypatch.setattr(runner.stage_state, "unlock", freed.append)
    context = Context(None, Half(rank, 2, torch.device("cpu")), None, {}, {}, tmp_path)
    with contextlib.suppress(RuntimeError), context:
        if error:
            raise RuntimeError
    assert freed == [tmp_path] * expected
