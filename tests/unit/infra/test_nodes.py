"""Several nodes of a SLURM job: the command on the first, torchrun's options, and what all must share."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mmfm.infra import launch, nodes

JOB = {"SLURM_JOB_ID": "45678", "SLURM_NODEID": "1"}


@pytest.fixture
def slurm_job(monkeypatch, tmp_path):
    """The environment of a SLURM job's batch script, as the executor leaves it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_STEP_ID", "SLURM_NODEID", nodes.FIRST):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "45678")
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return monkeypatch


def test_the_first_node_starts_the_launcher_on_every_node(slurm_job):
    line, variables = nodes.on_every_node(["--nodes", "2", "--", "train"], 2, threads=16, gpus=4)
    assert line[0] == "srun" and line[-5:] == ["mmfm.infra.launch", "--nodes", "2", "--", "train"]
    sizes = {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=16", "--gpus-per-node=4"}
    assert sizes | {"--kill-on-bad-exit=1"} <= set(line)
    first = json.loads(variables[nodes.FIRST])
    assert (first["address"], first["port"]) == (nodes.own_address(), 20000 + 45678 % 20000)


def test_a_port_that_is_taken_is_passed_over(slurm_job):
    port = 20000 + 45678 % 20000
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        _, variables = nodes.on_every_node(["--", "train"], 2, threads=1, gpus=0)
    assert json.loads(variables[nodes.FIRST])["port"] == port + 1


def test_the_nodes_meet_at_the_first_ones_address(slurm_job):
    slurm_job.setenv(nodes.FIRST, json.dumps({"address": "127.0.0.1", "port": 29999}))
    for node, is_host in (("0", "true"), ("1", "false")):
        slurm_job.setenv("SLURM_NODEID", node)
        line = launch.command(["train"], processes=1, nodes=2)
        assert {"--nnodes=2", "--nproc-per-node=1", "--rdzv-endpoint=127.0.0.1:29999", "--rdzv-id=45678"} <= set(line)
        assert {f"--rdzv-conf=is_host={is_host}", "--local-addr=127.0.0.1"} <= set(line)
        assert "--standalone" not in line


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--nodes", "2"], {}, "2 nodes requested, but this is not a SLURM job; use the profiles for SLURM"),
        (["--nodes", "2"], {**JOB, "SLURM_STEP_ID": "0"}, "the job runs on one; take the resources of profiles/slurm-"),
        (["--nodes", "2", "--gpus", "3"], JOB, "3 GPUs can't be divided among 2 nodes evenly; take a multiple of 2"),
        (["--nodes", "2", "--processes", "3"], {**JOB, nodes.FIRST: "{}"}, "3 processes can't be divided"),
        (["--nodes", "2"], {"SLURM_JOB_ID": "1", nodes.FIRST: "{}"}, "SLURM_NODEID not in the environment"),
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
    assert nodes.interface_of("127.0.0.1") == "lo"
    assert nodes.interface_of("192.0.2.77") is None


@pytest.mark.parametrize(
    ("named", "others", "expected"),
    [
        ("10.9.8.7", ["10.1.2.3"], "10.9.8.7"),
        ("127.0.1.1", ["10.1.2.3"], "10.1.2.3"),
        ("127.0.1.1", [], "127.0.1.1"),
    ],
)
def test_without_a_route_the_address_is_one_that_other_nodes_find(monkeypatch, named, others, expected):
    class NoRoute(socket.socket):
        def connect(self, address):
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

    def entry(address, family=socket.AF_INET):
        return SimpleNamespace(family=family, address=address)

    interfaces = {"lo": [entry("127.0.0.1")], "eth0": [entry("fe80::1", socket.AF_INET6), *map(entry, others)]}
    monkeypatch.setattr(socket, "socket", NoRoute)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: named)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces)
    assert nodes.own_address() == expected


@pytest.fixture
def second_node(slurm_job):
    """The environment of the second node's task; returns what it was told of the first, to change it."""
    _, variables = nodes.on_every_node(["--", "train"], 2, threads=1, gpus=0)
    slurm_job.setenv("SLURMD_NODENAME", "node2")
    slurm_job.setattr(nodes, "_VISIBLE_WITHIN", 0.0)
    told = json.loads(variables[nodes.FIRST])

    def tell(**changes):
        slurm_job.setenv(nodes.FIRST, json.dumps({**told, "name": "node1", **changes}))
        return told

    tell()
    return tell


def test_nodes_with_the_same_code_and_folder_are_taken(second_node):
    nodes.require_same()


def test_a_node_with_other_versions_is_named(second_node):
    second_node(versions="mmfm 01234567 in Python 3.11.7 with PyTorch 2.12.0")
    with pytest.raises(ValueError, match=r"node2 has mmfm \w{8} in Python .*, but node1 has mmfm 01234567 .* the same"):
        nodes.require_same()


def test_a_node_that_does_not_share_the_results_is_named(second_node):
    Path(second_node()["marker"]).unlink()
    with pytest.raises(ValueError, match=r"node2 can't see '.*seen-by-all-nodes-.*', which node1 made; .* share"):
        nodes.require_same()


def test_old_markers_are_removed(slurm_job, tmp_path):
    (tmp_path / "results").mkdir()
    for age, name in ((7200, "old"), (60, "new")):
        path = tmp_path / "results" / f".seen-by-all-nodes-{name}"
        path.touch()
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    _, variables = nodes.on_every_node(["--", "train"], 2, threads=1, gpus=0)
    kept = {path.name for path in (tmp_path / "results").iterdir()}
    assert kept == {".seen-by-all-nodes-new", Path(json.loads(variables[nodes.FIRST])["marker"]).name}
