"""Write what documents say of configuration and stages: all of it stands in mmfm.config.

config/README.md, workflow/schemas/config.schema.json, the table of stages in docs/stages.md, their graph in README.md.

python tools/config_docs.py            write them
python tools/config_docs.py --check    exit with 1 if one is out of step
"""

import argparse
import dataclasses
import json
import sys
import typing
from pathlib import Path
from typing import Any

import yaml

from mmfm import config
from mmfm.config import registry

ROOT = Path(__file__).parent.parent
README = ROOT / "config" / "README.md"
STAGES = ROOT / "docs" / "stages.md"
FRONT = ROOT / "README.md"
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.json"

NOT_RERUN = {("gmm", "n_components"): "sweep"} | {("guide", key): "train" for key in ("weights", "scale", "interval")}
"""Stages that a section's other keys rerun, but not this one: the sweep has numbers of modes of its own."""

INTRODUCTION = """\
# Configuration

`config/config.yaml` holds every key with the value of the embedded demo. Put what you want otherwise into a file of
your own and lay it over: `snakemake results/fid/dinov2_mode.txt --cores all --configfile my.yaml`. A key that does not
exist or a value of the wrong type is an error that names it. (`--config key=value` turns nested numbers into text; use
a file.)

The kinds of keys:

* **identity**: changes the numbers. The stages under "reruns" run again.
* **budget**: how far to go. The same stages run again, but the first goes on from where it stood when the value is
  raised.
* **operation**: speed, memory, logging. Nothing runs again.

The keys of `encoders`, `models` and `decoder` count where they are used: those of another encoder or model rerun
nothing, and of `decoder` only `weights` does unless that is `train`. Without a mixture (`uncond`) those of `gmm` count
for nothing. Nor does what only another setting looks at: `label_dropout` and `label_draw` are of `class`, `class_gmm`,
`mode_dropout` is of `mode`, `assignment`, `means_precision` and `mode_draw` of settings with a mixture; the other keys
of `loss_weighting` count where there is a `rule`, `rtol` and `atol` where the solver chooses its steps.

A target's name can carry `seed`, model, `k` (modes), `t` (time points) and `g` (guidance scale) instead, which is the
way to sweep: everything that two variants share is made once.

    snakemake --cores all results/fid/dinov2_mode.seed{0,1,2}.txt results/fid/dinov2_gmm.k{16,256}.t4.txt

This page and `workflow/schemas/config.schema.json` are written by `python tools/config_docs.py`.
"""

TABLE_HEAD = ["| key | meaning | unit | default | kind | reruns |", "|---|---|---|---|---|---|"]


def reruns(section: str) -> list[str]:
    """Return the stages that run again when an identity key of ``section`` changes, in the order of the workflow."""
    # The rule train makes the guide from the keys of `train`, with those of `guide` in their places.
    first = ["train"] if section == "guide" else registry.readers(section)
    found = {name for stage in first for name in registry.below(stage)}
    return [stage for stage in config.STAGES if stage in found]


def readme(values: dict[str, Any]) -> str:
    """Return the text of config/README.md; ``values`` is the parsed config.yaml."""
    lines = [INTRODUCTION]
    for f in dataclasses.fields(config.Config):
        hint = typing.get_type_hints(config.Config)[f.name]
        if f.metadata["kind"] != "section":
            continue
        kind = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else hint
        name = f"{f.name}.*" if kind is not hint else f.name
        section = {"encoders": "encoder", "models": "model"}.get(f.name, f.name)
        entry = next(iter(values[f.name].values())) if kind is not hint else values[f.name]
        again = reruns(section)
        lines += [f"## {name}", "", (kind.__doc__ or "").strip(), ""]
        lines += [*TABLE_HEAD, *rows(kind, entry, section, "", again), ""]
    top = [f for f in dataclasses.fields(config.Config) if f.metadata["kind"] != "section"]
    lines += ["## Top level", "", *TABLE_HEAD]
    lines += [row(f, values[f.name], "", list(config.STAGES)) for f in top]
    lines += ["", "Changing `run` moves to another folder, where everything is made, and back at no cost.", ""]
    return "\n".join(lines)


def rows(kind: type, values: dict[str, Any], section: str, prefix: str, again: list[str]) -> list[str]:
    """Return the table rows of a section, nested ones included; ``again`` are the stages that its keys rerun."""
    result = []
    for f in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[f.name]
        if dataclasses.is_dataclass(hint):
            result += rows(hint, values[f.name], section, f"{prefix}{f.name}.", again)
        else:
            result.append(row(f, values[f.name], prefix, [s for s in again if NOT_RERUN.get((section, f.name)) != s]))
    return result


def row(f: dataclasses.Field, value: Any, prefix: str, again: list[str]) -> str:
    """Return one table row."""
    choices = f" ({', '.join(f'`{c}`' for c in f.metadata['choices'])})" if f.metadata["choices"] else ""
    shown = '""' if value == "" else str(value).lower() if isinstance(value, bool) else value
    kind = f.metadata["kind"]
    reran = "nothing" if kind == "operation" else ", ".join(again)
    cells = (f"`{prefix}{f.name}`", f.metadata["help"] + choices, f.metadata["unit"], f"`{shown}`", kind, reran)
    return f"| {' | '.join(cells)} |"


def schema(kind: type) -> dict[str, Any]:
    """Return the JSON schema of a section: that of a file laid over others, so that no key is required."""
    hints = typing.get_type_hints(kind)
    properties = {f.name: _property(hints[f.name], f.metadata) for f in dataclasses.fields(kind)}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _property(hint: Any, metadata: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(hint):
        return schema(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return {"type": "object", "minProperties": 1, "additionalProperties": schema(arguments[1])}
    names = {int: "integer", float: "number", bool: "boolean", str: "string"}
    entry: dict[str, Any] = {"description": metadata["help"]}
    if origin is tuple:
        item = _scalar([names[arguments[0]]], metadata if arguments[-1] is ... else {})
        length = {} if arguments[-1] is ... else {"minItems": len(arguments), "maxItems": len(arguments)}
        return {"type": "array", **entry, "items": item, **length}
    return entry | _scalar([names[k] for k in (arguments or (hint,))], metadata)


def _scalar(kinds: list[str], metadata: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": kinds[0] if len(kinds) == 1 else kinds}
    if metadata.get("choices"):
        entry["enum"] = list(metadata["choices"])
    if metadata.get("minimum") is not None:
        entry["minimum"] = metadata["minimum"]
    return entry


def stage_table() -> str:
    """Return the table of docs/stages.md."""
    lines = ["| stage | what it does | reads what these made | writes | unit of resumption |", "|---|---|---|---|---|"]
    for name, stage in config.STAGES.items():
        parents = ", ".join(f"`{parent}`" for parent in stage.parents) or "the image folder"
        outputs = ", ".join(f"`{output}`" for output in stage.outputs)
        lines.append(
            f"| `{name}` | {stage.summary} | {parents} | {outputs} | {stage.unit or 'none (nothing to resume)'} |"
        )
    return "\n".join(lines)


def stage_graph() -> str:
    """Return the graph of README.md, in Mermaid's language: arrows that another path implies are left out."""
    lines = ["```mermaid", "flowchart LR"]
    for name, stage in config.STAGES.items():
        for parent in stage.parents:
            if not any(other in registry.below(parent) for other in stage.parents if other != parent):
                lines.append(f"    {parent} --> {name}")
    return "\n".join([*lines, "```"])


def between_markers(path: Path, text: str) -> str:
    """Return a document with the part between its markers replaced."""
    before, rest = path.read_text().split("<!-- stages: written by tools/config_docs.py -->\n")
    return (
        f"{before}<!-- stages: written by tools/config_docs.py -->\n{text}\n<!-- end -->{rest.split('<!-- end -->')[1]}"
    )


def main() -> int:
    """Write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args()
    values = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "MM-FM configuration"}
    texts = {
        README: readme(values),
        STAGES: between_markers(STAGES, stage_table()),
        FRONT: between_markers(FRONT, stage_graph()),
        SCHEMA: json.dumps({**head, **schema(config.Config)}, indent=1) + "\n",
    }
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if options.check:
            print(f"{path.relative_to(ROOT)} is out of step with mmfm.config; run python tools/config_docs.py")
        else:
            path.write_text(texts[path])
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
