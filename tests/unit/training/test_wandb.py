"""Weights and Biases: a stand-in for what must be asked and sent, and the real package, if there is one, offline."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmfm.infra import store
from mmfm.training import loggers
from mmfm.training.history import read_history
from support.fid_curves import distances, measured, preview, reference  # noqa: F401 (fixtures)
from support.train_runs import arguments, history, state_of

STAND_IN = """
class Error(Exception): ...
class Image:
    def __init__(self, path): self.path = path
class Run:
    disabled = False
    def __init__(self, summary): self.summary, self.lines, self.axes = summary, [], {}
    def define_metric(self, name, step_metric): self.axes[name] = step_metric
    def log(self, values): self.lines.append(values)
    def finish(self): self.lines.append("finish")
asked, started, known = [], [], {}
def login(**options):
    asked.append(options)
    return True
def init(**options):
    started.append(options)
    return Run(dict(known))
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A module with what is used of wandb; the real one is no dependency. It has a key and finds its server."""
    (tmp_path / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    yield __import__("wandb")
    del sys.modules["wandb"]


@pytest.fixture
def state(tmp_path) -> Path:
    path = tmp_path / "dinov2_mode" / "state-x"
    path.mkdir(parents=True)
    return path


def no_key(wandb, monkeypatch):
    monkeypatch.setattr(wandb, "login", lambda **_: False)


def no_network(wandb, monkeypatch):
    def fails(**_):
        raise wandb.Error("no such host")

    monkeypatch.setattr(wandb, "login", fails)


def network_lost(wandb, monkeypatch):
    start = wandb.init

    def fails(**options):
        if options["mode"] == "online":
            raise wandb.Error("timed out")
        return start(**options)

    monkeypatch.setattr(wandb, "init", fails)


@pytest.mark.parametrize("obstacle", [no_key, no_network, network_lost])
def test_it_records_offline_when_nothing_can_be_sent(wandb, state, monkeypatch, caplog, obstacle):
    obstacle(wandb, monkeypatch)
    opened = loggers.open_logger("wandb", state, [{"step": 1, "loss": 2.0}])
    (options,) = wandb.started
    assert options["mode"] == "offline" and "resume" not in options and "wandb records offline" in caplog.text
    opened.close()
    assert opened._run.lines == [{"train/step": 1, "train/loss": 2.0}, "finish"]


def test_it_asks_nobody_for_a_key(wandb, state):
    loggers.open_logger("wandb", state, [])
    assert wandb.asked == [{"prompt": False, "verify": True}]


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_a_mode_that_is_wished_is_taken(wandb, state, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    loggers.open_logger("wandb", state, [])
    assert wandb.asked == [] and "mode" not in wandb.started[0]


def test_the_project_may_be_chosen(wandb, state, monkeypatch):
    loggers.open_logger("wandb", state, [])
    monkeypatch.setenv("WANDB_PROJECT", "flowers")
    loggers.open_logger("wandb", state, [])
    assert [options["project"] for options in wandb.started] == ["mmfm", "flowers"]
    assert wandb.started[0]["name"] == "dinov2_mode"


def test_a_resumed_run_is_the_same_and_one_that_is_begun_anew_another(wandb, state):
    for _ in range(2):
        loggers.open_logger("wandb", state, [])
    for path in sorted(state.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    loggers.open_logger("wandb", state, [])
    first, resumed, anew = (options["id"] for options in wandb.started)
    assert first == resumed != anew
    assert all(options["resume"] == "allow" for options in wandb.started)


def test_a_late_distance_is_sent_and_nothing_twice(wandb, state):
    """Killed at step 4 while step 4 was measured: the server has lines up to 4."""
    wandb.known.update({"train/step": 4, "train/loss": 0.5, "preview/fid/step": 2, "_step": 3})
    opened = loggers.open_logger("wandb", state, [{"step": s, "loss": 1 / s} for s in (2, 4)])
    opened.write({"step": 4, "preview/fid": 7.0})
    opened.write({"step": 4, "preview/images": state / "preview-00000004.png"})
    opened.write({"step": 6, "loss": 0.25})
    distance, picture, line = opened._run.lines
    assert distance == {"preview/fid/step": 4, "preview/fid": 7.0} and line == {"train/step": 6, "train/loss": 0.25}
    assert picture["preview/images/step"] == 4 and picture["preview/images"].path.endswith("preview-00000004.png")
    assert opened._run.axes == {
        "train/*": "train/step", "preview/fid": "preview/fid/step", "preview/images": "preview/images/step",
    }  # fmt: skip


def test_a_recording_takes_the_place_of_the_earlier_ones(wandb, state, monkeypatch):
    old = state / "wandb" / "offline-run-20260101_000000-x"
    old.mkdir(parents=True)
    monkeypatch.setattr(wandb.Run, "disabled", True)
    loggers.open_logger("wandb", state, [])
    assert old.exists()
    monkeypatch.setattr(wandb.Run, "disabled", False)
    loggers.open_logger("wandb", state, [])
    assert not old.exists() and (state / "wandb" / "id").exists()


def test_one_that_is_not_installed_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install 'wandb"):
        loggers.open_logger("wandb", tmp_path, [])


def recorded(path: Path) -> tuple[list[str], list[dict]]:
    """Return the run ids and the lines of a recording: a log of LevelDB's format, each record a protocol buffer."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    content, at, whole, ids, lines = path.read_bytes(), 7, b"", [], []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole, at = whole + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, whole = pb.Record.FromString(whole), b""
            if record.HasField("run"):
                ids.append(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                lines.append({".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return ids, lines


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{"WANDB_API_KEY": "nonsense"}, {"WANDB_MODE": "offline"}], ids=["unset", "set"])
def test_the_real_one_without_a_network_killed_and_resumed(measured, tmp_path, variables):
    pytest.importorskip("wandb", minversion="0.31")
    keys = {"epochs": 6, "decay_end_epoch": 6, "checkpoint_every": 7, "logger": "wandb"}
    keys |= {"preview": preview(every=5, fid_every=3)}
    command = [sys.executable, "-m", "mmfm.cli", "train", *arguments(measured, tmp_path / "out", "mode", **keys)]
    others = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = {**others, **variables, "CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)}
    # A terminal, on which it could ask for a key and wait for ever.
    terminal, end = os.openpty()
    process = subprocess.Popen(command, env=environment, stdin=end, stdout=end, stderr=subprocess.DEVNULL)
    # Beyond a checkpoint, so that steps with lines are taken again.
    while process.poll() is None and not any(len(read_history(p)) > 2 for p in tmp_path.glob("out/state-*/fid.jsonl")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    state = state_of(tmp_path / "out")
    begun = (state / "wandb" / "id").read_text()
    finished = subprocess.run(command, env=environment, stdin=end, stdout=end, stderr=subprocess.PIPE, timeout=300)
    os.close(terminal)
    os.close(end)
    assert finished.returncode == 0, finished.stderr.decode()
    (recording,) = state.glob("wandb/offline-run-*/*.wandb")
    ids, lines = recorded(recording)
    assert set(ids) == {begun}
    for name in ("loss", "grad_norm", "images_per_second"):
        found = [(line["train/step"], line[f"train/{name}"]) for line in lines if "train/step" in line]
        assert found == history(tmp_path / "out", "step", name)
    found = [(line["preview/fid/step"], line["preview/fid"]) for line in lines if "preview/fid" in line]
    assert sorted(found) == distances(tmp_path / "out")
    pictures = {line["preview/images/step"]: line for line in lines if "preview/images/step" in line}
    assert sorted(pictures) == [5, 10, 15, 20, 25]
    for step, line in pictures.items():
        copy = recording.parent / "files" / line["preview/images.path"]
        assert copy.read_bytes() and store.file_digest(copy) == line["preview/images.sha256"], step


@pytest.mark.slow
def test_training_goes_on_when_the_real_one_loses_its_process(measured, tmp_path, monkeypatch):
    pytest.importorskip("wandb", minversion="0.31")
    psutil = pytest.importorskip("psutil")
    keys = {"epochs": 400, "decay_end_epoch": 400, "checkpoint_every": 5, "logger": "wandb"}
    command = [sys.executable, "-m", "mmfm.cli", "train", *arguments(measured, tmp_path / "out", "mode", **keys)]
    environment = {**os.environ, "WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("out/state-*/step-*")):
        time.sleep(0.01)
    for child in psutil.Process(process.pid).children():
        child.kill()
    logged = len(read_history(state_of(tmp_path / "out") / "history.jsonl"))
    while process.poll() is None and len(read_history(state_of(tmp_path / "out") / "history.jsonl")) < logged + 20:
        time.sleep(0.01)
    process.terminate()
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and errors.count("training goes on without it") == 1, errors
