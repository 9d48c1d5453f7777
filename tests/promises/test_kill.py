"""Killed at any instant, the same command goes on where it was and ends with the same bits."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from support import processes
from support.places import DETECTOR
from support.processes import Watch, site_folder
from support.stage_commands import Stage, digests, errors_file

RESUMABLE = (
    "extract", "fit_gmm", "spatial_gmm", "train_decoder", "train", "sample", "fid_reference", "reconstruction",
)  # fmt: skip


def wait_for_units(stage: Stage, out: Path, more_than: set[str], is_over) -> set[str]:
    """Wait until a running command has finished a unit besides ``more_than``; return all units."""
    deadline = time.monotonic() + 600
    while not (units := set(stage.finished_units(out))) - more_than:
        assert time.monotonic() < deadline and not is_over(), out.with_name(f"{out.name}.errors").read_text()
        time.sleep(0.002)
    return units


def stop_after_a_unit(stage: Stage, out: Path, number: int, more_than: set[str] = frozenset()) -> int:
    """Run the command, send its process group a signal after its next unit, and return its exit status.

    The command rests after that unit, so that the signal comes before the last one.
    """
    watch = Watch(out, rest_at=f"/{stage.units}")
    command = stage.start(out, watch=watch)
    wait_for_units(stage, out, more_than, lambda: command.processes[0].exitcode is not None)
    command.kill(number)
    watch.go()
    status = command.wait()
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        os.killpg(command.group, 0)
    return status


def resume(stage: Stage, out: Path) -> None:
    """Run the command to its end: it makes what is missing, nothing else, and ends as an undisturbed run does."""
    before, watch = stage.finished_units(out), Watch(out)
    text = stage.run(out, watch=watch)
    made, everything = stage.units_made(watch), stage.units_made(Watch(stage.made))
    assert before and "resuming" in text
    assert not set(made) & set(before)
    assert made == [unit for unit in everything if unit > max(before)]
    left = stage.finished_units(out)
    assert all(left[unit] == before[unit] for unit in set(left) & set(before))
    assert digests(out) == digests(stage.made)


@pytest.mark.parametrize("name", RESUMABLE)
def test_kill_9_twice_in_a_row(stages, tmp_path, name):
    stage, out = stages[name], tmp_path / "out"
    assert stop_after_a_unit(stage, out, signal.SIGKILL) == -signal.SIGKILL
    once = stage.finished_units(out)
    assert stop_after_a_unit(stage, out, signal.SIGKILL, more_than=set(once)) == -signal.SIGKILL
    assert not digests(out)
    resume(stage, out)


@pytest.mark.parametrize(
    ("name", "number"),
    [(name, signal.SIGINT) for name in RESUMABLE] + [(name, signal.SIGTERM) for name in ("extract", "train")],
)
def test_a_request_to_stop_loses_nothing(stages, tmp_path, name, number):
    stage, out = stages[name], tmp_path / "out"
    status, errors = stop_after_a_unit(stage, out, number), (tmp_path / "out.errors").read_text()
    if number == signal.SIGINT or name.startswith("train"):
        assert status == 130 and "run the same command to resume" in errors
    else:
        assert status == -signal.SIGTERM
    if name.startswith("train"):  # the next checkpoint may be far, so one is made at once
        step = int(re.search(r"asked to stop: step (\d+) is saved", errors)[1])
        assert f"step-{step:08d}" in stage.finished_units(out)
    assert not digests(out)
    stage.run(out)
    assert digests(out) == digests(stage.made)


@pytest.mark.parametrize("name", RESUMABLE)
def test_killed_between_the_last_unit_and_the_end(stages, tmp_path, name):
    """One kill after another, each at a later instant, until the command comes through; then runs of what is done."""
    stage, out = stages[name], tmp_path / "out"
    events = Watch(stage.made).events()
    last_unit = max(i for i, words in enumerate(events) if Path(words[-1]).name.startswith(stage.units))
    after = next(i for i in range(last_unit, -1, -1) if events[i][0] == "os.rename") + 2
    status, kill_at, made = -signal.SIGKILL, after, []
    while status == -signal.SIGKILL:
        watch = Watch(out, kill_at=kill_at)
        status = stage.start(out, watch=watch).wait()
        made += stage.units_made(watch)
        kill_at = 1 if kill_at == after and len(made) else kill_at + 1 + kill_at // 4
    assert status == 0, (tmp_path / "out.errors").read_text()
    assert made == stage.units_made(Watch(stage.made))
    assert digests(out) == digests(stage.made)
    watch = Watch(out)
    for path in (out, *out.iterdir()):
        if path.name.startswith("state-") or path == out:
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()  # as Snakemake does before it runs a rule again
    stage.run(out, watch=watch)
    assert not stage.units_made(watch) and digests(out) == digests(stage.made)


def test_features_added_to_finished_images_cost_no_image(stages, tmp_path):
    """Killed at every instant of the publication, the images are never made again, nor is anything half there."""
    stage = stages["sample"]
    features = replace(stage, inputs={**stage.inputs, "--detector": "fashion", "--detector-weights": DETECTOR})
    asked = {"sample": {"features": True}}

    def copied(name):
        return Path(shutil.copytree(stage.made, tmp_path / name))

    watch = Watch(copied("whole"))
    features.run(watch.folder, watch=watch, **asked)
    expected, events = digests(watch.folder), watch.events()
    assert digests(stage.made).items() < expected.items()
    instants = [n for n, words in enumerate(events, 1) if any("finished" in word for word in words)]
    assert len(instants) > 5
    for kill_at in instants:
        watch = Watch(copied(str(kill_at)), kill_at=kill_at)
        command = processes.start(features.command(watch.folder, **asked), errors_file(watch.folder), watch=watch)
        assert command.wait() == -signal.SIGKILL
        for name in ("images.npz", "samples.json"):
            (watch.folder / name).unlink(missing_ok=True)
        assert "images done" not in features.run(watch.folder, **asked)
        assert digests(watch.folder) == expected
        shutil.rmtree(watch.folder)


@pytest.mark.parametrize("name", ["latent_stats", "fid", "mode_quality"])
def test_stages_without_units_leave_whole_files_or_none(stages, tmp_path, name):
    stage = stages[name]
    expected = {path.name: path.read_bytes() for path in stage.made.iterdir()}
    for kill_at in range(1, len(Watch(stage.made).events()) + 2):
        out = tmp_path / str(kill_at)
        status = stage.start(out, watch=Watch(out, kill_at=kill_at)).wait()
        found = {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}
        assert found.items() <= expected.items()
        assert status == -signal.SIGKILL or (status == 0 and found.keys() == expected.keys())
        stage.run(out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == expected


@pytest.mark.parametrize(
    ("name", "processes", "number", "everyone"),
    [
        ("extract", 2, signal.SIGKILL, False), ("train", 2, signal.SIGTERM, False), ("train", 2, signal.SIGTERM, True),
        ("train", 2, signal.SIGUSR1, True), ("sample", 1, signal.SIGINT, False),
    ],
)  # fmt: skip
def test_the_launcher_and_all_its_processes_end(stages, tmp_path, name, processes, number, everyone):
    """As from a terminal, or from SLURM, which signals everyone; torchrun's processes are in groups of their own."""
    stage, out = stages[name], tmp_path / "out"
    watch, errors = Watch(out, rest_at=f"/{stage.units}"), errors_file(out)
    path = os.pathsep.join([str(site_folder(tmp_path / "site")), os.environ.get("PYTHONPATH", "")])
    watch.clear()
    launcher = [sys.executable, "-m", "mmfm.infra.launch", "--processes", str(processes), "--threads", str(processes)]
    with open(errors, "w") as file:
        command = subprocess.Popen(
            [*launcher, "--", *stage.command(out)], env={**os.environ, **watch.environment, "PYTHONPATH": path},
            stdout=file, stderr=file, start_new_session=True,
            # A shell that runs the tests in the background ignores SIGINT, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    wait_for_units(stage, out, set(), lambda: command.poll() is not None)
    family = [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]
    assert len(family) >= processes
    if everyone:
        for process in family:
            process.send_signal(number)
    else:
        os.killpg(command.pid, number)
    watch.go()
    assert command.wait(timeout=600) not in (0, None), errors.read_text()
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not alive, errors.read_text()
    before, watch = stage.finished_units(out), Watch(out)
    assert before and not digests(out)
    if name == "train":
        assert "is saved" in errors.read_text()
    stage.run(out, watch=watch)
    assert not set(stage.units_made(watch)) & set(before)
    if name != "train":  # a gradient summed by two processes is rounded otherwise
        assert digests(out) == digests(stage.made)
