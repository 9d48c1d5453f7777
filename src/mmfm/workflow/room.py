"""Whether a target fits a machine: the estimates of its stages against disk, memory and GPU memory."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfm.config import Config
from mmfm.config.registry import STAGES
from mmfm.infra import disk
from mmfm.workflow import checks, outputs
from mmfm.workflow.costs import USABLE, Resources
from mmfm.workflow.outlook import duration
from mmfm.workflow.targets import Target

_LONGEST = 60 * 86400
"""Seconds beyond which a machine counts as too slow."""

_CGROUPS = Path("/sys/fs/cgroup")

_REMEDIES = {
    "extract": "extract.batch_size",
    "fit_gmm": "gmm.chunk_size and gmm.cache_gb",
    "spatial_gmm": "spatial_gmm.batch_size",
    "train_decoder": "decoder.micro_batch",
    "train": "train.micro_batch (see also train.checkpoint_activations and train.sharding)",
    "train (guide)": "train.micro_batch",
    "sample": "sample.batch_size",
    "fid_reference": "fid.batch_size",
    "fid": "fid.batch_size",
}
"""Keys that take less memory at smaller values."""


@dataclass(frozen=True)
class Machine:
    """What stages run on.

    Attributes:
        processes: of every stage.
        gpu_memory: bytes of the smallest GPU; None without GPUs, 0 if not known.
        memory: bytes of host memory that this process may take.
    """

    processes: int
    gpu_memory: int | None
    memory: int

    @property
    def on_gpu(self) -> bool:
        """Whether each process has a GPU."""
        return self.gpu_memory is not None


def unfinished(found: Mapping[str, Resources], target: Target, results: Path) -> dict[str, Resources]:
    """Return the stages of a target whose outputs are not there yet; whether these are up to date is not checked."""
    left = {}
    for name, taken in found.items():
        stage = name.partition(" ")[0]
        if not outputs.find(stage, results, **_names(target, guide=stage != name)):
            left[name] = taken
    return left


def _names(target: Target, guide: bool) -> dict[str, object]:
    """Return what a target says of the paths of its stages' outputs; the guide's training is any."""
    variant, flow = target.variant, f"{target.encoder}_{target.setting}"
    training = ".".join([f"seed{variant.seed}", variant.model, *([f"k{variant.k}"] if variant.k else [])])
    return {
        "encoder": target.encoder, "k": variant.k, "trained": flow, "training": "*.guide" if guide else training,
        "sampled": f"{flow}{'_ag' if target.guided else ''}", "variant": variant,
    }  # fmt: skip


def caches(left: Sequence[tuple[Target, Mapping[str, Resources]]]) -> float:
    """Return the bytes of the latent caches that the stages still to run of several targets need, one per encoder."""
    largest: dict[str, float] = {}
    for target, stages in left:
        largest[target.encoder] = max([largest.get(target.encoder, 0.0), *(taken.cached for taken in stages.values())])
    return sum(largest.values())


def disk_needs(
    left: Mapping[str, Resources], cached: float, results: Path, latents: Path
) -> list[tuple[list[Path], float, int]]:
    """Return, for every disk, the folders on it, the bytes that stages still write there, and the free bytes.

    Args:
        left: the stages still to run.
        cached: bytes of latents that they keep in ``latents``.
    """
    kept = sum(taken.disk - taken.cached for taken in left.values())
    needs = {results: kept}
    if cached > (there := disk.used(latents)):
        needs[latents] = cached - there
    by_disk: dict[int, list[Path]] = {}
    for folder in needs:
        by_disk.setdefault(_device(folder), []).append(folder)
    return [(folders, sum(needs[folder] for folder in folders), disk.free(folders[0])) for folders in by_disk.values()]


def _device(folder: Path) -> int:
    folder = folder.absolute()
    return next(path.stat().st_dev for path in (folder, *folder.parents) if path.exists())


def missing_images(left: Mapping[str, Resources], config: Config, results: Path) -> str:
    """Return why the images of ``data.root`` can't be listed, with the remedy; empty if they can, or need not be."""
    listed = (results / "list_images" / "listing.train.safetensors").exists()
    stages = {name.partition(" ")[0] for name in left}
    if config.fid.reference != "train":
        stages.discard("fid_reference")
    if listed or config.data.root == "demo" or not any("list_images" in STAGES[stage].parents for stage in stages):
        return ""
    try:
        checks.images(config.data.root)
    except ValueError as error:
        return str(error)
    return ""


def problems(
    left: Mapping[str, Resources], disks: list[tuple[list[Path], float, int]], machine: Machine
) -> Iterator[str]:
    """Yield what will not fit, each in one line with a remedy."""
    for folders, needed, free in disks:
        if needed > free:
            names = " and ".join(f"'{folder}'" for folder in folders)
            yield (
                f"{names} will take about {_gb(needed)} more, but only {_gb(free)} are free; free some space, or link "
                "to a larger disk"
            )
    if (seconds := sum(taken.seconds for taken in left.values())) > _LONGEST:
        yield (
            f"this machine is too slow: the stages would take about {duration(seconds)}; take one with "
            f"{'more ' if machine.on_gpu else ''}GPUs, or a smaller configuration"
        )
    for stage, taken in left.items():
        host, card = 1e6 * taken.mem_mb(machine.processes, machine.on_gpu), machine.gpu_memory
        keys = _REMEDIES.get(stage) or _REMEDIES.get(stage.partition(" ")[0])
        remedy = f"lower {keys}" if keys else "take a larger machine"
        if host > machine.memory:
            fewer = " or `processes`" if machine.processes > 1 else ""
            yield f"{stage} needs about {_gb(host)} of memory, but there are {_gb(machine.memory)}; {remedy}{fewer}"
        if card and taken.device > USABLE * card:
            yield f"{stage} needs about {_gb(taken.device)} of GPU memory, but a card has {_gb(card)}; {remedy}"


def table(found: Mapping[str, Resources], left: Mapping[str, Resources], machine: Machine) -> list[str]:
    """Return what every stage takes, one line each."""
    rows = [["stage", "disk", "memory", *(["each GPU"] if machine.on_gpu else []), ""]]
    for stage, taken in found.items():
        host = 1e6 * taken.mem_mb(machine.processes, machine.on_gpu)
        sizes = [taken.disk - taken.cached, host, *([taken.device] if machine.on_gpu else [])]
        rows.append([stage, *map(_gb, sizes), "" if stage in left else "finished"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for stage, *cells in rows:
        right = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"  {stage:<{widths[0]}}  {'  '.join(right)}".rstrip())
    return lines


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def memory() -> int:
    """Return the bytes of host memory that this process may take: the machine's, or what its control groups allow."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2, or 1
            root, name = (_CGROUPS / controllers, "memory.limit_in_bytes" if controllers else "memory.max")
            folder = root / place.lstrip("/")
            limits += [_limit(path / name) for path in (folder, *folder.parents) if path.is_relative_to(root)]
    return min(limit for limit in limits if limit)


def _limit(path: Path) -> int:
    """Return the limit in a control group's file; 0 if there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max"
        return 0
