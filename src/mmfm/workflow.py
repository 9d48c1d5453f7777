"""What the Snakefile needs from Python: variants of a target, a rule's parameter, GPU limit, stale locks."""

import fcntl
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mmfm import config
from mmfm.infra.store import canonical_json
from mmfm.settings import SETTINGS, effective

_GUIDANCE = r"\.g\d+(\.\d+)?"


@dataclass(frozen=True)
class Variant:
    """The values that a target's name may carry: ``dinov2_mode.seed1.tiny.k512.t10`` or ``dinov2_mode_ag.t10.g1.5``.

    Attributes:
        seed: of training and sampling.
        model: entry of `models`.
        k: number of modes; None for settings without a mixture.
        t: time points of the solver; None where sampling is not concerned.
        g: guidance scale; None where there is no guidance to scale.
    """

    seed: int
    model: str
    k: int | None
    t: int | None
    g: float | None = None

    def __str__(self) -> str:
        parts = [f"seed{self.seed}", self.model]
        if self.k is not None:
            parts.append(f"k{self.k}")
        if self.t is not None:
            parts.append(f"t{self.t}")
        if self.g is not None:
            parts.append(f"g{_decimal(self.g)}")
        return ".".join(parts)


def _decimal(value: float) -> str:
    """Write a scale without exponent or needless zeros: 1.5, 2, 0.00001."""
    text = f"{value:.6f}".rstrip("0").rstrip(".")
    return text or "0"


def has_null_label(setting: str, settings: config.Config) -> bool:
    """Whether a setting's model can do without a label, so that classifier-free guidance is possible."""
    dropout = {"class": settings.train.label_dropout, "mode": settings.train.mode_dropout, None: 0.0}
    return dropout[SETTINGS[setting].condition] > 0


def any_of(names: Iterable[str]) -> str:
    """Return the regular expression of any of the names."""
    return f"({'|'.join(map(re.escape, names))})"


def variant_pattern(models: Iterable[str]) -> str:
    """Return the regular expression of any variant, the empty one included, each part led by a dot."""
    return rf"(\.seed\d+)?(\.{any_of(models)})?(\.k\d+)?(\.t\d+)?({_GUIDANCE})?"


def complete_pattern(settings: config.Config) -> str:
    """Return the regular expression of ``SETTING[_ag].VARIANT`` whose variant leaves nothing to the configuration."""
    whole = []
    for name, setting in SETTINGS.items():
        modes = r"\.k\d+" if setting.mixture else ""
        for guide in ("", "_ag"):
            scale = _GUIDANCE if guide or has_null_label(name, settings) else ""
            whole.append(rf"{name}{guide}\.seed\d+\.{any_of(settings.models)}{modes}\.t\d+{scale}")
    return f"({'|'.join(whole)})"


def parse_variant(text: str, setting: str, settings: config.Config, guided: bool = False) -> Variant:
    """Complete a variant such as ``.k512.t10`` with the configured values.

    Args:
        guided: whether the target is one of autoguidance (``_ag``).

    Raises:
        ValueError: it names a number of modes for a setting without a mixture, or a guidance scale where there is no
            guidance.
    """
    match = re.fullmatch(variant_pattern(settings.models), text)
    if match is None:
        raise ValueError(f"'{text}' is no variant such as .seed1.{settings.train.model}.k512.t10.g1.5")
    seed, model, k, t, g = (match.group(i) for i in (1, 3, 4, 5, 6))
    has_mixture, has_scale = SETTINGS[setting].mixture, guided or has_null_label(setting, settings)
    if k and not has_mixture:
        raise ValueError(f"the setting '{setting}' has no mixture, so '{k}' means nothing; leave it out")
    if g and not has_scale:
        raise ValueError(
            f"the setting '{setting}' is trained without label dropout, so '{g}' can't be a scale of classifier-free "
            f"guidance; leave it out, or take '{setting}_ag' for autoguidance"
        )
    scale = settings.guide.scale if guided else settings.sample.guidance.scale
    return Variant(
        seed=int(seed[5:]) if seed else settings.train.seed,
        model=model or settings.train.model,
        k=(int(k[2:]) if k else settings.gmm.n_components) if has_mixture else None,
        t=int(t[2:]) if t else settings.sample.time_points,
        g=(float(g[2:]) if g else scale) if has_scale else None,
    )


def guidance_keys(scale: float | None, guided: bool, settings: config.Config) -> dict[str, object]:
    """Return the section ``sample.guidance`` of a job.

    Args:
        scale: that of the target's name; None where there is no guidance.
        guided: whether it is autoguidance.
    """
    if scale is None:
        return {"scale": 1.0, "interval": [0.0, 1.0]}
    interval = settings.guide.interval if guided else settings.sample.guidance.interval
    return {"scale": scale, "interval": list(interval)}


def stage_parameter(
    settings: config.Config, stage: str, encoder: str = "", setting: str = "", **replaced: dict[str, object]
) -> str:
    """Return the one parameter of a rule: canonical JSON of the identity and budget keys that its stage reads.

    The stage's VERSION goes with them (the commands pass over it), so that raising it makes the stage run again.

    Args:
        setting: of the stages that have one; keys that it does not use are not the configured ones.
        replaced: keys that the target's name sets, by section, e.g. ``gmm={"n_components": 512}``.
    """
    values = config.stage_settings(settings, stage, encoder)
    if setting:
        values = effective(setting, values)
    for section, keys in replaced.items():
        values[section] = {**values[section], **keys}
    values["version"] = config.VERSIONS[stage]
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
    exclusively is alone, and lock files that lie there are left over. Otherwise one line says who else is at work:
    Snakemake refuses only what both would make, in words that suggest removing the lock.

    Args:
        folder: Snakemake's ``.snakemake`` folder.

    Returns:
        The open lock file; keep it for as long as the process lives.
    """
    folder.mkdir(exist_ok=True)
    handle = open(folder / "mmfm.lock", "a+")  # noqa: SIM115 - held open for the life of the process
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.seek(0)
        others = [pid for pid in handle.read().split() if pid != str(os.getpid()) and Path(f"/proc/{pid}").exists()]
        if others:
            print(
                f"another Snakemake (process {', '.join(others)}) is at work in this folder: what it makes is locked; "
                "wait for it, or end it, and run the same command again",
                file=sys.stderr,
            )
    else:
        handle.truncate(0)
        for lock in (folder / "locks").glob("*.lock"):
            lock.unlink(missing_ok=True)
    fcntl.flock(handle, fcntl.LOCK_SH)
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle
