"""The argument parser of the stages' commands, with the configuration from JSON or YAML."""

import argparse
import dataclasses
import json
from collections.abc import Iterator

from mmfm import config


def _explain(section: type, prefix: str) -> Iterator[str]:
    """Yield a line of help for every key of a section, nested sections included."""
    for name, _, about in config.declared(section, f"{prefix}."):
        choices = f" ({', '.join(about['choices'])})" if about["choices"] else ""
        unit = f" [{about['unit']}]" if about["unit"] else ""
        yield f"  {name:<34} {about['kind']:<10} {about['help']}{choices}{unit}"


class StageParser(argparse.ArgumentParser):
    """Parser of a stage's command.

    The configuration comes from ``--settings`` (JSON, from Snakemake) or ``--config`` (YAML files, by hand);
    ``section.key=value`` arguments override either. A stage sees only its sections in :data:`mmfm.config.STAGES`.
    """

    def __init__(self, stage: str, description: str) -> None:
        super().__init__(
            prog=f"mmfm {stage}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.stage = stage
        self.epilog = self._keys()
        source = self.add_mutually_exclusive_group()
        source.add_argument("--settings", metavar="JSON", help="configuration of the stage, as passed by Snakemake")
        source.add_argument(
            "--config",
            metavar="YAML",
            action="append",
            help="configuration file (default: config/config.yaml); if repeated, later files override earlier ones",
        )
        self.add_argument("--encoder", default="dinov2", help="entry of `encoders`, with --config (default: dinov2)")
        self.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="override single configuration keys"
        )

    def _keys(self) -> str:
        lines = ["configuration keys (identity: changes results; budget: how far to go; operation: neither):"]
        for name in config.STAGES[self.stage].sections:
            lines += _explain(config.SECTIONS[name], name)
        return "\n".join(lines) if len(lines) > 1 else ""

    def parse(self, arguments: list[str]) -> tuple[argparse.Namespace, config.StageConfig]:
        """Return the options and the part of the configuration that the stage reads.

        Raises:
            ValueError: a key is unknown, missing, of the wrong type, or out of range.
        """
        options = self.parse_args(arguments)
        for override in options.overrides:
            if "=" not in override:
                self.error(f"unexpected argument '{override}'; keys are given as section.key=value")
        return options, _configuration(self.stage, options)


def _configuration(stage: str, options: argparse.Namespace) -> config.StageConfig:
    setting = getattr(options, "setting", None)
    if options.settings is None:
        loaded = config.load(options.config or ["config/config.yaml"], options.overrides)
        return config.StageConfig.of(loaded, stage, encoder=options.encoder, setting=setting)
    try:
        values = json.loads(options.settings)
    except json.JSONDecodeError as error:
        raise ValueError(f"--settings is not valid JSON ({error}); use --config to run a stage by hand") from error
    overrides = config.parse_overrides(options.overrides)
    return dataclasses.replace(config.StageConfig.build(stage, values, overrides), setting=setting)
