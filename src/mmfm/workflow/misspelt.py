"""What is wrong with names that are no target, and which target is meant."""

import difflib
import re
from pathlib import Path

from mmfm import config
from mmfm.config.choices import SETTINGS
from mmfm.workflow import curves
from mmfm.workflow.targets import (
    COMPARISON,
    DOCUMENT,
    ENDINGS,
    GUIDANCE,
    any_of,
    parse_curve,
    parse_seeds,
    parse_variant,
)

_PART = re.compile(rf"\.g{curves.VALUE}(?:,{curves.VALUE})*(?![^.])|\.[^.]*")
"""A part of a name with its dot; the number of a guidance scale may have another."""


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
    kinds = (seeds, rf"\.{models}", rf"\.k\d+{more}", rf"\.step\d+{more}", rf"\.t\d+{more}", rf"{GUIDANCE}{more}")
    return next((place for place, form in enumerate(kinds) if re.fullmatch(form, part)), None)
