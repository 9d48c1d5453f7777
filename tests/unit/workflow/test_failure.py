"""What a failed run ends with, from logs and from the records of Snakemake's logger."""

import logging
from pathlib import Path

import pytest

from mmfm.workflow.failure import MOST, Brief, Failure, Record, summary

COMMAND = "Command 'python -m mmfm.infra.launch -- fit_gmm --settings {...} 2>&1 | tee LOG' "
FINISHED = {"list_images": (1, 1), "fit_gmm": (0, 1), "train": (1, 3)}


def failed(
    folder: Path, text: str | None, status: str = "returned non-zero exit status 2.", name: str = "k5"
) -> Failure:
    """Return a failed fit whose log holds a text."""
    log = folder / f"fit_gmm.dinov2.{name}.log"
    if text is not None:
        log.write_text(text)
    return Failure("fit_gmm", log, f"CalledProcessError: {COMMAND.replace('LOG', str(log))}{status}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "fit_gmm: 3 of 9\rfit_gmm: error: K is too large (see docs/mixture.md)\ntorchrun: it failed\n",
            "K is too large",
        ),
        ("mmfm fit_gmm: error: the following arguments are required: --tokens\n", "the following arguments"),
        ("Traceback:\n  File x\nrank 1: torch.OutOfMemoryError: CUDA out of memory.\n", "torch.OutOfMemoryError: CUDA"),
        ("Traceback:\n  File x\nKeyError: 'a'\n", "KeyError: 'a'"),
        ("cp: cannot create 'x'\n", "the log ends with: cp: cannot create 'x'"),
        ("", "it left no message"),
        (None, "it left no message"),
    ],
)
def test_the_reason_is_the_helpful_line_of_the_log(tmp_path, text, reason):
    assert failed(tmp_path, text).reason({}).startswith(reason)


def test_the_summary_has_stage_reason_log_remedy_and_progress(tmp_path):
    one = failed(tmp_path, "fit_gmm: error: K is too large; lower it (see docs/mixture.md)\n")
    lines = summary([one], FINISHED, {}, ".snakemake/log/x.log")
    assert lines[0] == "fit_gmm (dinov2.k5) failed"
    assert "K is too large; lower it (see docs/mixture.md)" in lines[1]
    assert str(one.log) in lines[2] and ".snakemake/log/x.log" in lines[2]
    assert "run the same command; it goes on with fit_gmm" in lines[3]
    assert lines[4].endswith("2 of 5 jobs: list_images, train (1 of 3)") and len(lines) == 5


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("fit_gmm: 3 of 9\n", "returned non-zero exit status 137."),
        ("fit_gmm: 3 of 9\n", "died with <Signals.SIGKILL: 9>."),
        ("Signal 9 (SIGKILL) received by PID 77\n", "returned non-zero exit status 1."),
    ],
)
def test_a_job_that_was_killed_probably_ran_out_of_memory(tmp_path, text, status):
    reason = failed(tmp_path, text, status).reason({"fit_gmm": 3509})
    assert "probably because memory ran out; it is estimated to take 3.5 GB" in reason


def test_several_failed_jobs_take_a_line_each(tmp_path):
    many = [failed(tmp_path, f"fit_gmm: error: number {i}\n", name=f"k{i}") for i in range(MOST + 2)]
    lines = summary(many, FINISHED, {}, "x.log")
    assert len(lines) == MOST + 2 and "2 more failed" in lines[MOST]
    assert lines[1].startswith("fit_gmm (dinov2.k1) failed: number 1 (log: ")


@pytest.mark.parametrize("status", ["returned non-zero exit status 130.", "died with <Signals.SIGTERM: 15>."])
def test_a_request_to_stop_is_no_failure(tmp_path, status):
    stopped = failed(tmp_path, "fit_gmm: stopped\n", status)
    assert summary([stopped], FINISHED, {}, "x.log")[0] == "stopped; the same command resumes"
    assert summary([], FINISHED, {}, "x.log", stopped=True)[0] == "stopped; the same command resumes"
    real = failed(tmp_path, "fit_gmm: error: bad\n", name="k6")
    assert summary([stopped, real], FINISHED, {}, "x.log", stopped=True)[0] == "fit_gmm (dinov2.k6) failed"
    assert summary([], FINISHED, {}, "x.log") == []  # what else went wrong, Snakemake has said


def record(text: str, event: str | None = None, **more: object) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": text, "event": event, **more})


def test_the_record_keeps_from_the_terminal_what_the_summary_says():
    found, log = Record(), "results/logs/fit_gmm.dinov2.k5.log"
    status = f"{COMMAND.replace('LOG', log)}died with <Signals.SIGKILL: 9>."
    command = record(f"RuleException:\nCalledProcessError in x:\n{status}", "error")
    job = record("Error in rule fit_gmm", "job_error", rule_name="fit_gmm", log=[log], jobid=4)
    other = record("MissingOutputException: no x", "error")
    last = record("WorkflowError:\nAt least one job did not complete successfully.", "error")
    plain = record("Finished jobid: 3", "job_finished", job_id=3)
    brief = Brief(found, logging.Formatter("usual %(message)s"))
    assert brief.format(job) == f"fit_gmm (dinov2.k5) did not finish; its log: {log}"
    assert brief.format(plain) == "usual Finished jobid: 3"
    assert all(found.keep(one) for one in (command, job, other, plain, last))
    assert [found.passes(one) for one in (command, job, other, plain, last)] == [False, True, True, True, True]
    (one,) = found.failures()
    assert (one.name, one.signal) == ("fit_gmm (dinov2.k5)", 9) and not found.stopped
    found.summarised = True
    assert not found.passes(last) and found.passes(other)
    found.keep(record("Terminating processes on user request, this might take some time."))
    assert found.stopped


def test_the_workflows_own_errors_are_shown_as_their_messages():
    found, message = Record(), "'fid.weights' is 'x', which does not exist; set it (see config/README.md)\nTargets: a"
    brief = Brief(found, logging.Formatter("usual %(message)s"))
    around = "InputFunctionException in rule fid:\nError:\n  WorkflowError:\n    {}\nTraceback:\n  File x"
    raised = record(around.format(message.replace("\n", "\n    ")), "error")
    assert brief.format(raised).startswith("usual InputFunctionException")
    found.refusals.append(message)
    assert brief.format(raised) == f"Error: {message}"
    assert brief.format(record("MissingInputException: no y", "error")) == "usual MissingInputException: no y"
    assert brief.format(record(f"Finished: {message}", "job_finished")) == f"usual Finished: {message}"


SLURM_FAILED = (
    "SLURM-job '12' failed, SLURM status is: '{}'. Detailed failure reason unavailable (status command is not 'sacct')."
    "For further error details see the cluster/cloud log and the log files of the involved rule(s)."
)


@pytest.mark.parametrize(
    ("text", "state", "reason", "place"),
    [
        ("launch: SLURM job 12 on gpu-03.site: 8 GPUs\ntrain: 3 of 9\n", "TIMEOUT", "SLURM ended it at its time limit",
         " (SLURM job 12 on gpu-03.site)"),
        (None, "NODE_FAIL", "its node failed", " (SLURM job 12)"),
        (None, "FAILED", "it left no message (SLURM's state: FAILED)", " (SLURM job 12)"),
        ("launch: SLURM job 12 on n1: 1 process\ntrain: error: K is too large\n", "FAILED", "K is too large",
         " (SLURM job 12 on n1)"),
    ],
)  # fmt: skip
def test_a_job_of_slurm_is_named_with_its_node_and_end(tmp_path, text, state, reason, place):
    log = tmp_path / "train.x.log"
    if text:
        log.write_text(text)
    one = Failure("train", log, SLURM_FAILED.format(state), "slurm/12.log")
    assert (one.reason({}), one.place()) == (reason, place)
    lines = summary([one], FINISHED, {}, "own.log")
    assert lines[0] == f"train (x) failed{place}" and "SLURM's: slurm/12.log" in lines[2]


def job_error(number, log, message=None, more=(), **values):
    """Return Snakemake's record of a failed job."""
    return record(
        "Error in rule train", "job_error", rule_name="train", log=[str(log), *more], jobid=number, rule_msg=message,
        **values,
    )  # fmt: skip


def test_a_job_that_a_retry_finishes_is_no_failure(tmp_path):
    found = Record()
    found.keep(job_error(3, tmp_path / "a.log", SLURM_FAILED.format("TIMEOUT")))
    found.keep(job_error(4, tmp_path / "b.log", SLURM_FAILED.format("TIMEOUT")))
    found.keep(record("Finished jobid: 3", "job_finished", job_id=3))
    assert [one.number for one in found.failures()] == [4]


def test_only_what_would_fail_again_is_not_retried(tmp_path):
    found, refused = Record(), []
    found.on_refusal = refused.append
    (tmp_path / "own.log").write_text("train: error: K is too large\n")
    (tmp_path / "cut.log").write_text("train: 3 of 9\n")
    found.keep(job_error(1, tmp_path / "cut.log", SLURM_FAILED.format("TIMEOUT")))
    assert not refused
    found.keep(job_error(2, tmp_path / "own.log", SLURM_FAILED.format("FAILED")))
    assert refused == [2]
    rejected = "SLURM sbatch failed. The error message was 'sbatch: error: Batch job submission failed: {}'."
    found.keep(job_error(3, tmp_path / "none.log", rejected.format("Socket timed out on send/recv operation")))
    assert refused == [2]
    found.keep(job_error(4, tmp_path / "none.log", rejected.format("Invalid partition name specified")))
    assert refused == [2, 4]
    found.keep(job_error(5, tmp_path / "cut.log", SLURM_FAILED.format("OUT_OF_MEMORY")))
    assert refused == [2, 4, 5]
    # Neither a file system's hiccup nor what srun says when it ends a step of several nodes.
    for text in (
        "train: error: 'a.png': Stale file handle\n",
        "srun: error: node1: task 0: Exited with exit code 130\n",
        "slurmstepd: error: *** STEP 9.0 ON n1 CANCELLED AT 2026-11-26 DUE TO TIME LIMIT ***\n",
    ):
        (tmp_path / "cut.log").write_text(text)
        found.keep(job_error(6, tmp_path / "cut.log", SLURM_FAILED.format("FAILED")))
    assert refused == [2, 4, 5]


def test_a_stage_that_a_scheduler_stopped_has_not_failed(tmp_path):
    said = "train: asked to stop: step 43 is saved\ntrain: stopped; run the same command to resume\n"
    (tmp_path / "train.x.log").write_text(said)
    one = Failure("train", tmp_path / "train.x.log", SLURM_FAILED.format("FAILED"))
    assert one.stopped() and summary([one], FINISHED, {}, "own.log")[0] == "stopped; the same command resumes"


def test_a_failure_on_a_cluster_says_why_at_once(tmp_path):
    found = Record()
    message = (
        "SLURM sbatch failed. The error message was 'no such partition'.\n    sbatch call:\n   sbatch --parsable ..."
    )
    text = Brief(found, logging.Formatter()).format(job_error(1, tmp_path / "train.x.log", message, ["slurm/12.log"]))
    assert text == (
        "train (x) did not finish: SLURM sbatch failed. The error message was 'no such partition'.; its log: "
        f"{tmp_path}/train.x.log, slurm/12.log"
    )
    found.keep(record("Error in group a", "group_error", aux_logs=["slurm/13.log"]))
    grouped = job_error(2, tmp_path / "train.x.log", indent=True)
    assert found.failure(grouped).slurm_log == "slurm/13.log"
    assert not found.keep(grouped) and not found.failures()  # it has no log, so it was not its fault
    (tmp_path / "train.x.log").write_text("train: error: K is too large\n")
    assert found.keep(grouped) and [one.number for one in found.failures()] == [2]
