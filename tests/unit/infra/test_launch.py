"""The launcher: threads, processes, GPUs that two jobs never share."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmfm.infra import launch


def test_one_process_is_the_module_itself():
    line = launch.command(["extract", "--x"], processes=1)
    assert line[1:] == ["-m", "mmfm.cli", "extract", "--x"]
    assert "torch.distributed.run" in launch.command(["extract"], processes=2)


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
    deadline = time.monotonic() + 30
    while launch._lock("0.workers") is None or launch._lock("1.workers") is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert launch.hold_gpus(2)[0] == ["0", "1"]


def _holds_locks(pid):
    return sum(os.readlink(fd).endswith(".workers") for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()) == 2


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


JOB = {"SLURM_JOB_ID": "45678", "SLURM_NODEID": "1"}


@pytest.fixture
def slurm_job(monkeypatch, tmp_path):
    """The environment of a SLURM job's batch script, as the executor leaves it."""
    for name in ("SLURM_STEP_ID", "SLURM_NODEID", launch.RENDEZVOUS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "45678")
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return monkeypatch


def test_the_first_node_starts_the_launcher_on_every_node(slurm_job):
    line, variables = launch.on_every_node(["--nodes", "2", "--", "train"], 2, threads=16, gpus=4)
    assert line[0] == "srun" and line[-5:] == ["mmfm.infra.launch", "--nodes", "2", "--", "train"]
    sizes = {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=16", "--gpus-per-node=4"}
    assert sizes | {"--kill-on-bad-exit=1"} <= set(line)
    address, _, port = variables[launch.RENDEZVOUS].partition(":")
    assert address == launch.own_address() and int(port) == 20000 + 45678 % 20000


def test_a_port_that_is_taken_is_passed_over(slurm_job):
    port = 20000 + 45678 % 20000
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        _, variables = launch.on_every_node(["--", "train"], 2, threads=1, gpus=0)
    assert variables[launch.RENDEZVOUS].endswith(f":{port + 1}")


def test_the_nodes_meet_at_the_first_ones_address(slurm_job):
    slurm_job.setenv(launch.RENDEZVOUS, "127.0.0.1:29999")
    for node, is_host in (("0", "true"), ("1", "false")):
        slurm_job.setenv("SLURM_NODEID", node)
        line = launch.command(["train"], processes=1, nodes=2)
        assert {"--nnodes=2", "--nproc-per-node=1", "--rdzv-endpoint=127.0.0.1:29999", "--rdzv-id=45678"} <= set(line)
        assert {f"--rdzv-conf=is_host={is_host}", "--local-addr=127.0.0.1"} <= set(line)
        assert "--standalone" not in line


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--nodes", "2"], {}, "2 nodes requested, but this is no SLURM job; use --workflow-profile profiles/slurm"),
        (["--nodes", "2"], {**JOB, "SLURM_STEP_ID": "0"}, "the job runs on one; take the resources of profiles/slurm-"),
        (["--nodes", "2", "--gpus", "3"], JOB, "3 GPUs can't be divided among 2 nodes evenly; take a multiple of 2"),
        (["--nodes", "2", "--processes", "3"], {**JOB, launch.RENDEZVOUS: "a:1"}, "3 processes can't be divided"),
        (["--nodes", "2"], {"SLURM_JOB_ID": "1", launch.RENDEZVOUS: "a:1"}, "SLURM_NODEID not in the environment"),
    ],
)
def test_nodes_that_can_not_be_had(tmp_path, arguments, variables, message):
    (tmp_path / "srun").touch(mode=0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MMFM"))}
    line = [sys.executable, "-m", "mmfm.infra.launch", *arguments, "--", "train"]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(line, capture_output=True, text=True, env={**kept, **path, **variables})
    assert result.returncode == 2 and result.stderr.startswith("launch: error: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_interface_of_an_address_is_known_by_name():
    assert launch.interface_of("127.0.0.1") == "lo"
    assert launch.interface_of("192.0.2.77") is None
