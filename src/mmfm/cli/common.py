"""What the stages' commands share: the parser, settings from a parameter or from YAML, operation keys."""

import argparse
import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from mmfm import config

DETECTORS: tuple[str, ...] = config.Fid.__dataclass_fields__["detector"].metadata["choices"]
"""Values of ``fid.detector``, and so of ``--detector``."""


def _explain(section: type, prefix: str) -> Iterator[str]:
    """Yield a line for every key of a section's dataclass, nested sections included."""
    hints = typing.get_type_hints(section)
    for f in dataclasses.fields(section):
        name = f"{prefix}.{f.name}"
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _explain(hints[f.name], name)
            continue
        choices = f": {' | '.join(f.metadata['choices'])}" if f.metadata["choices"] else ""
        unit = f" [{f.metadata['unit']}]" if f.metadata["unit"] else ""
        yield f"  {name:<28} {f.metadata['help']}{choices}{unit} ({f.metadata['kind']})"


class StageParser(argparse.ArgumentParser):
    """Parser of a stage's command.

    Settings come from ``--settings`` (the JSON that Snakemake passes) or, by hand, from ``--config`` files, and
    ``section.key=value`` arguments go over either. A stage sees only the sections in :data:`mmfm.config.STAGES`.
    """

    def __init__(self, stage: str, description: str) -> None:
        super().__init__(
            prog=f"mmfm {stage}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.stage = stage
        self.epilog = self._keys()
        source = self.add_mutually_exclusive_group()
        source.add_argument("--settings", metavar="JSON", help="settings as Snakemake passes them")
        source.add_argument(
            "--config", metavar="YAML", action="append", help="configuration files, later over earlier; by hand"
        )
        self.add_argument("--encoder", default="dinov2", help="name in `encoders` (with --config; default dinov2)")
        self.add_argument("overrides", nargs="*", metavar="section.key=value", help="single keys over the rest")

    def _keys(self) -> str:
        lines = ["keys that this stage reads (meaning in config/README.md):"]
        for name in config.STAGES[self.stage]:
            lines += _explain(config.SECTIONS[name], name)
        return "\n".join(lines) if len(lines) > 1 else ""

    def parse(self, arguments: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
        """Return the options and the built sections by name.

        Raises:
            ValueError: a key is unknown, missing, mistyped or out of range.
        """
        options = self.parse_args(arguments)
        for override in options.overrides:
            if "=" not in override:
                self.error(f"unexpected argument '{override}'; settings are given as section.key=value")
        return options, _sections(self.stage, options)


def _sections(stage: str, options: argparse.Namespace) -> dict[str, Any]:
    if options.settings is None:
        loaded = config.load(options.config or ["config/config.yaml"], options.overrides)
        return {name: loaded.section(name, options.encoder) for name in config.STAGES[stage]}
    try:
        values = json.loads(options.settings)
    except json.JSONDecodeError as error:
        raise ValueError(f"--settings takes JSON as Snakemake passes it ({error}); by hand give --config") from error
    overrides = config.parse_overrides(options.overrides)
    for name in overrides:
        if name not in config.STAGES[stage]:
            raise ValueError(f"{stage} reads no section '{name}'{config.nearest(name, config.STAGES[stage])}")
    return {name: config.build(config.SECTIONS[name], _merge(values.get(name, {}), overrides.get(name, {})), name)
            for name in config.STAGES[stage]}  # fmt: skip


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merge(merged[name], value) if both else value
    return merged
