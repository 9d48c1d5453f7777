"""Dry runs with the profiles for SLURM, on a machine without SLURM or GPUs: what every job would ask for."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from support.checkout import link_workflow
from support.places import ROOT

TARGET = "results/fid/dinov2_mode.txt"
SLURM = ["--workflow-profile", "profiles/slurm"]
NODES = ["--profile", "profiles/slurm", "--workflow-profile", "profiles/slurm-multinode"]


def dry_run(folder, *arguments, target=TARGET):
    """Return exit status and output of a dry run."""
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", target, *arguments],
        cwd=folder, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def planned(folder, *arguments, target=TARGET):
    """Return the resources of every job of a dry run, as text, by rule; threads among them."""
    code, output = dry_run(folder, *arguments, target=target)
    assert code == 0, output
    found = {}
    for rule, block in re.findall(r"rule (\w+):\n((?:    .+\n)+)", output):
        threads = re.search(r"    threads: (\d+)", block)
        words = re.search(r"    resources: (.+)", block)[1].split(", ")
        pairs = dict(word.split("=", 1) for word in words if "=" in word)
        found[rule] = {**pairs, "threads": threads[1] if threads else "1"}
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with the workflow."""
    return link_workflow(tmp_path_factory.mktemp("profiles"))


def test_every_stage_asks_for_a_node_of_the_profile(checkout):
    """Also where this machine has no GPU: the profile speaks of the cluster's."""
    jobs = planned(checkout, *SLURM)
    for rule in ("extract", "fit_gmm", "spatial_gmm", "train", "sample", "fid_reference", "fid"):
        assert (jobs[rule]["gpu"], jobs[rule]["nodes"], jobs[rule]["threads"]) == ("8", "1", "64"), rule
    assert all(job["slurm_extra"] == "--signal=TERM@180" for job in jobs.values())
    # The signal must not come before a job has begun.
    assert all(int(job["runtime"]) >= 10 for rule, job in jobs.items() if rule != "short_fid")
    assert "gpu" not in jobs["list_images"]


def test_a_stage_and_a_model_can_take_fewer_gpus(checkout):
    recipe = {"recipes": {"guide": {"models": ["tiny_guide"], "train": {"gpus": 1}}}}
    (checkout / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    more = ["--configfile", "recipe.yaml", "--set-resources", "extract:gpu=2"]
    code, output = dry_run(checkout, *SLURM, *more, target="results/fid/dinov2_mode_ag.txt")
    assert code == 0, output
    trainings = re.findall(r"rule train:\n(?:    .+\n)*?    output: \S+?(guide)?/ema.safetensors(?:.*\n)+?    threads: "
                           r"(\d+)\n    resources: .*?gpu=(\d+)", output)  # fmt: skip
    assert sorted(trainings) == [("", "64", "8"), ("guide", "8", "1")]
    assert planned(checkout, *SLURM, *more)["extract"]["gpu"] == "2"


def test_training_on_two_nodes(checkout):
    jobs = planned(checkout, *NODES)
    train = jobs["train"]
    assert (train["gpu"], train["nodes"], train["tasks"], train["threads"]) == ("16", "2", "2", "64")
    assert (train["mpi"], train["tasks_per_gpu"]) == ("srun", "0")
    assert (jobs["sample"]["gpu"], jobs["sample"]["nodes"]) == ("8", "1") and "mpi" not in jobs["sample"]
    # Memory is that of a node.
    assert abs(int(train["mem_mb"]) - int(planned(checkout, *SLURM)["train"]["mem_mb"])) < 100


def test_on_cpus_a_job_takes_a_node_or_half_of_one(checkout):
    jobs = planned(checkout, *SLURM, "--resources", "gpu=0", "gpu_per_node=0")
    assert (jobs["train"]["gpu"], jobs["train"]["threads"], jobs["extract"]["threads"]) == ("0", "64", "32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SLURM, "--config", "gpus=16"], "'gpus' is 16, but only 8 are available"),
        (
            [*SLURM, "--set-resources", "train:gpu=9"],
            "'gpu' of 'train' in set-resources is 9, but only 8 are available",
        ),
        ([*NODES, "--set-resources", "train:nodes=2", "train:gpu=7"], "is 7, which 2 nodes can't share evenly"),
    ],
)
def test_more_gpus_than_a_node_has_are_refused(checkout, arguments, message):
    code, output = dry_run(checkout, *arguments)
    assert code != 0 and message in output and "Traceback" not in output, output


def test_the_signal_of_both_profiles_is_the_same():
    one, several = (
        yaml.safe_load((ROOT / "profiles" / name / "config.yaml").read_text()) for name in ("slurm", "slurm-multinode")
    )
    signal = one["default-resources"]["slurm_extra"].strip("'")
    assert signal in several["set-resources"]["train"]["slurm_extra"]
