"""The state of a results folder as text for people."""

from collections.abc import Sequence

from mmfm.infra.heartbeat import FAILED, SILENCE, STOPPED
from mmfm.workflow.outlook import duration
from mmfm.workflow.status import RUNNING, Job, Status

_LONG = 120.0
"""Seconds without progress that are worth a word."""


def render(status: Status) -> list[str]:
    """Return the lines that describe a results folder."""
    jobs = {condition: [j for j in status.jobs if j.condition == condition] for condition in (RUNNING, STOPPED, FAILED)}
    counts = [f"{len(found)} {condition}" for condition, found in jobs.items() if found]
    lines = [f"{status.results}: {', '.join([_results(status), *counts])}"]
    lines += _finished(status)
    lines += _running(jobs[RUNNING])
    lines += _stopped(jobs[STOPPED])
    lines += _failed(jobs[FAILED])
    return [*lines, *(["", *(f"ignored: {text}" for text in status.strange)] if status.strange else [])]


def is_empty(status: Status) -> bool:
    """Whether there is nothing to tell."""
    return not (status.distances or status.finished or status.jobs or status.strange)


def _results(status: Status) -> str:
    count, stages = len(status.distances), sum(status.finished.values())
    return f"{count} result{'s' * (count != 1)} and {stages} stage{'s' * (stages != 1)} finished"


def _finished(status: Status) -> list[str]:
    lines = []
    if status.distances:
        lines += ["", "finished", *_table([[name, f"{value:.4g}", of] for name, value, of in status.distances], "<><")]
    if status.finished:
        stages = ", ".join(f"{stage} {count}" if count > 1 else stage for stage, count in status.finished.items())
        lines += ["", f"finished stages: {stages}"]
    return lines


def _running(jobs: Sequence[Job]) -> list[str]:
    if not jobs:
        return []
    head = ["running", "", "done", "", "rate", "time left", "saved", "heard of", "node"]
    rows = []
    for job in jobs:
        count, left = job.count, job.count.left if job.count else None
        rate, time = (f"{count.rate:,.1f}/s" if count else "", "" if left is None else duration(left))
        rows.append([job.rule, job.name, *_done(job), rate, time, job.saved, _ago(job.heard), _node(job)])
    table = _table([head, *rows], "<<><>>><<", head=True)
    lines = ["", table[0].removeprefix("  ")]
    for job, line in zip(jobs, table[1:], strict=True):
        lines += [line, *(f"    {text}" for text in _remarks(job))]
    return lines


def _remarks(job: Job) -> list[str]:
    """Return what else there is to say of a running job."""
    said = []
    if job.count and job.count.task != job.rule:
        said.append(job.count.task)
    if job.count and job.count.note:
        said.append(job.count.note)
    if job.heard > _LONG:
        said.append(f"silent; after {duration(SILENCE)} it counts as stopped")
    elif job.idle > _LONG:
        said.append(f"alive, but no progress for {duration(job.idle)}")
    return ["; ".join(said)] if said else []


def _stopped(jobs: Sequence[Job]) -> list[str]:
    if not jobs:
        return []
    rows = []
    for job in jobs:
        then = f"resumes after {job.saved}" if job.saved else "starts over"
        rows.append([job.rule, job.name, *_done(job), then, job.reason, f"last heard of {_ago(job.heard)}", _node(job)])
    return ["", "stopped; the same command resumes", *_table(rows, "<<><<<<<")]


def _failed(jobs: Sequence[Job]) -> list[str]:
    lines = ["", "failed; put it right, and the same command resumes"] if jobs else []
    rows = [[job.rule, job.name, *_done(job), _ago(job.heard), _node(job)] for job in jobs]
    for job, line in zip(jobs, _table(rows, "<<><<<"), strict=True):
        lines += [line, f"    {job.reason}", *([f"    log: {job.log}"] if job.log else [])]
    return lines


def _done(job: Job) -> list[str]:
    """Return how far a job is, in two cells: units done, and of how many."""
    count = job.count
    if count is None:
        return ["", ""]
    share = f" ({100 * count.done / count.total:.0f} %)" if count.total else ""
    return [f"{count.done:,}", f"of {count.total:,} {count.unit}{share}"]


def _node(job: Job) -> str:
    return f"{job.host}{f' (SLURM job {job.slurm_job})' if job.slurm_job else ''}"


def _ago(seconds: float) -> str:
    return f"{duration(seconds)} ago"


def _table(rows: Sequence[Sequence[str]], alignment: str, head: bool = False) -> list[str]:
    """Return rows of cells as indented lines, aligned left (<) or right (>), without the columns that are empty.

    Args:
        head: whether the first row has the columns' names.
    """
    columns = [column for column in range(len(alignment)) if any(row[column] for row in rows[head:])]
    widths = {column: max(len(row[column]) for row in rows) for column in columns}
    return [
        f"  {'  '.join(f'{row[column]:{alignment[column]}{widths[column]}}' for column in columns)}".rstrip()
        for row in rows
    ]
