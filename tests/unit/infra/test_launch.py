"""The launcher: threads, processes, GPUs that two jobs never share."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mmfm.infra import launch


def test_one_process_is_the_module_itself():
    line = launch.command(["extract", "--x"], processes=1)
    assert line[1:] == ["-m", "mmfm.cli", "extract", "--x"]
    assert "torch.distributed.run" in launch.command(["extract"], processes=2)


def test_processes_meet_on_a_machine_whose_full_name_leads_nowhere(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import socket\nsocket.getfqdn = lambda *_: 'nowhere.invalid'\n")
    (tmp_path / "stage.py").write_text("import os\nprint('at', os.environ['MASTER_ADDR'])\n")
    line, stage = launch.command(["stage"], processes=2), ["-m", "mmfm.cli", "stage"]
    assert line[-3:] == stage
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*line[:-3], str(tmp_path / "stage.py")], capture_output=True, text=True, timeout=600, env=variables
    )
    assert (done.returncode, done.stdout.splitlines()) == (0, ["at 127.0.0.1"] * 2), done.stderr


def test_torchrun_waits_for_a_large_checkpoint(monkeypatch):
    from torch.distributed.launcher.api import LaunchConfig

    name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    monkeypatch.setenv(name, launch.environment(threads=2, processes=2)[name])
    assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2).shutdown_timeout == 600


def test_threads_are_shared_among_processes():
    variables = launch.environment(threads=8, processes=3)
    assert {variables[n] for n in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")} == {"2"}
    assert variables["HF_HUB_OFFLINE"] == "1"


def test_segments_of_gpu_memory_may_grow_unless_the_user_says_otherwise(monkeypatch):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert launch.environment(8, 2, gpus=2)["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert not set(names) & set(launch.environment(8, 2))
    for name in names:
        with monkeypatch.context() as patch:
            patch.setenv(name, "backend:native")
            found = launch.environment(8, 2, gpus=2)
            assert {n: found[n] for n in names if n in found} == {name: "backend:native"}


@pytest.mark.parametrize(("declared", "expected"), [("0,1", ["0", "1"]), ("", []), ("-1", []), ("GPU-a", ["GPU-a"])])
def test_visible_gpus(monkeypatch, declared, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", declared)
    assert launch.visible_gpus() == expected


def test_two_jobs_never_hold_the_same_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setattr(launch, "_LOCK_FOLDER", tmp_path / "locks")
    first, locks = launch.hold_gpus(2)
    second, more = launch.hold_gpus(1)
    assert sorted(first + second) == ["0", "1", "2"]
    with pytest.raises(ValueError, match="only 0 of 3 are free"):
        launch.hold_gpus(1)
    for lock in locks + more:
        lock.close()
    assert launch.hold_gpus(3)[0] == ["0", "1", "2"]


def test_a_container_without_nvidia_smi_has_the_gpus_of_its_device_files(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(launch, "_DEVICES", tmp_path)
    assert launch.visible_gpus() == ["0", "1", "10"]
    monkeypatch.setattr(launch, "_DEVICES", tmp_path / "none")
    assert launch.visible_gpus() == []


def test_jobs_that_both_see_a_gpu_0_share_it_only_if_it_is_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(launch, "_LOCK_FOLDER", tmp_path / "locks")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def have(uuid):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '0, {uuid}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    have("GPU-a")
    first, locks = launch.hold_gpus(1)
    have("GPU-b")
    second, more = launch.hold_gpus(1)
    assert (first, second) == (["GPU-a"], ["GPU-b"])
    with pytest.raises(ValueError, match="only 0 of 1 are free"):
        launch.hold_gpus(1)
    for lock in locks + more:
        lock.close()


@pytest.mark.slow
def test_workers_hold_their_gpus_without_torchrun(monkeypatch, tmp_path):
    """torchrun killed, its workers still at work: the GPUs are not free before they end."""
    fifo = tmp_path / "moments"
    os.mkfifo(fifo)
    arguments = ["--settings", "{}", "--moments", str(fifo), "--out", str(tmp_path / "a"), "--out-json", "b"]
    line = [sys.executable, "-m", "mmfm.infra.launch", "--gpus", "2", "--", "latent_stats", *arguments]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1,2", "TMPDIR": str(tmp_path)}
    torchrun = subprocess.Popen(line, env=variables, stderr=subprocess.DEVNULL, start_new_session=True)
    workers = []
    try:
        while len(workers) < 2 or not all(_holds_locks(pid) for pid in workers):
            assert torchrun.poll() is None
            time.sleep(0.1)
            children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
            workers = [int(pid) for pid in children]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
        monkeypatch.setattr(launch, "_LOCK_FOLDER", next(tmp_path.glob("mmfm-gpus-*")))
        assert launch.hold_gpus(1)[0] == ["2"]
        torchrun.kill()
        torchrun.wait()
        assert launch.hold_gpus(1)[0] == ["2"]
    finally:
        torchrun.kill()
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 600
    while launch._lock("0.workers") is None or launch._lock("1.workers") is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert launch.hold_gpus(2)[0] == ["0", "1"]


def _holds_locks(pid):
    held = 0
    with suppress(FileNotFoundError):  # the process has gone
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since
                held += os.readlink(fd).endswith(".workers")
    return held == 2


def test_a_worker_whose_torchrun_was_killed_before_it_looked_ends():
    """Otherwise it would wait for the others for hours."""
    script = "from mmfm.infra.distributed import process_group\nwith process_group(): print('at work')"
    variables = {**os.environ, "TORCHELASTIC_RUN_ID": "none", "CUDA_VISIBLE_DEVICES": ""}
    for parent, status in ((os.getpid(), 0), (1, 1)):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**variables, launch.PARENT: str(parent)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr
        assert ("at work" in done.stdout) == (status == 0) != ("the launcher was killed" in done.stderr)


def test_more_gpus_than_there_are_is_an_error():
    result = subprocess.run(
        [sys.executable, "-m", "mmfm.infra.launch", "--gpus", "2", "--", "extract"],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 2
    assert result.stderr.strip() == (
        "launch: error: 2 GPUs requested, but 0 visible; lower `gpus` in the configuration (0 for the CPU)"
    )


def test_the_stage_gets_its_threads():
    """The child's environment, read in the child: `doctor` prints it."""
    result = subprocess.run(
        [sys.executable, "-m", "mmfm.infra.launch", "--threads", "1", "--", "doctor", "--threads"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "7"},
    )
    assert result.stdout.split() == ["OMP_NUM_THREADS=1", "MKL_NUM_THREADS=1", "OPENBLAS_NUM_THREADS=1"], result.stderr


def test_a_stage_gets_no_more_threads_than_its_job_has_cores():
    line = [sys.executable, "-m", "mmfm.infra.launch", "--threads", "64", "--", "doctor", "--threads"]
    variables = {**os.environ, "SLURM_CPUS_PER_TASK": "1"}
    assert "OMP_NUM_THREADS=1" in subprocess.run(line, capture_output=True, text=True, env=variables).stdout.split()
