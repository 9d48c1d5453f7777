"""Heartbeats: written while a stage runs, never in its way, gone when it is finished."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmfm.infra import heartbeat
from mmfm.infra.heartbeat import FAILED, FILE, SILENCE, STOPPED, Heartbeat, read
from mmfm.infra.progress import Progress


def until(condition):
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY", 0.01)


def test_it_says_what_is_counted_without_being_told(tmp_path, monkeypatch, often):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    beats = Heartbeat(tmp_path, "train", "ema.safetensors")
    beats.start()
    first = read(tmp_path / FILE)
    assert (first.stage, first.output, first.task, first.slurm_job) == ("train", "ema.safetensors", "", "4711")
    assert (first.host, first.pid) == (socket.gethostname(), os.getpid())
    with Progress("outer", 10, "steps", done=4) as outer:
        outer.advance(2, "loss 1")
        until(lambda: read(tmp_path / FILE).done == 6)
        beat = read(tmp_path / FILE)
        assert (beat.task, beat.total, beat.unit, beat.note) == ("outer", 10, "steps", "loss 1")
        assert beat.left() == pytest.approx(4 / beat.rate)
        with Progress("inner", 5, "images"):
            until(lambda: read(tmp_path / FILE).task == "inner")
            until(lambda: read(tmp_path / FILE).written > beat.written)
        until(lambda: read(tmp_path / FILE).task == "outer")
    beats.end(None)
    assert list(tmp_path.iterdir()) == []


def test_it_says_since_when_nothing_advances(tmp_path, often):
    beats = Heartbeat(tmp_path, "train", "out")
    beats.start()
    with Progress("train", 10, "steps") as progress:
        progress.advance(1)
        until(lambda: read(tmp_path / FILE).done == 1)
        until(lambda: read(tmp_path / FILE).written > read(tmp_path / FILE).advanced + 0.2)
        progress.advance(1)
        until(lambda: read(tmp_path / FILE).done == 2)
        beat = read(tmp_path / FILE)
        assert beat.advanced > beat.started
    beats.end(None)


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (ValueError("out of\n  memory"), FAILED, "out of memory"),
        (RuntimeError("no"), FAILED, "RuntimeError: no"),
        (PermissionError(13, "Permission denied", "/x"), FAILED, "results can't be written there"),
        (KeyboardInterrupt(), STOPPED, ""),
    ],
)
def test_an_error_stays(tmp_path, error, outcome, reason):
    beats = Heartbeat(tmp_path, "train", "out")
    beats.start()
    with pytest.raises(type(error)), Progress("train", 10, "steps") as progress:
        progress.advance(3)
        beats._write()
        raise error
    beats.end(error)
    beat = read(tmp_path / FILE)
    assert (beat.outcome, beat.done) == (outcome, 3) and reason in beat.reason
    assert not beat.is_alive(beat.written)


def test_a_full_disk_does_not_disturb_the_stage(tmp_path, monkeypatch, often):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    beats = Heartbeat(tmp_path, "train", "out")
    beats.start()
    before, thread = (tmp_path / FILE).read_text(), beats._thread
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        time.sleep(0.1)
    assert thread.is_alive() and read(tmp_path / FILE).written >= json.loads(before)["written"]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        beats.end(ValueError("the disk is full"))
    assert not (tmp_path / heartbeat._PARTIAL).exists()


def test_a_process_of_this_machine_is_asked_for(tmp_path):
    script = (
        "from pathlib import Path; from mmfm.infra.heartbeat import Heartbeat; import sys; "
        f"Heartbeat(Path({str(tmp_path)!r}), 'train', 'out').start(); print('on', flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"on\n"
    beat = read(tmp_path / FILE)
    assert beat.is_alive(beat.written) and beat.is_alive(beat.written + 2 * SILENCE)
    other.kill()
    until(lambda: not beat.is_alive(beat.written))  # even before its parent has taken note
    other.wait()
    assert not beat.is_alive(beat.written)
    reused = dataclasses.replace(beat, pid=os.getpid())
    assert not reused.is_alive(beat.written)


def test_elsewhere_silence_counts(tmp_path, monkeypatch):
    Heartbeat(tmp_path, "train", "out")._write()
    beat = dataclasses.replace(read(tmp_path / FILE), machine="another", pid=2**22 + 1)
    assert beat.is_alive(beat.written + SILENCE - 1) and not beat.is_alive(beat.written + SILENCE + 1)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", b"\xff\xfe", '{"stage": 1}'])
def test_what_is_no_heartbeat_is_named(tmp_path, content):
    path = tmp_path / FILE
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"progress\.json' is not a heartbeat"):
        read(path)


def test_a_value_of_another_kind_is_named(tmp_path):
    Heartbeat(tmp_path, "train", "out")._write()
    path = tmp_path / FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "done": "many"}))
    with pytest.raises(ValueError, match="'done' is 'many'"):
        read(path)
