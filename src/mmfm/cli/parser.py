"""What the stages' commands share: the parser, settings from a parameter or from YAML, operation keys."""

import argparse
import dataclasses
import json
from collections.abc import Iterator

from mmfm import config


def _explain(section: type, prefix: str) -> Iterator[str]:
    """Yield a line for every key of a section's dataclass, nested sections included."""
    for name, _, about in config.declared(section, f"{prefix}."):
        choices = f": {' | '.join(about['choices'])}" if about["choices"] else ""
        unit = f" [{about['unit']}]" if about["unit"] else ""
        yield f"  {name:<28} {about['help']}{choices}{unit} ({about['kind']})"


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
        for name in config.STAGES[self.stage].sections:
            lines += _explain(config.SECTIONS[name], name)
        return "\n".join(lines) if len(lines) > 1 else ""

    def parse(self, arguments: list[str]) -> tuple[argparse.Namespace, config.StageConfig]:
        """Return the options and what the stage reads of the configuration.

        Raises:
            ValueError: a key is unknown, missing, mistyped or out of range.
        """
        options = self.parse_args(arguments)
        for override in options.overrides:
            if "=" not in override:
                self.error(f"unexpected argument '{override}'; settings are given as section.key=value")
        return options, _configuration(self.stage, options)


def _configuration(stage: str, options: argparse.Namespace) -> config.StageConfig:
    setting = getattr(options, "setting", None)
    if options.settings is None:
        loaded = config.load(options.config or ["config/config.yaml"], options.overrides)
        return config.StageConfig.of(loaded, stage, encoder=options.encoder, setting=setting)
    try:
        values = json.loads(options.settings)
    except json.JSONDecodeError as error:
        raise ValueError(f"--settings takes JSON as Snakemake passes it ({error}); by hand give --config") from error
    overrides = config.parse_overrides(options.overrides)
    return dataclasses.replace(config.StageConfig.build(stage, values, overrides), setting=setting)
