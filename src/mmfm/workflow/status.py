"""What is finished, running, stopped and failed in a results folder, from the files in it alone.

Jobs are found by the heartbeats in their state directories (:mod:`mmfm.infra.heartbeat`), and jobs without state by
their logs. So this is right while jobs run on other machines, and when Snakemake is dead. Nothing is written, and
nothing here imports NumPy or PyTorch.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmfm.config.registry import STAGES
from mmfm.infra import heartbeat
from mmfm.infra.heartbeat import FAILED, STOPPED, Beat
from mmfm.workflow import outputs
from mmfm.workflow.failure import Failure

RUNNING = "running"

_LARGE = re.compile(r".*\.zarr|step-.*|images|finished|logs|benchmarks|\..*")
"""Folders in which there is no state."""

_BESIDES = {
    "heldout": ("gmm/*/k*/heldout.json", "gmm/*/heldout.json"),
    "memorisation": ("memorisation/*.*.json",),
    "curve": ("curve/*.json",),
}
"""What rules make that are no stages, for they keep no state; copies under the shortest names are left out."""

_UNIT = re.compile(r"(step|iteration|shard|component)-.*?(\d+)(\.\w+)?")
_LINE = re.compile(r"^([^:\n]+): ([\d,]+)/([\d,]+) (\S+) \(\d+ %\)  ([\d,.]+)/s  left \S+(?:  (.*))?$", re.MULTILINE)
_TAIL = 1 << 16
"""Bytes at the end of a log in which progress is looked for."""

_STARTING = 15.0
"""Seconds after a beat from which a line in the log must be of another run; what dies may still say why."""


@dataclass(frozen=True)
class Count:
    """How far a job is: units done, of how many, per second, seconds left if known, and the progress line's note."""

    task: str
    done: int
    total: int
    unit: str
    rate: float
    left: float | None
    note: str


@dataclass(frozen=True)
class Job:
    """A job that is not finished.

    Attributes:
        condition: :data:`RUNNING`, ``stopped`` or ``failed``.
        rule: name of its rule, in most cases a stage.
        name: encoder, setting and variant, as in the name of its log; a folder if the stage was started by hand.
        count: how far it is; None if not known.
        host, slurm_job: where it runs or ran; empty if not known.
        saved: what a run that takes it up need not make again, such as ``step 60``; empty if nothing.
        heard: seconds since it was last heard of.
        idle: seconds since it last advanced; 0 if not known.
        reason: why it failed or stopped; empty if not known.
        log: its log; None if there is none.
    """

    condition: str
    rule: str
    name: str
    count: Count | None
    host: str
    slurm_job: str
    saved: str
    heard: float
    idle: float = 0.0
    reason: str = ""
    log: Path | None = None


@dataclass(frozen=True)
class Status:
    """The state of a results folder.

    Attributes:
        results: the folder.
        distances: name in ``fid/`` without ending, Frechet distance, and what it may be called.
        finished: number of finished results by stage, in workflow order, then of rules that are no stages.
        jobs: the others, by condition, then in workflow order.
        strange: files that are named like heartbeats, but are none, with what is wrong.
    """

    results: Path
    distances: list[tuple[str, float, str]] = field(default_factory=list)
    finished: dict[str, int] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)


def find(place: Path) -> list[Path]:
    """Return the results folders in a place: itself, and the folders of runs (the key `run`) in it.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not place.is_dir():
        raise FileNotFoundError(
            f"no folder '{place}'; give the folder of the results (before the first run there is none)"
        )
    runs = [path for path in sorted(place.iterdir()) if (path / "logs").is_dir() or (path / "fid").is_dir()]
    return [place, *runs]


def read(results: Path, now: float, others: Sequence[Path] = ()) -> Status:
    """Read the state of a results folder.

    Args:
        now: seconds since 1970.
        others: folders in it that are read on their own.
    """
    found = Status(results, _distances(results))
    done = set()
    for stage in STAGES:
        made = outputs.find(stage, results)
        done |= {outputs.job_name(stage, path, results) for path in made}
        if made:
            found.finished[stage] = len(made)
    for rule, places in _BESIDES.items():
        if count := sum(len(list(results.glob(place))) for place in places):
            found.finished[rule] = count
    beating = _beating(found, now, others)
    found.jobs.extend(beating.values())
    for log in sorted((results / "logs").glob("*.log")):
        if log.stem not in beating and log.stem not in done and (job := _from_log(log, now)):
            found.jobs.append(job)
    found.jobs.sort(key=_order)
    return found


def _order(job: Job) -> tuple[int, int, str, str]:
    stages = [*STAGES]
    place = stages.index(job.rule) if job.rule in stages else len(stages)
    return [RUNNING, STOPPED, FAILED].index(job.condition), place, job.rule, job.name


def _distances(results: Path) -> list[tuple[str, float, str]]:
    """Return the finished distances; of a result and its copy under a short name only the copy."""
    found: dict[str, tuple[str, float, str]] = {}
    for path in sorted((results / "fid").glob("*.txt"), key=lambda path: -len(path.name)):
        try:
            text = path.with_suffix(".json").read_text()
            record = json.loads(text)
            found[text] = (path.stem, float(record["frechet_distance"]), str(record["measure"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another file, or one that `mmfm compare` will complain about
    return sorted(found.values())


def _beating(found: Status, now: float, others: Sequence[Path]) -> dict[str, Job]:
    """Return the unfinished jobs with a heartbeat by the names of their logs, of each folder the newest."""
    newest: dict[str, tuple[tuple[bool, float], Job]] = {}
    for path in _heartbeats(found.results, others):
        try:
            beat = heartbeat.read(path)
        except FileNotFoundError:
            continue  # finished meanwhile
        except (OSError, ValueError) as error:
            found.strange.append(str(error))
            continue
        output, alive = path.parents[1] / beat.output, beat.is_alive(now)
        if not alive and _modified(output) >= beat.written:
            continue  # killed after it published, or finished with other keys since
        name = outputs.job_name(beat.stage, output, found.results)
        log = found.results / "logs" / f"{name}.log"
        job = _from_beat(beat, path.parent, output.parent.relative_to(found.results), log, alive, now)
        rank = (alive, beat.written)
        if name not in newest or newest[name][0] < rank:
            newest[name] = rank, job
    return {name: job for name, (_, job) in newest.items()}


def _heartbeats(results: Path, others: Sequence[Path]) -> Iterator[Path]:
    """Yield the files of heartbeats, without a look into folders of thousands of files."""
    for folder, names, _ in os.walk(results, followlinks=True):
        here = Path(folder)
        for name in names:
            if name.startswith("state-") and (here / name / heartbeat.FILE).exists():
                yield here / name / heartbeat.FILE
        names[:] = sorted(
            n for n in names if not n.startswith("state-") and not _LARGE.fullmatch(n) and here / n not in others
        )


def _from_beat(beat: Beat, state: Path, folder: Path, log: Path, alive: bool, now: float) -> Job:
    """Describe a job with a heartbeat.

    Args:
        folder: of its outputs, relative to the results.
        log: where its log is, if Snakemake started it.
    """
    condition, reason = beat.outcome or (RUNNING if alive else STOPPED), beat.reason
    told, heard = log if log.is_file() else None, max(0.0, now - beat.written)
    counted: Count | None = Count(beat.task, beat.done, beat.total, beat.unit, beat.rate, beat.left(), beat.note)
    if not beat.task:  # its first beat; the log may know more by now
        counted = _last_line(told) if told else None
    if condition == STOPPED:
        reason = "asked to stop" if beat.outcome else "killed"
    if told and not alive:
        again = _modified(told)
        error = Failure(beat.stage, told).error()
        if error and not beat.outcome:
            condition, reason = FAILED, error
        elif not error and again > beat.written + _STARTING and now - again < heartbeat.SILENCE:
            # The same command runs again, and has not come to its state yet.
            return Job(RUNNING, beat.stage, _below(folder), None, "", "", _saved(state), now - again, log=told)
    return Job(
        condition, beat.stage, _below(folder), counted, beat.host, beat.slurm_job, _saved(state),
        heard, max(0.0, beat.written - beat.advanced), reason, told,
    )  # fmt: skip


def _below(folder: Path) -> str:
    return ".".join(folder.parts[1:])


def _saved(state: Path) -> str:
    """Return the newest checkpoint in a state directory, or how many independent units are finished there."""
    numbers: dict[str, list[int]] = {}
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
        names = os.listdir(state)
    for name in names:
        if match := _UNIT.fullmatch(name):
            numbers.setdefault(match[1], []).append(int(match[2]))
    for kind, found in numbers.items():
        if kind in ("step", "iteration"):
            return f"{kind} {max(found):,}" if max(found) else ""
        return f"{len(found):,} {kind}{'s' * (len(found) != 1)}"
    return ""


def _from_log(log: Path, now: float) -> Job | None:
    """Describe a job that has only a log; None if it is finished."""
    rule, _, name = log.stem.partition(".")
    changed = _modified(log)
    # Snakemake writes a job's benchmark at its good end.
    if _modified(log.parents[1] / "benchmarks" / f"{log.stem}.tsv") >= changed:
        return None
    error, heard = Failure(rule, log).error(), max(0.0, now - changed)
    condition = FAILED if error else RUNNING if heard < heartbeat.SILENCE else STOPPED
    return Job(condition, rule, name, _last_line(log), "", "", "", heard, reason=error or "", log=log)


def _last_line(log: Path) -> Count | None:
    """Return what the last progress line of a log says."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = _LINE.findall(file.read().decode(errors="replace"))
    except FileNotFoundError:  # removed meanwhile, to begin again
        return None
    if not lines:
        return None
    task, done, total, unit, rate, note = lines[-1]
    numbers = [float(text.replace(",", "")) for text in (done, total, rate)]
    left = (numbers[1] - numbers[0]) / numbers[2] if numbers[2] else None
    return Count(task, int(numbers[0]), int(numbers[1]), unit, numbers[2], left, note)


def _modified(path: Path) -> float:
    """Return when a file was modified, in seconds since 1970; 0 if there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
