"""How a stage resumes: find its state, make what is missing, publish the results.

A stage whose work splits into independent units (shards, groups of modes) passes them to :func:`run_units`. A stage
that resumes from checkpoints of its own begins with :func:`restore` and ends with :func:`finish`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from mmfm.config import STAGES, StageConfig
from mmfm.infra import disk, stage_state
from mmfm.infra.distributed import Ranks
from mmfm.infra.heartbeat import Heartbeat
from mmfm.infra.progress import Progress
from mmfm.stages.provenance import Inputs

Unit = TypeVar("Unit")

Advance = Callable[..., None]
"""(number of images that this process has just finished, note for the progress line) -> None."""


@dataclass(frozen=True)
class Context:
    """What a stage runs with. As a context manager it holds the lock on the state directory and beats.

    Attributes:
        config: the sections of the configuration that the stage reads.
        ranks: this process among the others.
        inputs: digests of the files that the stage reads.
        identity: everything else that determines the results, as JSON values.
        outputs: final paths of the results, by name. The first is replaced atomically; the others describe it and never
            lie beside a different one.
        state: directory of the unfinished work; see :mod:`mmfm.infra.stage_state`.
        heartbeat: of the main process; None on the others.
    """

    config: StageConfig
    ranks: Ranks
    inputs: Inputs
    identity: Mapping[str, Any]
    outputs: Mapping[str, Path]
    state: Path
    heartbeat: Heartbeat | None = None

    @classmethod
    def open(
        cls,
        config: StageConfig,
        ranks: Ranks,
        inputs: Inputs,
        outputs: Mapping[str, Path],
        identity: Mapping[str, Any] | None = None,
    ) -> "Context":
        """Create or find the state directory of this configuration and these inputs, and lock it; a collective call.

        Args:
            identity: replaces ``config.identity()`` if the results depend on more than that.

        Raises:
            ValueError: another process is using the state directory.
        """
        known = config.identity() if identity is None else identity
        first, version = next(iter(outputs.values())), STAGES[config.stage].version
        state = ranks.from_main(
            lambda: stage_state.state_directory(first, config.stage, version, known, inputs.digests, inputs.files)
        )
        heartbeat = Heartbeat(state, config.stage, first.name) if ranks.is_main else None
        return cls(config, ranks, inputs, known, outputs, state, heartbeat)

    def __enter__(self) -> "Context":
        if self.heartbeat is not None:
            self.heartbeat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Release the lock if the stage succeeded; after an error it is held until the process ends."""
        if self.heartbeat is not None:
            self.heartbeat.end(error)
        if kind is None and self.ranks.is_main:
            stage_state.unlock(self.state)

    @property
    def version(self) -> int:
        """Version of the stage, from the registry."""
        return STAGES[self.config.stage].version


@dataclass(frozen=True)
class Work(Generic[Unit]):
    """Work that splits into independent units, each made by one process.

    Attributes:
        units: all of them, in order.
        make: makes the given units. Called on every process, perhaps with none; must write the file that marks a unit
            as done last.
        is_done: whether an earlier run made a unit; called on the main process.
        begin: called on every process before units are made, if any is missing.
        size: number of images in a unit.
        counted: what the progress line counts.
    """

    units: Sequence[Unit]
    make: Callable[[list[Unit], Advance], None]
    is_done: Callable[[Unit], bool]
    begin: Callable[[], None] = lambda: None
    size: Callable[[Any], int] = len
    counted: str = "images"

    @property
    def total(self) -> int:
        """Number of images in all units."""
        return sum(map(self.size, self.units))


def run_units(
    context: Context,
    work: Work[Unit],
    *,
    publish: Callable[[Path], None],
    prepare: Callable[[], None] = lambda: None,
    bytes_written: Callable[[], int] = lambda: 0,
    complete: Callable[[], None] = lambda: None,
) -> bool:
    """Make the missing units and publish the results, or restore the results of a finished run; a collective call.

    One process makes a unit, so the results do not depend on the number of processes.

    Args:
        publish: writes the results into the given folder, under their names in ``context.outputs``; called on the main
            process.
        prepare: prepares the state directory for the units; called on the main process.
        bytes_written: bytes that the stage writes in total, to check the free disk space; called on the main process.
        complete: called on every process once all units are made.

    Returns:
        Whether the stage was already finished.
    """
    ranks = context.ranks
    if restore(context):
        _report_all_done(context, work)
        return True

    def begin() -> None:
        prepare()
        disk.require(context.state, context.config.stage, bytes_written())

    ranks.from_main(begin)
    if not make_missing(context, work):
        _report_all_done(context, work)
    complete()
    finish(context, publish)
    return False


def _report_all_done(context: Context, work: Work[Unit]) -> None:
    """Print that the stage resumes with nothing left to make."""
    Progress(context.config.stage, work.total, "images", done=work.total, enabled=context.ranks.is_main)


def make_missing(context: Context, work: Work[Unit]) -> bool:
    """Distribute the missing units over the processes and make them; a collective call.

    Returns:
        Whether any was missing.
    """
    ranks, units, total, stage = context.ranks, work.units, work.total, context.config.stage
    # Only the main process looks at the disk, so that all processes share out the same list.
    missing = ranks.from_main(lambda: [number for number, unit in enumerate(units) if not work.is_done(unit)])
    if not missing:
        return False
    work.begin()
    sizes = [work.size(units[number]) for number in missing]
    mine = deal(sizes, ranks.world)[ranks.rank]
    with Progress(stage, total, work.counted, done=total - sum(sizes), enabled=ranks.is_main) as progress:

        def advance(images: int, note: str = "") -> None:
            # The other processes are assumed to be equally fast.
            progress.advance(min(images * ranks.world, total - progress.done), note)

        work.make([units[missing[number]] for number in mine], advance)
        ranks.barrier()
        progress.advance(total - progress.done)
    return True


def deal(sizes: Sequence[int], world: int) -> list[list[int]]:
    """Assign jobs to processes by the longest-processing-time rule (Graham 1969).

    Returns:
        The job numbers of every process, ascending. The largest load is at most 4/3 of the optimum.
    """
    hands: list[list[int]] = [[] for _ in range(world)]
    loads = [0] * world
    for job in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        lightest = loads.index(min(loads))
        hands[lightest].append(job)
        loads[lightest] += sizes[job]
    return [sorted(hand) for hand in hands]


def restore(context: Context, budget: Mapping[str, Any] | None = None, wanted: Sequence[str] = ()) -> bool:
    """Put the results back in place and return True if the stage is finished; a collective call.

    Args:
        budget: the configured budget; None for a stage without one.
        wanted: names of results without which the stage is not finished.
    """
    return context.ranks.from_main(
        lambda: stage_state.restore(context.state, context.outputs, budget=budget, wanted=wanted)
    )


def finish(context: Context, write: Callable[[Path], None], budget: Mapping[str, Any] | None = None) -> None:
    """Publish the results that ``write`` puts into the given folder; a collective call.

    Args:
        budget: the budget reached, if a larger one can continue the stage; the checkpoints are then kept.
    """

    def publish() -> None:
        with stage_state.finishing(context.state, context.outputs, budget=budget) as finished:
            write(finished)

    context.ranks.from_main(publish)


def amend(context: Context, write: Callable[[Path], None]) -> None:
    """Add what ``write`` puts into the given folder to the published results; call on the main process only."""
    with stage_state.finishing(context.state, context.outputs, amend=True) as finished:
        write(finished)
