"""The one way from killed to finished.

A stage that is cut into units (shards, groups of modes) hands them to :func:`run_units`. A stage that goes on from
checkpoints of its own asks :func:`restore` first and ends with :func:`publish`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mmfm.config import STAGES, StageConfig
from mmfm.infra import disk, stage_state
from mmfm.infra.distributed import Ranks
from mmfm.infra.progress import Progress
from mmfm.stages.provenance import Inputs

Unit = TypeVar("Unit")

Advance = Callable[..., None]
"""(images of this process that are done, a note) -> None."""


@dataclass(frozen=True)
class Context:
    """What a stage works with; inside ``with`` its state is nobody else's.

    Attributes:
        config: what it reads of the configuration.
        ranks: this process among the others.
        inputs: digests of what it reads.
        identity: what its results depend on besides the inputs; JSON values.
        outputs: places of the results by their names. The first is replaced in one step; the others, which describe it,
            are never there beside another one.
        state: directory of its unfinished work, see :mod:`mmfm.infra.stage_state`.
    """

    config: StageConfig
    ranks: Ranks
    inputs: Inputs
    identity: Mapping[str, Any]
    outputs: Mapping[str, Path]
    state: Path

    @classmethod
    def open(
        cls,
        config: StageConfig,
        ranks: Ranks,
        inputs: Inputs,
        outputs: Mapping[str, Path],
        identity: Mapping[str, Any] | None = None,
    ) -> "Context":
        """Take the state directory that belongs to configuration and inputs; a collective call.

        Args:
            identity: where it is more than ``config.identity()``.

        Raises:
            ValueError: another process is at work there.
        """
        known = config.identity() if identity is None else identity
        first, version = next(iter(outputs.values())), STAGES[config.stage].version
        state = ranks.from_main(
            lambda: stage_state.state_directory(first, config.stage, version, known, inputs.digests, inputs.files)
        )
        return cls(config, ranks, inputs, known, outputs, state)

    def __enter__(self) -> "Context":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let go of the state, if the stage came to its end."""
        if kind is None and self.ranks.is_main:
            stage_state.unlock(self.state)

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self.config.stage

    @property
    def version(self) -> int:
        """VERSION of the stage."""
        return STAGES[self.stage].version


def run_units(
    context: Context,
    units: Sequence[Unit],
    *,
    make: Callable[[list[Unit], Advance], None],
    is_done: Callable[[Unit], bool],
    publish: Callable[[Path], None],
    size: Callable[[Unit], int] = len,
    prepare: Callable[[], None] = lambda: None,
    bytes_written: Callable[[], int] = lambda: 0,
    complete: Callable[[], None] = lambda: None,
) -> bool:
    """Make the units that are missing, and of all of them the results; a collective call.

    Results of a run that was finished are put in their places again. A unit is made by one process, so results don't
    depend on their number, and a restarted run makes only what is missing.

    Args:
        make: called with its units on every process, if any is missing; a unit is done when its last file is renamed.
        is_done: whether an earlier run finished a unit; asked on the main process.
        publish: writes the results, under their names in ``context.outputs``, into the folder that it is given; on the
            main process.
        size: images of a unit.
        prepare: makes the state ready for the units; on the main process.
        bytes_written: by the stage when it is finished, all together; asked on the main process.
        complete: called on every process when all units are there.

    Returns:
        Whether the stage was finished before.
    """
    ranks, total = context.ranks, sum(map(size, units))
    if restore(context):
        Progress(context.stage, total, "images", done=total, enabled=ranks.is_main)
        return True

    def begin() -> None:
        prepare()
        disk.require(context.state, context.stage, bytes_written())

    ranks.from_main(begin)
    if not make_missing(context, units, make=make, is_done=is_done, size=size):
        Progress(context.stage, total, "images", done=total, enabled=ranks.is_main)
    complete()
    finish(context, publish)
    return False


def make_missing(
    context: Context,
    units: Sequence[Unit],
    *,
    make: Callable[[list[Unit], Advance], None],
    is_done: Callable[[Unit], bool],
    size: Callable[[Unit], int] = len,
    counted: str = "images",
) -> bool:
    """Deal the units that are missing to the processes, and have each make its own; see :func:`run_units`.

    Returns:
        Whether any was missing.
    """
    ranks, total = context.ranks, sum(map(size, units))
    # One process looks at the disk, so that all deal from the same list.
    missing = ranks.from_main(lambda: [number for number, unit in enumerate(units) if not is_done(unit)])
    if not missing:
        return False
    mine = deal([size(units[number]) for number in missing], ranks.world)[ranks.rank]
    done = total - sum(size(units[number]) for number in missing)
    with Progress(context.stage, total, counted, done=done, enabled=ranks.is_main) as progress:

        def advance(images: int, note: str = "") -> None:
            # The others are about as far.
            progress.advance(min(images * ranks.world, total - progress.done), note)

        make([units[missing[number]] for number in mine], advance)
        ranks.barrier()
        progress.advance(total - progress.done)
    return True


def deal(sizes: Sequence[int], world: int) -> list[list[int]]:
    """Deal jobs to processes by the longest-processing-time rule (Graham 1969).

    Returns:
        For every process the numbers of its jobs, ascending; the largest load is at most 4/3 of the best possible.
    """
    hands: list[list[int]] = [[] for _ in range(world)]
    loads = [0] * world
    for job in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        lightest = loads.index(min(loads))
        hands[lightest].append(job)
        loads[lightest] += sizes[job]
    return [sorted(hand) for hand in hands]


def restore(context: Context, budget: Mapping[str, Any] | None = None, wanted: Sequence[str] = ()) -> bool:
    """Put the results in their places if the stage is finished, and say whether it is; a collective call.

    Args:
        budget: how far it was to go; None for a stage without.
        wanted: names of results that must be among them.
    """
    return context.ranks.from_main(
        lambda: stage_state.restore(context.state, context.outputs, budget=budget, wanted=wanted)
    )


def finish(context: Context, write: Callable[[Path], None], budget: Mapping[str, Any] | None = None) -> None:
    """Publish the results that ``write`` puts into the folder that it is given; a collective call.

    Args:
        budget: how far the stage has gone, where more would continue it: what it would go on from stays.
    """

    def publish() -> None:
        with stage_state.finishing(context.state, context.outputs, budget=budget) as finished:
            write(finished)

    context.ranks.from_main(publish)


def amend(context: Context, write: Callable[[Path], None]) -> None:
    """Publish what ``write`` adds to results that are published already; of the main process."""
    with stage_state.finishing(context.state, context.outputs, amend=True) as finished:
        write(finished)
