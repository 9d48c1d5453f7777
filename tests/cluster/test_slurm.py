"""Stages as jobs of a SLURM cluster: through the profiles, across nodes, and through all that ends jobs early.

The cluster is real and on this machine (tests/support/slurm.py); its GPUs are not. Where the packages are missing, the
tests are skipped, and the run says so.
"""

import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from mmfm.training.history import read_history
from support import slurm
from support.checkout import link_workflow
from support.places import ROOT
from support.tiny import SECTIONS, write_encoder, write_images

pytestmark = pytest.mark.slow

if reason := slurm.missing():
    warnings.warn(f"THE TESTS OF SLURM ARE SKIPPED: {reason}", stacklevel=1)
    pytest.skip(reason, allow_module_level=True)


def configuration(folder: Path) -> dict:
    """Return a configuration for 40 images, a random encoder, which is also the detector, and small sizes."""
    sections = {name: value for name, value in SECTIONS.items() if name not in ("encoder", "model")}
    return {
        **sections,
        "gpus": 0,
        "data": {"root": "images", "holdout": 8},
        "encoders": {"tiny": {**SECTIONS["encoder"], "weights": "encoder"}},
        "models": {"tiny": SECTIONS["model"]},
        "latents": {"cache": "off", "folder": "latents"},
        "decoder": {**SECTIONS["decoder"], "weights": "train"},
        "fid": {"detector": "encoder"},
    }


class Run:
    """A folder from which Snakemake submits jobs."""

    def __init__(self, folder: Path, cluster: slurm.Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.output = folder / "output"

    def command(self, *arguments: str) -> list[str]:
        """Return Snakemake's command line with the profile of this cluster."""
        profiles = ["--profile", "cluster", "--workflow-profile", "none"]
        files = [] if "--configfile" in arguments else ["--configfile", "tiny.yaml"]
        return [sys.executable, "-m", "snakemake", *arguments, *files, *profiles]

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of a login node: no GPU, nothing of a job."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MMFM"))}
        return {**kept, "PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"}

    def start(self, *arguments: str) -> subprocess.Popen:
        """Start Snakemake; what it prints goes to :attr:`output`."""
        with open(self.output, "w") as file:
            return subprocess.Popen(
                self.command(*arguments), cwd=self.folder, env=self.environment, stdout=file, stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
            )  # fmt: skip

    def call(self, *arguments: str, expect: int = 0, **environment: str) -> str:
        """Run Snakemake and return what it prints."""
        done = subprocess.run(
            self.command(*arguments), cwd=self.folder, env={**self.environment, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
        )  # fmt: skip
        assert (done.returncode != 0) == (expect != 0), done.stdout
        return done.stdout

    def ends(self, snakemake: subprocess.Popen, code: int = 0, seconds: float = 600) -> str:
        """Wait for Snakemake, check its exit status, and return what it printed."""
        try:
            snakemake.wait(seconds)
        finally:
            snakemake.kill()
        printed = self.output.read_text()
        assert snakemake.returncode == code, printed
        return printed

    def resumed(self, seed: int, snakemake: subprocess.Popen) -> int:
        """Wait until a training has been resumed, stop everything by Ctrl-C, and return the step it resumed at."""

        def found() -> re.Match | None:
            assert snakemake.poll() is None, self.output.read_text()
            return re.search(r"resuming at ([\d,]+) of", self.log(seed))

        step = int(self.cluster.wait_for(found, f"resumed training of seed {seed}")[1].replace(",", ""))
        snakemake.send_signal(signal.SIGINT)
        assert "the same command resumes" in self.ends(snakemake, 1)
        self.cluster.wait_for(lambda: not self.cluster.queue(), "end of the cancelled job")
        return step

    def saved(self, seed: int) -> int:
        """Return the step that a training saved when it was asked to stop."""
        return int(re.findall(r"asked to stop: step (\d+) is saved", self.log(seed))[-1])

    def training(self, seed: int) -> Path:
        """Return the folder of a training."""
        return Path(f"results/train/tiny_mode/seed{seed}.tiny.k4")

    def log(self, seed: int) -> str:
        """Return the log of a training; empty if there is none."""
        path = self.folder / f"results/logs/train.tiny_mode.seed{seed}.tiny.k4.log"
        return path.read_text() if path.exists() else ""

    def job_of_training(self, seed: int, snakemake: subprocess.Popen) -> str:
        """Wait until a training has made steps, and return its SLURM job."""

        def has_made_steps() -> bool:
            assert snakemake.poll() is None, self.output.read_text()
            return re.search(r"train: [\d,]+/[\d,]+ steps", self.log(seed)) is not None

        self.cluster.wait_for(has_made_steps, f"step of seed {seed}")
        return re.findall(r"launch: SLURM job (\d+) on", self.log(seed))[-1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The cluster."""
    try:
        with slurm.cluster(tmp_path_factory.mktemp("slurm")) as made:
            yield made
    except slurm.NoCluster as error:
        warnings.warn(f"THE TESTS OF SLURM ARE SKIPPED: {error}", stacklevel=1)
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def run(tmp_path_factory, cluster):
    """A checkout with 40 images, and the profile adapted as docs/cluster.md says."""
    folder = link_workflow(tmp_path_factory.mktemp("checkout"))
    write_images(folder / "images", 40)
    write_encoder(folder / "encoder")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(configuration(folder)))
    profile = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    profile |= {"max-threads": 2, "resources": {"gpu": 0, "gpu_per_node": 0}, "latency-wait": 5, "retries": 0}
    profile["default-resources"]["slurm_partition"] = "main"
    profile |= {"slurm-status-command": "squeue", "slurm-init-seconds-before-status-checks": 3}
    profile |= {"slurm-no-account": True}
    (folder / "cluster").mkdir()
    (folder / "cluster" / "config.yaml").write_text(yaml.safe_dump(profile))
    return Run(folder, cluster)


@pytest.fixture(scope="module")
def finished(run, cluster):
    """What Snakemake printed while it made a distance through sbatch, and the jobs that SLURM recorded."""
    printed = run.call("results/fid/tiny_mode.txt")
    return printed, cluster.completed


@pytest.fixture
def endless(run):
    """Returns a function that returns the arguments for a training that never ends, with many checkpoints."""

    def arguments(seed: int) -> list[str]:
        budget = {"epochs": 10**6, "decay_end_epoch": 10**6, "checkpoint_every": 20, "log_every": 20}
        (run.folder / f"endless{seed}.yaml").write_text(yaml.safe_dump({"train": budget}))
        return [f"{run.training(seed)}/ema.safetensors", "--configfile", "tiny.yaml", f"endless{seed}.yaml"]

    return arguments


def test_the_whole_pipeline_runs_as_jobs(run, finished):
    printed, completed = finished
    assert (run.folder / "results/fid/tiny_mode.txt").exists()
    submitted = re.findall(r"SLURM jobid (\d+)", printed)
    states = {job["JobId"]: job["JobState"] for job in completed}
    # Statistics are made in the job of the extraction, short names by Snakemake itself.
    assert len(submitted) == 9 and {states[job] for job in submitted} == {"COMPLETED"}
    assert "launch: SLURM job" in (run.folder / "results/logs/extract.tiny.log").read_text()
    assert "Nothing to be done" in run.call("results/fid/tiny_mode.txt")


def two_nodes(*extra: str, signal: str = "TERM@180") -> list[str]:
    """Return the arguments for a training on two nodes: profiles/slurm-multinode, with fewer GPUs on a node."""
    profile = yaml.safe_load((ROOT / "profiles" / "slurm-multinode" / "config.yaml").read_text())
    given = profile["set-resources"]["train"] | {"slurm_extra": f"'{' '.join([f'--signal={signal}', *extra])}'"}
    return ["--set-resources", *(f"train:{name}={value}" for name, value in given.items())]


def test_a_training_across_two_nodes(run, finished, cluster):
    run.call(f"{run.training(1)}/ema.safetensors", *two_nodes(), "--config", "processes=2")
    nodes = re.findall(r"launch: SLURM job (\d+) on (\w+): 1 process, 2 threads", run.log(1))
    assert sorted(node for _, node in nodes) == ["node1", "node2"] and len({job for job, _ in nodes}) == 1
    history = read_history(run.folder / run.training(1) / "history.jsonl")
    alone = read_history(run.folder / run.training(0) / "history.jsonl")
    assert [line["step"] for line in history] == [line["step"] for line in alone]


def test_a_cancelled_training_goes_on_where_it_was(run, finished, cluster, endless):
    snakemake = run.start(*endless(2))
    job = run.job_of_training(2, snakemake)
    cluster.run("scancel", job)
    printed = run.ends(snakemake, 1)
    said = rf"train \(tiny_mode.seed2.tiny.k4\) did not finish \(SLURM job {job} on node\d\): "
    assert re.search(said, printed) and "stopped; the same command resumes" in printed, printed
    saved = run.saved(2)
    assert saved and run.resumed(2, run.start(*endless(2))) == saved


def test_after_snakemake_is_killed_a_second_run_is_told_and_the_next_recovers(run, finished, cluster, endless):
    snakemake = run.start(*endless(3))
    job = run.job_of_training(3, snakemake)
    snakemake.send_signal(signal.SIGKILL)
    snakemake.wait()
    assert cluster.running("train") == job
    told = run.call(*endless(3), expect=1)
    assert f"another run is at work on a job of this one (SLURM job {job} on node" in told
    assert f"scancel {job}" in told
    cluster.run("scancel", job)
    cluster.wait_for(lambda: not cluster.queue(), "end of the orphan")
    saved = run.saved(3)
    assert run.resumed(3, run.start(*endless(3))) == saved


def test_a_job_at_its_time_limit_is_retried_where_it_was(run, finished, endless):
    limit = ["--set-resources", "train:runtime=2", "train:slurm_extra='--signal=TERM@40'", "--retries", "3"]
    snakemake = run.start(*endless(4), *limit)
    job = run.job_of_training(4, snakemake)
    assert run.resumed(4, snakemake) > 0
    printed = run.output.read_text()
    assert f"did not finish (SLURM job {job} on node" in printed and "Trying to restart job" in printed


def test_a_job_on_two_nodes_at_its_time_limit_is_retried(run, finished, endless):
    """srun's own complaints in the log are no refusal of the stage."""
    limit = [*two_nodes(signal="TERM@40"), "train:runtime=2", "--retries", "3", "--config", "processes=2"]
    snakemake = run.start(*endless(10), *limit)
    run.job_of_training(10, snakemake)
    assert run.resumed(10, snakemake) > 0


def test_a_preempted_training_goes_on_where_it_was(run, finished, cluster, endless):
    snakemake = run.start(*endless(5), "--retries", "3")
    run.job_of_training(5, snakemake)
    urgent = ["-p", "urgent", "-N", "2", "--exclusive", "--wrap", "sleep 2", "-o", "/dev/null", "--mem=0"]
    cluster.run("sbatch", *urgent)
    assert run.resumed(5, snakemake) > 0


def test_a_training_on_a_node_that_dies_goes_on_on_the_other(run, finished, cluster, endless):
    snakemake = run.start(*endless(6), "--retries", "3")
    run.job_of_training(6, snakemake)
    node = re.search(r"launch: SLURM job \d+ on (\w+)", run.log(6))[1]
    cluster.wait_for(lambda: re.search(r"train: ([2-9]\d|\d{3,})/", run.log(6)), "checkpoint at step 20")
    try:
        cluster.kill_node(node)
        assert run.resumed(6, snakemake) > 0
        assert f"on {node}:" not in run.log(6)
    finally:
        cluster.start_node(node)


GPUS = ["--config", "gpus=auto", "--resources", "gpu=4", f"gpu_per_node={slurm.GPUS}"]


def test_a_gpu_job_has_its_gpus_and_says_why_it_can_not_use_them(run, finished):
    """The stand-ins have no driver, as a node on which it is broken."""
    printed = run.call(f"{run.training(7)}/ema.safetensors", *GPUS, "--retries", "2", expect=1)
    assert re.search(r"launch: SLURM job \d+ on node\d: 2 GPUs, 2 threads", run.log(7)), run.log(7)
    assert re.search(r"this job has GPU 0,1 on node\d, but PyTorch .* can't use it", printed), printed
    assert "Trying to restart" not in printed  # the same again would fail again


def test_a_gpu_job_that_takes_a_part_of_a_node_has_a_part_of_its_cores(run, finished):
    some = ["--config", "gpus=1", *GPUS[2:]]
    printed = run.call(f"{run.training(9)}/ema.safetensors", *some, expect=1)
    assert re.search(r"launch: SLURM job \d+ on node\d: 1 GPU, 1 thread\n", run.log(9)), run.log(9)
    assert "this job has GPU 0 on node" in printed or "this job has GPU 1 on node" in printed


def test_a_gpu_job_across_two_nodes_has_the_gpus_of_both(run, finished):
    printed = run.call(f"{run.training(8)}/ema.safetensors", *GPUS, *two_nodes("--gpus-per-node=2"), expect=1)
    begun = re.findall(r"launch: SLURM job \d+ on (node\d): 2 GPUs, 2 threads", run.log(8))
    assert begun and set(begun) <= set(slurm.NODES), run.log(8)
    # The stand-ins of both nodes are the same files, so one node may find those of the other taken.
    assert re.search(r"this job has GPU 0,1 on node\d, but|2 GPUs requested, but only \d of 2 are free", printed), (
        printed
    )
