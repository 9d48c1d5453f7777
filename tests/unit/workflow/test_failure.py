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
