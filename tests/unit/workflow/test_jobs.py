"""What a job takes of the machines."""

import pytest

from mmfm.workflow.jobs import Machine, Share, gpus_per_node, require_cluster, tell_jobs, told


def test_gpus_per_node():
    assert gpus_per_node("auto", None) == 0
    assert gpus_per_node("auto", 8) == 8
    assert gpus_per_node(2, 8) == 2
    with pytest.raises(ValueError, match="number or auto"):
        gpus_per_node("all", 8)


def test_on_a_cpu_jobs_that_can_run_side_by_side_take_half_of_the_cores():
    machine = Machine(cores=16, gpus=0)
    assert machine.share("train", "auto", 3) == Share(gpus=0, processes=3, nodes=1, threads=16)
    assert machine.share("extract", "auto", 3, part=2).threads == 8
    assert Machine(cores=1, gpus=None).share("extract", 0, 1, part=2).threads == 1


def test_threads_go_with_the_gpus():
    machine = Machine(cores=64, gpus=8)
    assert machine.share("train", "auto", 1) == Share(gpus=8, processes=8, nodes=1, threads=64)
    assert machine.share("extract", 2, 1, part=2) == Share(gpus=2, processes=2, nodes=1, threads=16)
    assert machine.share("extract", 8, 1, given={"gpu": 4}).threads == 32
    assert machine.share("fid", 8, 3, part=2, given={"gpu": 0}) == Share(gpus=0, processes=3, nodes=1, threads=32)


def test_several_nodes_have_the_gpus_of_each():
    machine = Machine(cores=64, gpus=8)
    two = machine.share("train", "auto", 1, given={"nodes": 2})
    assert two == Share(gpus=16, processes=16, nodes=2, threads=64) and two.processes_per_node == 8
    assert machine.share("train", "auto", 1, given={"nodes": 2, "gpu": 8}).threads == 32


@pytest.mark.parametrize(
    ("wanted", "given", "message"),
    [
        (16, {}, "'gpus' is 16, but only 8 are available .*gpu_per_node.*; lower it"),
        (1, {"gpu": 9}, "'gpu' of 'train' in set-resources is 9, but only 8 are available"),
        (1, {"gpu": 18, "nodes": 2}, "is 9 per node, but only 8 are available"),
        (1, {"gpu": 5, "nodes": 2}, "is 5, which 2 nodes can't share evenly; take a multiple of 2"),
    ],
)
def test_more_gpus_than_a_node_has(wanted, given, message):
    with pytest.raises(ValueError, match=message):
        Machine(cores=64, gpus=8).share("train", wanted, 1, given=given)


def test_more_gpus_than_all_jobs_may_take():
    with pytest.raises(
        ValueError, match=r"8 nodes with 8 GPUs each are 64, but all jobs together may take 32 .* raise"
    ):
        Machine(cores=64, gpus=8, total=32).share("train", "auto", 1, given={"nodes": 8})


def test_jobs_know_the_machine_and_the_targets_of_their_run(monkeypatch):
    monkeypatch.delenv("MMFM_RUN", raising=False)
    assert told("targets", ["x"]) == ["x"]
    machine = Machine(cores=64, gpus=8, total=32)
    tell_jobs(machine, ["results/fid/dinov2_mode.step20.txt"])
    assert (told("machine", None), told("targets", [])) == (machine, ["results/fid/dinov2_mode.step20.txt"])


def test_jobs_are_sent_away_only_with_a_scheduler_and_a_description_of_a_node(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    require_cluster("local", None, 8, None)
    with pytest.raises(ValueError, match="no 'sbatch' on the path; start Snakemake on a login node"):
        require_cluster("slurm", 64, 8, 8)
    (tmp_path / "sbatch").touch(mode=0o755)
    require_cluster("slurm", 64, 8, 8)
    require_cluster("slurm", 64, 0, None)
    for max_threads, gpus_of_node in ((None, 8), (64, None)):
        with pytest.raises(ValueError, match=r"must say what one of them has: max-threads, .*gpu_per_node"):
            require_cluster("slurm", max_threads, 16, gpus_of_node)
