"""What a job takes of the machines."""

import pytest

from mmfm.workflow.jobs import Machine, Share, gpus_per_node, require_scheduler


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
        (16, {}, "'gpus' is 16, but only 8 are available .*gpu_per_node.* raise the limit"),
        (1, {"gpu": 9}, "'gpu' of 'train' in set-resources is 9, but only 8 are available"),
        (1, {"gpu": 18, "nodes": 2}, "is 9 per node, but only 8"),
        (1, {"gpu": 5, "nodes": 2}, "is 5, which 2 nodes can't share evenly; take a multiple of 2"),
    ],
)
def test_more_gpus_than_a_node_has(wanted, given, message):
    with pytest.raises(ValueError, match=message):
        Machine(cores=64, gpus=8).share("train", wanted, 1, given=given)


def test_a_job_does_not_doubt_what_it_was_given():
    """In a job of a CPU stage, no GPU is visible, whatever the configuration wants for others."""
    assert Machine(cores=4, gpus=0, strict=False).share("train", 8, 1).gpus == 8


def test_without_sbatch_there_is_no_submitting(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    require_scheduler("local")
    with pytest.raises(ValueError, match="no 'sbatch' on the path; start Snakemake on a login node"):
        require_scheduler("slurm")
    (tmp_path / "sbatch").touch(mode=0o755)
    require_scheduler("slurm")
