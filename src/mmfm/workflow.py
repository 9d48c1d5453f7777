"""What the Snakefile needs from Python: variants of a target, a rule's parameter, GPU limit, stale locks."""

import fcntl
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from mmfm import config
from mmfm.infra.store import canonical_json

MIXTURE_SETTINGS = ("gmm", "mode")


@dataclass(frozen=True)
class Variant:
    """The values that a target's name may carry: ``dinov2_mode.seed1.tiny.k512.t10``.

    Attributes:
        seed: of training and sampling.
        model: entry of `models`.
        k: number of modes; None for settings without a mixture.
        t: time points of the solver; None where sampling is not concerned.
    """

    seed: int
    model: str
    k: int | None
    t: int | None

    def __str__(self) -> str:
        parts = [f"seed{self.seed}", self.model]
        if self.k is not None:
            parts.append(f"k{self.k}")
        if self.t is not None:
            parts.append(f"t{self.t}")
        return ".".join(parts)

    @property
    def training(self) -> "Variant":
        """The part that determines the trained weights."""
        return replace(self, t=None)


def variant_pattern(models: Iterable[str]) -> str:
    """Return the regular expression of any variant, the empty one included, each part led by a dot."""
    return rf"(\.seed\d+)?(\.({'|'.join(map(re.escape, models))}))?(\.k\d+)?(\.t\d+)?"


def complete_pattern(models: Iterable[str]) -> str:
    """Return the regular expression of ``SETTING.VARIANT`` for variants that leave nothing to the configuration."""
    head, mixture = rf"\.seed\d+\.({'|'.join(map(re.escape, models))})", "|".join(MIXTURE_SETTINGS)
    return rf"(({mixture}){head}\.k\d+|(?!{mixture})[a-z]+{head})\.t\d+"


def parse_variant(text: str, setting: str, settings: config.Config) -> Variant:
    """Complete a variant such as ``.k512.t10`` with the configured values.

    Raises:
        ValueError: it names a number of modes for a setting without a mixture.
    """
    match = re.fullmatch(variant_pattern(settings.models), text)
    if match is None:
        raise ValueError(f"'{text}' is no variant such as .seed1.{settings.train.model}.k512.t10")
    seed, model, k, t = (match.group(i) for i in (1, 3, 4, 5))
    has_mixture = setting in MIXTURE_SETTINGS
    if k and not has_mixture:
        raise ValueError(f"the setting '{setting}' has no mixture, so '{k}' means nothing; leave it out")
    return Variant(
        seed=int(seed[5:]) if seed else settings.train.seed,
        model=model or settings.train.model,
        k=(int(k[2:]) if k else settings.gmm.n_components) if has_mixture else None,
        t=int(t[2:]) if t else settings.sample.time_points,
    )


def stage_parameter(settings: config.Config, stage: str, encoder: str = "", **replaced: dict[str, object]) -> str:
    """Return the one parameter of a rule: canonical JSON of the identity and budget keys that its stage reads.

    Args:
        replaced: keys that the target's name sets, by section, e.g. ``gmm={"n_components": 512}``.
    """
    values = config.stage_settings(settings, stage, encoder)
    for section, keys in replaced.items():
        values[section] = {**values[section], **keys}
    return canonical_json(values)


def gpus_per_job(wanted: str | int, limit: int | None) -> int:
    """Return the GPUs of each GPU job.

    Args:
        wanted: the key `gpus`: a number, or ``auto`` for the limit.
        limit: Snakemake's global limit of the resource ``gpu``; None where there is none.

    Raises:
        ValueError: more are wanted than the limit. Snakemake would clamp the request without a word.
    """
    if wanted == "auto":
        return limit or 0
    if not isinstance(wanted, int) or wanted < 0:
        raise ValueError(f"'gpus' is '{wanted}'; it must be a number or auto")
    if limit is not None and wanted > limit:
        raise ValueError(
            f"'gpus' is {wanted}, but only {limit} are available (the limit of the resource 'gpu' in the profile); "
            "lower it, set it to auto, or raise the limit with --resources gpu=N"
        )
    return wanted


def prepare_environment() -> None:
    """Make ``python`` in shell commands the one that runs Snakemake, also when its environment is not active.

    The package's own folder goes onto PYTHONPATH, so that rules run in a conda environment (which holds only what the
    package needs) find it.
    """
    for variable, first in (("PATH", Path(sys.executable).parent), ("PYTHONPATH", Path(__file__).parents[1])):
        rest = [os.environ[variable]] if os.environ.get(variable) else []
        os.environ[variable] = os.pathsep.join([str(first), *rest])


def clear_stale_locks(folder: Path) -> IO[str]:
    """Remove Snakemake's lock files if no process that wrote them is alive.

    After ``kill -9`` Snakemake's own lock stays for ever and the same command would be refused. Every running Snakemake
    holds an operating-system lock through this function instead, which dies with its process: whoever gets it
    exclusively is alone, and lock files that lie there are left over.

    Args:
        folder: Snakemake's ``.snakemake`` folder.

    Returns:
        The open lock file; keep it for as long as the process lives.
    """
    folder.mkdir(exist_ok=True)
    handle = open(folder / "mmfm.lock", "w")  # noqa: SIM115 - held open for the life of the process
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pass
    else:
        for lock in (folder / "locks").glob("*.lock"):
            lock.unlink(missing_ok=True)
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle
