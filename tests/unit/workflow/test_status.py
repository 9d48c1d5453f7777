"""`mmfm status`: what the files of a results folder say."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmfm.cli.__main__ import main
from mmfm.config.registry import STAGES
from mmfm.infra import heartbeat, store
from mmfm.infra.heartbeat import FILE, SILENCE, Heartbeat
from mmfm.workflow import status
from mmfm.workflow.outputs import OUTPUTS, job_name
from support import processes
from support.places import ROOT
from support.train_runs import arguments

NAME = "dinov2_mode.seed0.tiny.k4"


def beat(results, folder, written, state="state-a", output="ema.safetensors", **changes):
    """Write a heartbeat of another machine."""
    place = results / folder / state
    place.mkdir(parents=True, exist_ok=True)
    Heartbeat(place, changes.pop("stage", folder.split("/")[0]), output)._write()
    values = {"machine": "another", "host": "node7", "written": written, "advanced": written, **changes}
    store.write_json(place / FILE, dataclasses.asdict(dataclasses.replace(heartbeat.read(place / FILE), **values)))
    return place


def log(results, stem, text, modified, finished=None):
    path = results / "logs" / f"{stem}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (modified, modified))
    if finished is not None:
        benchmark = results / "benchmarks" / f"{stem}.tsv"
        benchmark.parent.mkdir(exist_ok=True)
        benchmark.touch()
        os.utime(benchmark, (finished, finished))


def told(results, capsys):
    assert main(["status", str(results)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_a_training_is_seen_running_killed_and_finished(tiny_pipeline, tmp_path, capsys):
    """In a process of its own, killed by SIGKILL, and taken up again."""
    results = tmp_path / "results"
    out, errors = results / "train" / "dinov2_mode" / "seed0.tiny.k4", results / "logs" / f"train.{NAME}.log"
    errors.parent.mkdir(parents=True)
    out.mkdir(parents=True)
    line = ["train", *arguments(tiny_pipeline, out, "mode", checkpoint_every=2)]
    often, rest = {"mmfm.infra.heartbeat.EVERY": 0.02}, processes.Watch(out, rest_at="/step-")
    command = processes.start(line, errors, watch=rest, constants=often)
    end, job = time.monotonic() + 600, None
    while job is None or not (job.count and job.count.done >= 3 and job.saved):
        assert time.monotonic() < end and command.processes[0].exitcode is None, errors.read_text()
        time.sleep(0.01)
        job = next(iter(status.read(results, time.time()).jobs), None)
    assert (job.condition, job.rule, job.name) == ("running", "train", NAME)
    assert (job.count.task, job.count.total, job.count.unit) == ("train", 15, "steps")
    assert re.fullmatch(r"step \d+", job.saved) and job.heard < 20 and job.count.left > 0
    assert "loss" in job.count.note and "1 running" in told(results, capsys)

    command.kill(signal.SIGKILL)
    command.wait()
    (job,) = status.read(results, time.time()).jobs
    newest = max(int(path.name[5:]) for path in out.glob("state-*/step-*"))
    assert (job.condition, job.saved, job.reason) == ("stopped", f"step {newest}", "killed")
    text = told(results, capsys)
    assert f"resumes after step {newest}" in text and "last heard of" in text and "running" not in text

    processes.run(line, errors, constants=often)
    found = status.read(results, time.time())
    assert (found.jobs, found.finished) == ([], {"train": 1})
    assert not [*out.glob(f"state-*/*{FILE}*")]


def test_a_failure_is_told_with_its_reason(tiny_pipeline, tmp_path, capsys):
    results, broken = tmp_path / "results", tmp_path / "decoder.safetensors"
    out = results / "train" / "dinov2_mode" / "seed0.tiny.k4"
    out.mkdir(parents=True)
    broken.write_bytes(b"no decoder")
    line = ["train", *arguments(tiny_pipeline, out, "mode"), "--decoder", str(broken)]
    assert processes.start(line, tmp_path / "errors").wait() == 2
    (job,) = status.read(results, time.time()).jobs
    assert (job.condition, job.name) == ("failed", NAME) and str(broken) in job.reason
    assert f"    {job.reason}\n" in told(results, capsys)
    assert job.reason in (tmp_path / "errors").read_text()


def test_on_another_machine_silence_counts(tmp_path, capsys, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    place = beat(tmp_path, "train/dinov2_mode/seed0.tiny.k4", now - 200, task="train", total=9, slurm_job="4711")
    (place / "step-00000004").mkdir()
    text = told(tmp_path, capsys)
    assert "1 running" in text and "node7 (SLURM job 4711)" in text
    assert "3.3 min ago" in text and "after 5.0 min it counts as stopped" in text
    (job,) = status.read(tmp_path, now + SILENCE).jobs
    assert (job.condition, job.saved, job.heard) == ("stopped", "step 4", pytest.approx(SILENCE + 200, abs=1))


def test_alive_without_progress_is_said(tmp_path, capsys):
    now = time.time()
    beat(tmp_path, "train/dinov2_mode/seed0.tiny.k4", now, advanced=now - 1200, task="train")
    assert "alive, but no progress for 20.0 min" in told(tmp_path, capsys)


def test_what_another_finished_is_not_shown(tmp_path):
    now = time.time()
    beat(tmp_path, "train/dinov2_mode/seed0.tiny.k4", now - 9000, output="ema.safetensors")
    output = tmp_path / "train/dinov2_mode/seed0.tiny.k4/ema.safetensors"
    output.touch()
    found = status.read(tmp_path, now)
    assert (found.jobs, found.finished) == ([], {"train": 1})
    os.utime(output, (now - 9999, now - 9999))  # an earlier budget's, say
    assert [job.condition for job in status.read(tmp_path, now).jobs] == ["stopped"]


def test_of_two_states_the_newer_counts(tmp_path):
    now, folder = time.time(), "train/dinov2_mode/seed0.tiny.k4"
    beat(tmp_path, folder, now - 9000, "state-a", task="train", done=1)
    beat(tmp_path, folder, now - 8000, "state-b", task="train", done=2)
    (job,) = status.read(tmp_path, now).jobs
    assert (job.condition, job.count.done) == ("stopped", 2)
    beat(tmp_path, folder, now - 9, "state-a", task="train", done=1)
    (job,) = status.read(tmp_path, now).jobs
    assert (job.condition, job.count.done) == ("running", 1)


def test_the_log_says_why_a_dead_stage_died(tmp_path, capsys):
    now = time.time()
    beat(tmp_path, "train/dinov2_mode/seed0.tiny.k4", now - 400, task="train")
    log(tmp_path, f"train.{NAME}", "train: 1/9 steps\ntorch.OutOfMemoryError: CUDA out of memory\n", now - 390)
    text = told(tmp_path, capsys)
    assert "1 failed" in text and "torch.OutOfMemoryError: CUDA out of memory" in text and f"train.{NAME}.log" in text


def test_a_run_that_has_not_come_to_its_state_runs(tmp_path):
    now = time.time()
    for outcome in ("", "failed"):
        beat(tmp_path, "train/dinov2_mode/seed0.tiny.k4", now - 4000, outcome=outcome, reason="no")
        log(tmp_path, f"train.{NAME}", "reading\n", now - 20)
        assert [job.condition for job in status.read(tmp_path, now).jobs] == ["running"]
        log(tmp_path, f"train.{NAME}", "train: 1/9 steps\n", now - 3999)
        assert [job.condition for job in status.read(tmp_path, now).jobs] == [outcome or "stopped"]


def test_jobs_without_state_are_known_from_their_logs(tmp_path):
    now = time.time()
    line = "fid: 1,200/50,000 images (2 %)  31.5/s  left 25:49"
    log(tmp_path, "fid.dinov2_mode.seed0.tiny.k4.t25", f"{line}\n", now - 3)
    log(tmp_path, "latent_stats.dinov2", "latent_stats: error: no 'x'; make it (see docs/stages.md)\n", now - 99)
    log(tmp_path, "fetch_detector", "fetch: 3/9 MiB (33 %)  1.0/s  left 00:06  half\n", now - 4000)
    log(tmp_path, "list_images", "", now - 5, finished=now - 5)
    log(tmp_path, "milestone.dinov2_mode.seed0.tiny.k4.step4", "", now - 5, finished=now - 50)  # of an earlier run
    found = {job.rule: job for job in status.read(tmp_path, now).jobs}
    assert {rule: job.condition for rule, job in found.items()} == {
        "fid": "running", "milestone": "running", "fetch_detector": "stopped", "latent_stats": "failed",
    }  # fmt: skip
    count = found["fid"].count
    assert (count.done, count.total, count.unit, count.rate) == (1200, 50000, "images", 31.5)
    assert found["latent_stats"].reason == "no 'x'; make it (see docs/stages.md)"
    assert found["fetch_detector"].count.note == "half"


def test_a_finished_stage_needs_no_benchmark(tmp_path):
    log(tmp_path, "fit_gmm.dinov2.k4", "fit_gmm: done\n", 1)
    assert status.read(tmp_path, 10.0).jobs
    (tmp_path / "gmm/dinov2/k4").mkdir(parents=True)
    (tmp_path / "gmm/dinov2/k4/gmm.safetensors").touch()
    found = status.read(tmp_path, 10.0)
    assert (found.jobs, found.finished) == ([], {"fit_gmm": 1})


def test_distances_have_their_short_names(tmp_path, capsys):
    for name, distance in (("dinov2_mode.seed0.tiny.k4.t25", 3.5), ("dinov2_mode", 3.5), ("dinov2_gmm", 12.25)):
        store.write_json(tmp_path / "fid" / f"{name}.json", {"frechet_distance": distance, "measure": "FID"})
        (tmp_path / "fid" / f"{name}.txt").touch()
    (tmp_path / "fid" / "notes.txt").touch()
    (tmp_path / "fid" / "other.txt").touch()
    (tmp_path / "fid" / "other.json").write_text("[]")
    assert [name for name, *_ in status.read(tmp_path, 0.0).distances] == ["dinov2_gmm", "dinov2_mode"]
    assert "  dinov2_gmm   12.25  FID\n  dinov2_mode    3.5  FID\n" in told(tmp_path, capsys)


def test_runs_are_shown_apart(tmp_path, capsys):
    now = time.time()
    beat(tmp_path, "train/dinov2_mode/seed0.tiny.k4", now)
    beat(tmp_path / "flowers", "train/dinov2_gmm/seed0.tiny.k4", now)
    (tmp_path / "flowers" / "logs").mkdir()
    own, run = told(tmp_path, capsys).split("\n\n" + str(tmp_path / "flowers"))
    assert "dinov2_mode" in own and "dinov2_gmm" not in own and "dinov2_gmm" in run


def test_damaged_heartbeats_are_named(tmp_path, capsys):
    place = beat(tmp_path, "train/dinov2_mode/seed0.tiny.k4", time.time())
    (place / FILE).write_text('{"stage": "tra')
    (tmp_path / "train/state-file").touch()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "odd.log").write_bytes(b"\xff\x00\r")
    text = told(tmp_path, capsys)
    assert f"ignored: '{place / FILE}' is not a heartbeat of a stage" in text and "Traceback" not in text


def test_empty_and_missing_folders_are_one_line(tmp_path, capsys):
    assert told(tmp_path, capsys) == f"{tmp_path}: nothing is finished, and nothing runs\n"
    assert main(["status", str(tmp_path / "absent")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no folder" in error and "give the folder of the results" in error


def test_nothing_is_written_and_nothing_heavy_imported(tmp_path):
    now = time.time()
    beat(tmp_path, "train/dinov2_mode/seed0.tiny.k4", now - 4000)
    log(tmp_path, f"train.{NAME}", "RuntimeError: no\n", now)
    before = {path: path.stat() for path in tmp_path.rglob("*")}
    script = (
        "import sys; from mmfm.cli.__main__ import main; main(['status', sys.argv[1]]); "
        "print(sorted({'torch', 'numpy', 'faiss', 'omegaconf', 'snakemake'} & set(sys.modules)))"
    )
    line = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    assert result.stdout.endswith("[]\n"), result.stdout + result.stderr
    after = {path: path.stat() for path in tmp_path.rglob("*")}
    assert {p: s.st_mtime_ns for p, s in before.items()} == {p: s.st_mtime_ns for p, s in after.items()}


def test_watching_ends_with_ctrl_c(tmp_path):
    line = [sys.executable, "-m", "mmfm.cli", "status", "--watch", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert re.fullmatch(r"\d\d:\d\d:\d\d\n", process.stdout.readline())
    assert "nothing runs" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")


def test_logs_are_named_as_outputs():
    """The names by which logs are found for heartbeats are those of the rules."""
    rules = "\n".join(path.read_text() for path in sorted((ROOT / "rules").glob("*.smk")))
    assert set(OUTPUTS) == set(STAGES)
    names = {"trained": "{encoder}_{setting}", "sampled": "{encoder}_{setting}{ag}"}
    variant = {"variant": "{training}{step}.t{t}{g}"}
    for stage in sorted(set(STAGES) - {"fid_reference"}):
        found = re.findall(r"{(\w+)}", OUTPUTS[stage])
        output = Path(OUTPUTS[stage].format(**{name: {**names, **variant}.get(name, f"{{{name}}}") for name in found}))
        assert f'"<results>/{output}"' in rules
        assert f'"<logs>/{job_name(stage, output, Path())}.log"' in rules


def test_given_weights_and_copies_are_no_finished_stages(tmp_path):
    for folder in ("given", "given.step4", "given.guide", "seed0.tiny.step4", "seed0.tiny", "seed0.tiny.guide"):
        (tmp_path / "train" / "dinov2_mode" / folder).mkdir(parents=True)
        (tmp_path / "train" / "dinov2_mode" / folder / "ema.safetensors").touch()
    (tmp_path / "decoder" / "dinov2").mkdir(parents=True)
    (tmp_path / "decoder" / "dinov2" / "decoder.safetensors").touch()
    assert status.read(tmp_path, 0.0).finished == {"train": 2}


def test_what_is_no_stage_counts_as_well(tmp_path, capsys):
    """A held-out likelihood, for one; of a result under two names the complete one."""
    made = ("gmm/dinov2/k4/heldout.json", "gmm/dinov2/heldout.json", "curve/dinov2_mode.t2,3.json")
    for name in (*made, "memorisation/dinov2_mode.json", "memorisation/dinov2_mode.seed0.tiny.k4.t2.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert status.read(tmp_path, 0.0).finished == {"heldout": 2, "memorisation": 1, "curve": 1}
    assert main(["status", str(tmp_path)]) == 0
    assert "finished stages: heldout 2, memorisation, curve" in capsys.readouterr().out


def test_what_vanishes_while_it_is_read_is_no_error(tmp_path):
    gone = tmp_path / "gone.log"
    assert (status._saved(gone), status._last_line(gone), status.Failure("train", gone).error()) == ("", None, None)
