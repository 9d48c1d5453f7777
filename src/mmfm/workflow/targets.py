"""Names of targets, completed from the configuration."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mmfm import config
from mmfm.config.choices import SETTINGS, SOLVERS
from mmfm.workflow import curves

ENDINGS = {
    "fid": ("txt", "json"),
    "memorisation": ("png", "json"),
    "mode_quality": ("png", "txt", "json"),
    "curve": ("png", "txt", "json"),
    "reconstruction": ("txt", "json", "png"),
}
"""Folders of results that have targets' names, and the endings of their files, the usual one first."""

COMPARISON = "comparison"
"""Stem of the files that compare the settings of a run; they lie in the folder of its results."""

OF_IMAGES = ("fid", "memorisation", "mode_quality")
"""Those about one set of generated images, whose names may be short: what they leave out is as configured."""

GUIDANCE = r"\.g\d+(\.\d+)?"
"""Regular expression for the part of a name with the guidance scale."""

_NUMBER = r"(0|[1-9]\d*)"  # as `str` writes it: another spelling would be another name of the same thing


@dataclass(frozen=True)
class Variant:
    """The values in a target's name, such as ``dinov2_mode.seed1.tiny.k512.t10`` or ``dinov2_mode_ag.t10.g1.5``.

    A variant without time points and scale names a training; with a step, the weights of one of its milestones.

    Attributes:
        seed: seed of training and sampling.
        model: entry of `models`.
        k: number of modes; None for settings without a mixture.
        t: time points of the solver; None for a training.
        g: guidance scale; None without guidance.
        step: step of the training whose weights are meant; None for the last.
    """

    seed: int
    model: str
    k: int | None
    t: int | None
    g: float | None = None
    step: int | None = None

    def __str__(self) -> str:
        parts = [f"seed{self.seed}", self.model]
        if self.k is not None:
            parts.append(f"k{self.k}")
        if self.step is not None:
            parts.append(f"step{self.step}")
        if self.t is not None:
            parts.append(f"t{self.t}")
        if self.g is not None:
            parts.append(f"g{_decimal(self.g)}")
        return ".".join(parts)


def _decimal(value: float) -> str:
    """Format a scale without exponent or trailing zeros: 1.5, 2, 0.00001."""
    text = f"{value:.6f}".rstrip("0").rstrip(".")
    return text or "0"


def has_null_label(setting: str, model: str, configuration: config.Config) -> bool:
    """Whether a model is trained with label dropout, as classifier-free guidance requires."""
    train = configuration.train_of(setting, model)
    dropout = {"class": train.label_dropout, "mode": train.mode_dropout, None: 0.0}
    return dropout[SETTINGS[setting].condition] > 0


def any_of(names: Iterable[str]) -> str:
    """Return a regular expression that matches any of the names."""
    return f"({'|'.join(map(re.escape, names))})"


def variant_pattern(models: Iterable[str]) -> str:
    """Return a regular expression for variants; every part starts with a dot and may be missing."""
    return rf"(\.seed\d+)?(\.{any_of(models)})?(\.k\d+)?(\.step\d+)?(\.t\d+)?({GUIDANCE})?"


def seeds_pattern(models: Iterable[str]) -> str:
    """Return a regular expression for the variants of several seeds: the number of seeds, then as for one."""
    return rf"\.seeds\d+(\.{any_of(models)})?(\.k\d+)?(\.step\d+)?(\.t\d+)?({GUIDANCE})?"


def complete_pattern(configuration: config.Config) -> str:
    """Return a regular expression for ``SETTING[_ag].VARIANT`` with no part missing."""
    whole = []
    for name, setting in SETTINGS.items():
        modes = rf"\.k{_NUMBER}" if setting.mixture else ""
        for model in configuration.models:
            for guide in ("", "_ag"):
                scale = rf"\.g{_NUMBER}(\.\d*[1-9])?" if guide or has_null_label(name, model, configuration) else ""
                before = rf"{name}{guide}\.seed{_NUMBER}\.{re.escape(model)}{modes}"
                whole.append(rf"{before}(\.step{_NUMBER})?\.t{_NUMBER}{scale}")
    return f"({'|'.join(whole)})"


def parse_variant(text: str, setting: str, configuration: config.Config, guided: bool = False) -> Variant:
    """Complete a variant such as ``.k512.t10`` with the configured values.

    Args:
        guided: whether the target uses autoguidance (``_ag``).

    Raises:
        ValueError: it has a number of modes for a setting without a mixture, a guidance scale without guidance, no
            modes or time points, or a step that the training does not have.
    """
    match = re.fullmatch(variant_pattern(configuration.models), text)
    if match is None:
        raise ValueError(f"'{text}' is not a variant such as .seed1.{configuration.train.model}.k512.t10.g1.5")
    seed, named, k, step, t, g = (match.group(i) for i in (1, 3, 4, 5, 6, 7))
    model = named or configuration.train.model
    has_mixture, has_scale = SETTINGS[setting].mixture, guided or has_null_label(setting, model, configuration)
    if k and not has_mixture:
        raise ValueError(f"the setting '{setting}' has no mixture; leave out '{k}'")
    if k and int(k[2:]) == 0:
        raise ValueError(f"'{k}' is a mixture without modes; name one or more")
    if t and int(t[2:]) == 0:
        raise ValueError(f"'{t}' has no time point; name two or more, or .t1 for the source alone, decoded")
    if step:
        _check_step(int(step[5:]), configuration.train_of(setting, model).steps)
    if g and not has_scale:
        raise ValueError(
            f"the setting '{setting}' is trained without label dropout, so '{g}' can't be a classifier-free guidance "
            f"scale; leave it out, or use '{setting}_ag' for autoguidance"
        )
    scale = configuration.guide.scale if guided else configuration.sample.guidance.scale
    return Variant(
        seed=int(seed[5:]) if seed else configuration.train.seed,
        model=model,
        k=(int(k[2:]) if k else configuration.gmm.n_components) if has_mixture else None,
        t=int(t[2:]) if t else configuration.sample.time_points,
        g=(float(g[2:]) if g else scale) if has_scale else None,
        step=int(step[5:]) if step else None,
    )


def parse_seeds(text: str, setting: str, configuration: config.Config, guided: bool = False) -> list[Variant]:
    """Complete the variants of several seeds: those of ``.seeds5.k512`` are ``.seed0.k512`` to ``.seed4.k512``.

    Raises:
        ValueError: there are fewer than two seeds; also see :func:`parse_variant`.
    """
    number = re.match(r"\.seeds(\d+)", text)
    if number is None:
        raise ValueError(f"'{text}' is not a variant of several seeds such as .seeds5.k512")
    if int(number[1]) < 2:
        raise ValueError(f"'{number[0]}' has no range; name two seeds or more (.seeds2), or one by itself (.seed0)")
    rest = text[number.end() :]
    return [parse_variant(f".seed{i}{rest}", setting, configuration, guided) for i in range(int(number[1]))]


def _check_step(step: int, steps: int) -> None:
    """Raise ValueError if a training of ``steps`` steps has no such step; 0: it may end at any step."""
    if step == 0:
        raise ValueError("'.step0' is before the first step; the initial weights are no result")
    if 0 < steps < step:
        raise ValueError(
            f"'.step{step}' is after the last step of the training; raise 'train.steps', which is {steps}, or name an "
            "earlier step"
        )


@dataclass(frozen=True)
class Target:
    """A result, with what its name says completed by the configuration.

    Attributes:
        encoder, setting: entry of `encoders`, and name of the setting.
        guided: whether it uses autoguidance.
        variant: the complete variant.
    """

    encoder: str
    setting: str
    guided: bool
    variant: Variant


def parse_target(name: str, configuration: config.Config) -> Target:
    """Parse a result's name: ``results/[RUN/]fid/ENCODER_SETTING[_ag][VARIANT].txt``, or only its last part.

    Raises:
        ValueError: it is not the name of a result of this run, or the setting has no such variant.
    """
    folder, _, last = name.rpartition("/")
    own = _folder("fid", configuration)
    if folder in {str(Path(own).parent), *(_folder(kind, configuration) for kind in ENDINGS if kind != "fid")}:
        example = f"{own}/{next(iter(configuration.encoders))}_mode.txt"
        raise ValueError(f"'{name}' is not a result; give one, such as {example}")
    if folder and folder != own:
        raise ValueError(
            f"'{name}' is not in '{own}', the folder of this configuration's results; "
            "give the configuration that it belongs to"
        )
    encoders, models = configuration.encoders, configuration.models
    head = rf"{any_of(encoders)}_{any_of(SETTINGS)}(_ag)?"
    parts = rf"{head}({variant_pattern(models)})\.(txt|json)"
    match = re.fullmatch(parts, last)
    if match is None and re.fullmatch(rf"{head}{seeds_pattern(models)}\.(txt|json)", last):
        raise ValueError(f"'{last}' sums up the results of several seeds; name one of them, with .seed0 in its place")
    if match is None:
        valid = [f"{encoder}_{setting}.txt" for encoder in encoders for setting in SETTINGS]
        raise ValueError(f"'{last}' is not a result{config.did_you_mean(last, valid)}; there are {', '.join(valid)}")
    encoder, setting, guided, text = match.group(1, 2, 3, 4)
    return Target(encoder, setting, guided is not None, parse_variant(text, setting, configuration, guided is not None))


def compared_settings(configuration: config.Config) -> list[str]:
    """Return the settings of the comparison: those that need neither classes nor a second model.

    Weights of `uncond` are not published.
    """
    return ["gmm", "mode"] if configuration.train.weights == "published" else ["uncond", "gmm", "mode"]


def parse_compared(name: str, configuration: config.Config) -> list[Target]:
    """Parse a result's name, or that of the comparison, ``results/[RUN/]comparison.txt``, which stands for its results.

    Raises:
        ValueError: see :func:`parse_target`.
    """
    folder, _, last = name.rpartition("/")
    own = str(Path(_folder("fid", configuration)).parent)
    if folder not in ("", own) or not re.fullmatch(rf"{COMPARISON}\.(txt|json|png|html)", last):
        return [parse_target(name, configuration)]
    return [
        Target(encoder, setting, False, parse_variant("", setting, configuration))
        for encoder in configuration.encoders
        for setting in compared_settings(configuration)
    ]


def _folder(kind: str, configuration: config.Config) -> str:
    return f"results/{configuration.run}/{kind}" if configuration.run else f"results/{kind}"


def parse_curve(name: str, configuration: config.Config) -> tuple[str, list[Target]]:
    """Parse the name of a curve, ``results/[RUN/]curve/NAME.png`` or only ``NAME``.

    Returns:
        what varies, as :func:`mmfm.workflow.curves.expand` names it, and the result at each point.

    Raises:
        ValueError: it is no such name, or the setting has no such variant.
    """
    folder, _, last = name.rpartition("/")
    own = _folder("curve", configuration)
    if folder and folder != own:
        raise ValueError(
            f"'{name}' is not in '{own}', the folder of this configuration's curves; "
            "give the configuration that it belongs to"
        )
    part, names = curves.expand(re.sub(r"\.(png|txt|json)$", "", last))
    if part == "t" and SOLVERS[configuration.sample.solver].adaptive:
        raise ValueError(
            f"'{last}' lists time points, but sample.solver is {configuration.sample.solver}, which chooses its own; "
            "set it to euler or heun"
        )
    return part, [parse_target(f"{each}.txt", configuration) for each in names]


def parse_targets(name: str, configuration: config.Config) -> list[Target]:
    """Parse the name of a result, or of several seeds or a curve, which stands for all of them.

    A name in another folder of :data:`OF_IMAGES`, such as ``mode_quality/NAME.png``, stands for the same images.

    Raises:
        ValueError: see :func:`parse_target` and :func:`parse_curve`.
    """
    folder, _, last = name.rpartition("/")
    if folder.endswith("/curve"):
        return parse_curve(name, configuration)[1]
    if folder.rpartition("/")[2] in OF_IMAGES[1:]:
        return [parse_target(f"{folder.rpartition('/')[0]}/fid/{Path(last).stem}.txt", configuration)]
    number = re.search(r"\.seeds(\d+)(?=\.)", last)
    if number is None:
        return [parse_target(name, configuration)]
    one = last[: number.start()], last[number.end() :]
    place = f"{folder}/" if folder else ""
    return [parse_target(f"{place}{one[0]}.seed{i}{one[1]}", configuration) for i in range(int(number[1]))]


def guidance_of(scale: float | None, guided: bool, configuration: config.Config) -> config.Guidance:
    """Return the section ``sample.guidance`` of a job.

    Args:
        scale: scale in the target's name; None without guidance.
        guided: whether the target uses autoguidance.
    """
    if scale is None:
        return config.Guidance(1.0, (0.0, 1.0))
    return config.Guidance(scale, configuration.guide.interval if guided else configuration.sample.guidance.interval)


DOCUMENT = "README.md#what-it-does"
"""It explains the names of targets."""
