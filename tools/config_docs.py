"""Generate documentation of the configuration and the stages from mmfm.config.

This writes config/README.md, workflow/schemas/config.schema.json, the table of stages in docs/stages.md, and their
graph in README.md.

python tools/config_docs.py            write them
python tools/config_docs.py --check    exit with status 1 if one is out of date
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
from mmfm.config.keys import NEVER

ROOT = Path(__file__).parent.parent
README = ROOT / "config" / "README.md"
STAGES = ROOT / "docs" / "stages.md"
FRONT = ROOT / "README.md"
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.json"

NOT_RERUN = (
    {("guide", key): ["train"] for key in ("weights", "scale", "interval")}
    | {("fid", key): ["reconstruction"] for key in ("reference", "metrics", "reference_images")}
    | {
        ("gmm", "n_components"): ["sweep"],
        ("gmm", "weights"): ["mode_quality", "sweep"],
        ("spatial_gmm", "weights"): ["mode_quality"],
        ("train", "weights"): ["mode_quality"],
    }
)
"""By section and key: stages that the key does not rerun although the other keys of its section do."""

INTRODUCTION = """\
# Configuration

Put your values into a file and lay it over `config/config.yaml`, which holds the defaults:
`snakemake results/fid/dinov2_mode.txt --cores all --configfile mine.yaml`. Keys that depend on the images have no
default: `mmfm init FOLDER` looks at yours and writes such a file. The demo's values, `config/demo.yaml`, apply exactly
when `data.root` is `demo`. A key that does not exist, or a value of the wrong type, is an error that names it.
(`--config key=value` turns nested numbers into text; use a file.) Snakemake needs the package in its own environment,
and a workflow that imports this one gives its keys in the module statement
([docs/deployment.md](../docs/deployment.md)).

Every key has one of three kinds:

* **identity**: changes the numbers. The stages under "reruns" run again.
* **budget**: how far to go. The same stages run again, but the first continues from its last state if the value is
  raised.
* **operation**: speed, memory, logging. Nothing runs again.

A key counts only where it is used:

* The keys of another encoder or model rerun nothing, nor do those of `gmm` in `uncond` and `class`.
* Unless `decoder.weights` is `train`, the other keys of `decoder` rerun nothing.
* `label_dropout` and `label_draw` count only in `class` and `class_gmm`; `mode_dropout` only in `mode`; `assignment`,
  `means_precision` and `mode_draw` only in settings with a mixture.
* The other keys of `loss_weighting` count only with a `rule`; `rtol` and `atol` only with an adaptive solver.
* `steps` above 0 replaces `epochs`, and `warmup_steps` replaces `warmup_epochs`; the other keys of `initial_phase`
  count only if its `epochs` are above 0.

`recipes` give single settings and models other values of `train` (also the guide, whose model is `guide.model`). They
win over `train`; only the trainings that they are for run again, and no training may match two:

    recipes:
      mixtures: {settings: [gmm, mode], models: [XL], train: {lr: 4.0e-4, loss_weighting: {rule: focal}}}

To sweep over values, put them into the target's name, which can carry `seed`, the model, `k` (modes), `step` (of the
training), `t` (time points) and `g` (guidance scale). Variants share the steps they have in common:

    snakemake --cores all results/fid/dinov2_mode.seed{0,1,2}.txt results/fid/dinov2_gmm.k{16,256}.t4.txt

`python tools/config_docs.py` generates this page and `workflow/schemas/config.schema.json`.
"""

TABLE_HEAD = ["| key | meaning | unit | default | kind | reruns |", "|---|---|---|---|---|---|"]


def reruns(section: str) -> list[str]:
    """Return the stages that run again if an identity key of ``section`` changes, in workflow order."""
    # The rule `train` trains the guide, with some keys of `train` replaced by those of `guide`.
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
        section = {"encoders": "encoder", "models": "model", "recipes": "train"}.get(f.name, f.name)
        entry = {} if kind is not hint else values.get(f.name, {})
        again = reruns(section)
        lines += [f"## {name}", "", (kind.__doc__ or "").strip(), ""]
        lines += [*TABLE_HEAD, *rows(kind, entry, section, "", again), ""]
    top = [f for f in dataclasses.fields(config.Config) if f.metadata["kind"] != "section"]
    lines += ["## Top level", "", *TABLE_HEAD]
    lines += [row(f, values[f.name], "", list(config.STAGES)) for f in top]
    lines += ["", "Changing `run` starts from scratch in another folder. Changing it back reruns nothing.", ""]
    return "\n".join(lines)


def rows(kind: type, values: dict[str, Any], section: str, prefix: str, again: list[str]) -> list[str]:
    """Return the table rows of a section, nested ones included; its keys rerun the stages ``again``."""
    result = []
    for f in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[f.name]
        if dataclasses.is_dataclass(hint):
            result += rows(hint, values.get(f.name, {}), section, f"{prefix}{f.name}.", again)
        else:
            rerun = [s for s in again if s not in NOT_RERUN.get((section, f.name), [])]
            result.append(row(f, values.get(f.name), prefix, rerun))
    return result


def _default(f: dataclasses.Field, value: Any) -> Any:
    """Return a key's default: that of config.yaml, or else what it was before there was the key; None if required."""
    if value is not None or f.metadata["as_before"] is NEVER:
        return value
    return list(f.metadata["as_before"]) if isinstance(f.metadata["as_before"], tuple) else f.metadata["as_before"]


def row(f: dataclasses.Field, value: Any, prefix: str, again: list[str]) -> str:
    """Return one table row."""
    choices = f" ({', '.join(f'`{c}`' for c in f.metadata['choices'])})" if f.metadata["choices"] else ""
    value = _default(f, value)
    shown = '`""`' if value == "" else f"`{str(value).lower() if isinstance(value, bool) else value}`"
    if value is None:
        shown = "required"
    kind = f.metadata["kind"]
    reran = "nothing" if kind == "operation" else ", ".join(again)
    cells = (f"`{prefix}{f.name}`", f.metadata["help"] + choices, f.metadata["unit"], shown, kind, reran)
    return f"| {' | '.join(cells)} |"


def schema(kind: type) -> dict[str, Any]:
    """Return the JSON schema of a section; no key is required, because files override others."""
    hints = typing.get_type_hints(kind)
    properties = {f.name: _property(hints[f.name], f.metadata) for f in dataclasses.fields(kind)}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _property(hint: Any, metadata: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(hint):
        return schema(hint)
    if metadata.get("part_of"):
        return {**schema(metadata["part_of"]), "description": metadata["help"]}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        fewest = {"minProperties": 1} if metadata["as_before"] is NEVER else {}
        return {"type": "object", **fewest, "additionalProperties": schema(arguments[1])}
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
    """Return the table for docs/stages.md."""
    lines = ["| stage | what it does | reads outputs of | writes | unit of resumption |", "|---|---|---|---|---|"]
    for name, stage in config.STAGES.items():
        parents = ", ".join(f"`{parent}`" for parent in stage.parents) or "the image folder"
        outputs = ", ".join(f"`{output}`" for output in stage.outputs)
        lines.append(
            f"| `{name}` | {stage.summary} | {parents} | {outputs} | {stage.unit or 'none (nothing to resume)'} |"
        )
    return "\n".join(lines)


def stage_graph() -> str:
    """Return the graph for README.md in Mermaid syntax, without arrows that another path implies."""
    lines = ["```mermaid", "flowchart LR"]
    for name, stage in config.STAGES.items():
        for parent in stage.parents:
            if not any(other in registry.below(parent) for other in stage.parents if other != parent):
                lines.append(f"    {parent} --> {name}")
    return "\n".join([*lines, "```"])


def between_markers(path: Path, text: str) -> str:
    """Return a document with the text between its markers replaced."""
    before, rest = path.read_text().split("<!-- stages: written by tools/config_docs.py -->\n")
    return (
        f"{before}<!-- stages: written by tools/config_docs.py -->\n{text}\n<!-- end -->{rest.split('<!-- end -->')[1]}"
    )


def main() -> int:
    """Write or check the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check instead of writing")
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
            print(f"{path.relative_to(ROOT)} is out of date; run python tools/config_docs.py")
        else:
            path.write_text(texts[path])
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
