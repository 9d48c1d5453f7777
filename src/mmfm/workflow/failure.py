"""What a failed run ends with: which jobs failed, why, their logs, what to do, and what is finished.

Snakemake prints a failed job's whole command twice and the reason not at all. :class:`Record` listens to its logger,
keeps these messages from the terminal (they stay in Snakemake's own log) and :func:`summary` says what matters.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

MOST = 5
"""Failed jobs that a summary lists."""

_ERROR = re.compile(r"^(?:mmfm )?(?!srun|slurm)\w+: error: (.+)$", re.MULTILINE)
_EXCEPTION = re.compile(r"^(?:\[?rank ?\d+\]?: )?((?:\w+\.)*\w*(?:Error|Exception): .+)$", re.MULTILINE)
_STATUS = re.compile(r"returned non-zero exit status (\d+)|died with <Signals\.\w+: (\d+)>")
_OUT_OF_MEMORY = re.compile(r"SIGKILL|killed by signal: Killed|exitcode\s*: -9")
_PLACE = re.compile(r"^launch: SLURM job (\d+) on ([\w.-]+):", re.MULTILINE)
_SLURM = re.compile(r"SLURM-job '(\d+)' failed.*?status is: '(\w+)'", re.DOTALL)
_SLURM_STATES = {
    "TIMEOUT": "SLURM ended it at its time limit",
    "DEADLINE": "SLURM ended it at its deadline",
    "CANCELLED": "it was cancelled (scancel)",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node failed to start",
    "OUT_OF_MEMORY": "memory ran out; raise mem_mb of its rule in the profile (set-resources)",
}
_HANGUP, _INTERRUPT, _KILL, _USER, _TERMINATE = 1, 2, 9, 10, 15
_REQUESTS = {_HANGUP, _INTERRUPT, _USER, _TERMINATE}
_BY_USER = ("Terminating processes on user request", "Will exit after finishing currently running jobs")
_REPLACED = ("Exiting because a job execution failed", "Complete log(s):", "Elapsed time:")
_STOPPED = re.compile(r": stopped(?: at once)?; .*resume", re.MULTILINE)  # what a stage says last
_APPENDED = re.compile(r"For further error details see|\n\s*sbatch call:")  # to an executor's message
_TRANSIENT = re.compile(r"Stale file handle|Input/output error|timed out|Connection reset", re.IGNORECASE)
_REJECTED = re.compile(r"Batch job submission failed: (?:Invalid|Requested)")
_FINAL = "At least one job did not complete successfully."


@dataclass(frozen=True)
class Failure:
    """A failed job.

    Attributes:
        rule: name of its rule.
        log: its log; None if it has none.
        message: what Snakemake says about it, with the exit status of its command; empty if nothing.
        slurm_log: log of its SLURM job, which has what its own lacks; empty without SLURM.
        number: Snakemake's number of the job.
    """

    rule: str
    log: Path | None
    message: str = ""
    slurm_log: str = ""
    number: int = 0

    @property
    def name(self) -> str:
        """The rule and what its log's name adds: encoder, setting and variant."""
        added = self.log.stem.removeprefix(self.rule).strip(".") if self.log else ""
        return f"{self.rule} ({added})" if added else self.rule

    @property
    def signal(self) -> int | None:
        """Number of the signal that ended the command; None if it ended by itself."""
        match = _STATUS.search(self.message)
        if match is None:
            return None
        if match[2]:
            return int(match[2])
        return int(match[1]) - 128 if int(match[1]) > 128 else None

    def stopped(self) -> bool:
        """Whether it was asked to stop, as by Ctrl-C or by a scheduler."""
        return self.signal in _REQUESTS or _STOPPED.search(self._text()) is not None

    def reason(self, mem_mb: Mapping[str, int]) -> str:
        """Return why it failed, in one line.

        Args:
            mem_mb: memory that each rule is estimated to take, in MB.
        """
        text = self._text()
        if error := self._error(text, mem_mb):
            return error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if lines:
            return f"the log ends with: {lines[-1]}"
        if match := _SLURM.search(self.message):
            return f"it left no message (SLURM's state: {match[2]})"
        lines = [] if _STATUS.search(self.message) else _APPENDED.split(self.message)[0].splitlines()
        return " ".join(lines) or "it left no message"

    def refused(self) -> bool:
        """Whether the stage or SLURM said what is wrong with it, so that the same again would fail again."""
        if match := _ERROR.search(self._text()):
            return not _TRANSIENT.search(match[1])
        ended = _SLURM.search(self.message)
        return bool(_REJECTED.search(self.message)) or bool(ended and ended[2] == "OUT_OF_MEMORY")

    def place(self) -> str:
        """Return SLURM job and node, as a parenthesis; empty without SLURM."""
        if found := place(self._text()):
            return f" (SLURM job {found[0]} on {found[1]})"
        match = _SLURM.search(self.message)
        return f" (SLURM job {match[1]})" if match else ""

    def error(self) -> str | None:
        """Return the error that its log reports, in one line; None if it reports none."""
        return self._error(self._text(), {})

    def _text(self) -> str:
        try:
            return self.log.read_text(errors="replace").replace("\r", "\n") if self.log else ""
        except OSError:
            return ""

    def _error(self, text: str, mem_mb: Mapping[str, int]) -> str | None:
        if match := _ERROR.search(text):
            return match[1].strip()
        if (match := _SLURM.search(self.message)) and match[2] in _SLURM_STATES:
            return _SLURM_STATES[match[2]]
        if self.signal == _KILL or _OUT_OF_MEMORY.search(text):
            need = f"; it is estimated to take {mem_mb[self.rule] / 1000:.1f} GB" if self.rule in mem_mb else ""
            return f"killed without a message, probably because memory ran out{need} (see docs/scale.md)"
        found = _EXCEPTION.findall(text)
        return str(found[-1]).strip() if found else None


def place(text: str) -> tuple[str, str] | None:
    """Return the SLURM job and the node that a job's log names; None if it names none."""
    match = _PLACE.search(text)
    return (match[1], match[2]) if match else None


class Record:
    """The failed jobs of a run, as Snakemake's logger reports them.

    ``keep`` is a filter for the logger, and ``passes`` one for the terminal's handler. A job that a retry finishes is
    forgotten.

    Attributes:
        on_refusal: called with the number of a job that would fail again, before Snakemake decides on a retry.
        refusals: messages of the workflow's own errors, such as a mistake in the configuration.
        stopped: whether the run was asked to stop.
        summarised: whether the summary is printed.
    """

    def __init__(self) -> None:
        self.on_refusal: Callable[[int], None] = lambda number: None
        self.refusals: list[str] = []
        self.stopped = False
        self.summarised = False
        self._messages: list[str] = []
        self._jobs: dict[int, Failure] = {}
        self._group_log = ""

    def keep(self, record: logging.LogRecord) -> bool:
        """Note a record; all pass, except for jobs that have not failed themselves."""
        text, event = str(record.msg), getattr(record, "event", None)
        self.stopped |= text.startswith(_BY_USER)
        if event == "error":
            self._messages.append(text)
        elif event == "group_error":
            self._group_log = next(iter(record.__dict__["aux_logs"]), "")
        elif event == "job_error":
            found = self.failure(record)
            if record.__dict__.get("indent") and not (found.log and found.log.exists()):
                return False  # of a group, and not yet begun when another job of it failed
            self._jobs[found.number] = found
            if found.refused():
                self.on_refusal(found.number)
        elif event == "job_finished":
            self._jobs.pop(record.__dict__["job_id"], None)
        return True

    def passes(self, record: logging.LogRecord) -> bool:
        """Whether the terminal shows a record, because the summary does not replace it."""
        text, event = str(record.msg), getattr(record, "event", None)
        if event == "error" and "CalledProcessError" in text and _STATUS.search(text):
            return False
        return not (text.startswith(_REPLACED) or (self.summarised and text.endswith(_FINAL)))

    def failures(self) -> list[Failure]:
        """Return the failed jobs, in the order in which they failed."""
        return [replace(job, message=job.message or self._message(job.log)) for job in self._jobs.values()]

    def failure(self, record: logging.LogRecord) -> Failure:
        """Return the failure that a record of the event ``job_error`` reports."""
        return _failure(record, self._group_log if record.__dict__.get("indent") else "")

    def refusal(self, record: logging.LogRecord) -> str | None:
        """Return the message of the workflow's own error that a record reports; None if it reports none."""
        if getattr(record, "event", None) != "error":
            return None
        # Snakemake indents the lines of a message and writes rule, wildcards and traceback around them.
        return next((text for text in self.refusals if text.splitlines()[0] in str(record.msg)), None)

    def _message(self, log: Path | None) -> str:
        return next((text for text in self._messages if log and str(log) in text), "")


class Brief(logging.Formatter):
    """Reports a failed or stopped job in one line, while others go on, and the workflow's own errors as their messages.

    The rest is left to another formatter.
    """

    def __init__(self, found: Record, others: logging.Formatter) -> None:
        super().__init__()
        self._found, self._others = found, others

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        if (refusal := self._found.refusal(record)) is not None:
            return f"Error: {refusal}"
        if getattr(record, "event", None) != "job_error":
            return self._others.format(record)
        one = self._found.failure(record)
        logs = ", ".join(filter(None, (str(one.log or ""), one.slurm_log))) or "none"
        why = f": {one.reason({})}" if one.message or one.slurm_log else ""
        return f"{one.name} did not finish{one.place()}{why}; its log: {logs}"


def _failure(record: logging.LogRecord, group_log: str = "") -> Failure:
    """Return the failure that a record of the event ``job_error`` reports."""
    values = record.__dict__
    own, *more = [*(values.get("log") or []), *([group_log] if group_log else [])] or [None]
    log = Path(own) if own else None
    return Failure(
        values["rule_name"], log, str(values.get("rule_msg") or ""), more[-1] if more else "", values["jobid"]
    )


def summary(
    failures: Sequence[Failure],
    finished: Mapping[str, tuple[int, int]],
    mem_mb: Mapping[str, int],
    log: str,
    stopped: bool = False,
) -> list[str]:
    """Return the lines that a run ends with if not all of its jobs did.

    Args:
        failures: the failed jobs.
        finished: for each rule of the run, how many of its jobs are finished, and how many there are.
        mem_mb: memory that each rule is estimated to take, in MB.
        log: Snakemake's own log, which has the commands.
        stopped: whether the run was asked to stop.
    """
    done, jobs = sum(have for have, _ in finished.values()), sum(of for _, of in finished.values())
    names = [name if have == of else f"{name} ({have} of {of})" for name, (have, of) in finished.items() if have]
    state = f"  finished: {done} of {jobs} jobs{': ' if names else ''}{', '.join(names)}"
    failed = [failure for failure in failures if not failure.stopped()]
    if not failed:
        return ["stopped; the same command resumes", state] if stopped or failures else []
    if len(failed) == 1:
        (one,) = failed
        return [
            f"{one.name} failed{one.place()}",
            f"  reason:   {one.reason(mem_mb)}",
            f"  log:      {one.log or '(none)'} ({_and_slurm(one)}Snakemake's own, with the command: {log})",
            f"  to do:    put this right and run the same command; it goes on with {one.rule}",
            state,
        ]
    lines = [f"{one.name} failed: {one.reason(mem_mb)} (log: {one.log or 'none'})" for one in failed[:MOST]]
    more = f"{len(failed) - MOST} more failed; " if len(failed) > MOST else ""
    rules = ", ".join(dict.fromkeys(one.rule for one in failed))
    return [
        *lines,
        f"  to do:    {more}put this right and run the same command; it goes on with {rules} (commands: {log})",
        state,
    ]


def _and_slurm(one: Failure) -> str:
    return f"SLURM's: {one.slurm_log}; " if one.slurm_log else ""
