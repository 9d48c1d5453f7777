"""Names of targets, completed from the configuration."""

import difflib
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

_GUIDANCE = r"\.g\d+(\.\d+)?"
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
    return rf"(\.seed\d+)?(\.{any_of(models)})?(\.k\d+)?(\.step\d+)?(\.t\d+)?({_GUIDANCE})?"


def seeds_pattern(models: Iterable[str]) -> str:
    """Return a regular expression for the variants of several seeds: the number of seeds, then as for one."""
    return rf"\.seeds\d+(\.{any_of(models)})?(\.k\d+)?(\.step\d+)?(\.t\d+)?({_GUIDANCE})?"


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

_PART = re.compile(rf"\.g{curves.VALUE}(?:,{curves.VALUE})*(?![^.])|\.[^.]*")
"""A part of a name with its dot; the number of a guidance scale may have another."""


def snakemake_command(path: Path) -> str:
    """Return the command that makes a file; Snakemake expects its path from the folder that holds ``results``."""
    parts = path.absolute().parts
    start = max((i for i, part in enumerate(parts) if part == "results"), default=0)
    return f"snakemake {Path(*parts[start:])} --cores all"


def explain_unknown(target: str, results: str, configuration: config.Config) -> str:
    """Say what is wrong with the name of a result that no rule makes, and which name is meant, if any.

    Args:
        target: the name as typed, ``FOLDER/KIND/NAME`` with a kind of :data:`ENDINGS`, or another run's comparison.
        results: folder of the configuration's results: ``results``, or ``results/RUN``.
    """
    if Path(target).stem == COMPARISON:
        another = _of_another_run(str(Path(target).parent), configuration)
        return f"no target '{target}': {another}.\nThe comparison of this configuration is {results}/{COMPARISON}.txt"
    folder, kind, name = target.rsplit("/", 2)
    wrong, meant = _corrected(kind, name, configuration)
    if folder != results:
        wrong.insert(0, _of_another_run(folder, configuration))
        run = _run(folder)
        if run and not difflib.get_close_matches(run, [configuration.run]):
            meant = ""  # another configuration is, not another name
    own_folder = f"{results}/{kind}"
    hint = f" (did you mean '{own_folder}/{meant}'?)" if meant and f"{own_folder}/{meant}" != target else ""
    return (
        f"no target '{target}'{hint}: {'; '.join(wrong)}.\n"
        f"Targets are {own_folder}/{_form(kind, configuration)} (see {DOCUMENT})"
    )


def _run(folder: str) -> str:
    return folder.removeprefix("results").strip("/")


def _of_another_run(folder: str, configuration: config.Config) -> str:
    """Say that a folder of results is that of another configuration."""
    own = f"this one has {f'`run: {configuration.run}`' if configuration.run else 'no `run`'}"
    if run := _run(folder):
        return f"'{folder}' belongs to a configuration with `run: {run}`, pass it with --configfile ({own})"
    return f"'{folder}' belongs to a configuration without `run` ({own})"


def _form(kind: str, configuration: config.Config) -> str:
    """Return the form of the names of a kind of result."""
    encoders, ending = f"{{{','.join(configuration.encoders)}}}", ENDINGS[kind][0]
    if kind == "reconstruction":
        return f"{encoders}.{ending}"
    form = f"{encoders}_{{{','.join(SETTINGS)}}}[_ag][.seedN][.MODEL][.kN][.stepN][.tN][.gN].{ending}"
    more = {
        "fid": ", or .seedsN for the range of N seeds",
        "curve": f", of which one of .k, .step, .t and .g lists values as in {curves.EXAMPLE}",
    }
    return f"{form}{more.get(kind, '')}, with MODEL one of {', '.join(configuration.models)}"


def _corrected(kind: str, name: str, configuration: config.Config) -> tuple[list[str], str]:
    """Return what is wrong with a result's name, and the name that is meant, if any."""
    head = name.partition(".")[0]
    typed, parts, wrong = _PART.findall(name[len(head) :]), [], []
    endings = [f".{ending}" for ending in ENDINGS[kind]]
    ending = endings[0]
    if typed and typed[-1] in endings:
        ending = typed.pop()
    else:
        wrong.append(f"the name must end in {', '.join(endings[:-1])} or {endings[-1]}")
        if typed and (close := difflib.get_close_matches(typed[-1], endings, n=1)):
            ending = close[0]
            typed.pop()
    if kind == "reconstruction":
        return _corrected_encoder(f"{head}{''.join(typed)}", ending, wrong, configuration)
    about_head, meant = _corrected_head(head, configuration)
    wrong = about_head + wrong
    for part in typed:
        if kind == "curve" and (strays := _no_numbers(part)):
            return [*wrong, f"'{part}' lists {strays}, which is not a number"], ""
        if _place(part, kind, configuration) is None:
            wrong.append(f"'{part}' is neither a part of a name nor an entry of `models`")
            parts += [f".{model}" for model in difflib.get_close_matches(part[1:], list(configuration.models), n=1)]
        else:
            parts.append(part)
    places = [_place(part, kind, configuration) or 0 for part in parts]
    if len(set(places)) < len(places):
        return [*wrong, "a part is there twice"], ""
    if places != sorted(places):
        wrong.append("its parts are in the wrong order")
    match = re.fullmatch(rf"{any_of(configuration.encoders)}_{any_of(SETTINGS)}(_ag)?", meant)
    if match is None:
        return wrong, ""
    text = "".join(part for _, part in sorted(zip(places, parts, strict=True)))
    try:
        if kind == "curve":
            parse_curve(f"{meant}{text}", configuration)
        else:
            parse = parse_seeds if kind == "fid" and text.startswith(".seeds") else parse_variant
            parse(text, match[2], configuration, match[3] is not None)
    except ValueError as error:
        return [*wrong, str(error)], ""
    return wrong, f"{meant}{text}{ending}"


def _corrected_encoder(stem: str, ending: str, wrong: list[str], configuration: config.Config) -> tuple[list[str], str]:
    """Return what is wrong with a name that consists of an encoder's, and the name that is meant, if any."""
    encoders = list(configuration.encoders)
    if stem in encoders:
        return wrong, f"{stem}{ending}"
    close = difflib.get_close_matches(stem, encoders, n=1) or (encoders if len(encoders) == 1 else [])
    wrong = [f"`encoders` has no '{stem}', it has {', '.join(encoders)}", *wrong]
    return wrong, f"{close[0]}{ending}" if close else ""


def _corrected_head(head: str, configuration: config.Config) -> tuple[list[str], str]:
    """Return what is wrong with ``ENCODER_SETTING[_ag]``, and the closest that is right, or an empty string."""
    encoders = list(configuration.encoders)
    heads = [f"{encoder}_{name}{guide}" for encoder in encoders for name in SETTINGS for guide in ("", "_ag")]
    if head in heads:
        return [], head
    close = difflib.get_close_matches(head, heads, n=1, cutoff=0.5)
    meant = close[0] if close else ""
    if match := re.fullmatch(rf"(.+?)_({any_of(SETTINGS)}(_ag)?)", head):
        named = difflib.get_close_matches(match[1], encoders, n=1) or encoders
        meant = f"{named[0]}_{match[2]}" if len(named) == 1 else ""
        return [f"`encoders` has no '{match[1]}', it has {', '.join(encoders)}"], meant
    if encoder := next((name for name in encoders if head.startswith(f"{name}_")), None):
        return [f"'{head.removeprefix(f'{encoder}_')}' is not a setting"], meant
    return [f"'{head}' is not an encoder with a setting"], meant


def _no_numbers(part: str) -> str:
    """Return what is not a number in a part that lists values, each in quotes; empty if there is none."""
    match = re.match(r"\.(t|step|g|k)(?=[^,]*,)", part)
    values = part[match.end() :].split(",") if match else []
    return " and ".join(repr(value) for value in values if not re.fullmatch(curves.VALUE, value))


def _place(part: str, kind: str, configuration: config.Config) -> int | None:
    """Return a part's place in a name; None if it is not a part."""
    seeds, more = (r"\.seeds?\d+" if kind == "fid" else r"\.seed\d+"), rf"(,{curves.VALUE})*" if kind == "curve" else ""
    models = any_of(configuration.models)
    kinds = (seeds, rf"\.{models}", rf"\.k\d+{more}", rf"\.step\d+{more}", rf"\.t\d+{more}", rf"{_GUIDANCE}{more}")
    return next((place for place, form in enumerate(kinds) if re.fullmatch(form, part)), None)
