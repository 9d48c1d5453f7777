"""Cores of a job, not of the machine."""

import os

import pytest

from mmfm.infra import cores


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of 64 cores whose control groups a test writes; returns the function that does."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "cgroups")
    monkeypatch.setattr(cores, "_OWN_CGROUP", tmp_path / "own")

    def write(own, **limits):
        (tmp_path / "own").write_text(own)
        for name, text in limits.items():
            path = tmp_path / "cgroups" / name.replace("__", "/").replace("cpu_", "cpu.")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def test_without_limits_the_affinity_counts(machine):
    assert cores.given() == 64  # not even a list of control groups
    machine("0::/user.slice\n", user__cpu_max="max 100000\n")
    assert cores.given() == 64


def test_the_smallest_quota_above_counts(machine):
    machine("0::/slurm/job_1/step_0\n", slurm__job_1__cpu_max="800000 100000\n", slurm__cpu_max="max 100000\n")
    assert cores.given() == 8


def test_a_quota_of_half_a_core_is_one_core(machine):
    machine("0::/\n", cpu_max="50000 100000\n")
    assert cores.given() == 1


def test_control_groups_of_version_1(machine):
    group = "cpu,cpuacct__docker__x__cpu_cfs"
    limits = {f"{group}_quota_us": "600000\n", f"{group}_period_us": "100000\n"}
    machine("4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n", **limits)
    assert cores.given() == 6


@pytest.mark.parametrize(("asked", "expected"), [("4", 4), ("128", 64), ("", 64), ("many", 64), ("0", 64)])
def test_what_slurm_gave_a_task(machine, monkeypatch, asked, expected):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", asked)
    assert cores.given() == expected


def test_garbage_in_the_control_groups_is_no_limit(machine):
    machine("0::/a\n", a__cpu_max="what\n")
    assert cores.given() == 64
