"""``mmfm STAGE ...``: run one stage by hand, or a tool. ``mmfm STAGE --help`` explains it."""

import importlib
import sys

from mmfm.config.registry import STAGES
from mmfm.infra.disk import explain
from mmfm.infra.launch import join_gpus

GROUPS: dict[str, dict[str, str]] = {
    "Look: before a run, and when something is odd": {
        "doctor": "say what this installation can and can't do",
        "scale": "estimate what a configuration costs",
    },
    "Run: the stages, in the order of the workflow": {
        "demo_images": "unpack the embedded images into an ImageFolder",
        **{name: stage.summary for name, stage in STAGES.items()},
    },
    "Mend: when disk runs short": {
        "clean": "remove unfinished work that no target refers to",
    },
}
COMMANDS = {name: summary for commands in GROUPS.values() for name, summary in commands.items()}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; what the user can mend is one line on standard error and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print("usage: mmfm COMMAND [ARGUMENTS]\n")
        for title, commands in GROUPS.items():
            print(f"{title}\n")
            print("".join(f"  {command:<15}{summary}\n" for command, summary in commands.items()))
        print("`mmfm COMMAND --help` explains one. Snakemake runs every stage that a target needs:")
        print("  snakemake results/fid/dinov2_mode.txt --cores all")
        return 0
    if name not in COMMANDS:
        from mmfm.config.choices import did_you_mean

        print(f"mmfm: error: no command '{name}'{did_you_mean(name, COMMANDS)}; see mmfm --help", file=sys.stderr)
        return 2
    _gpu_locks = join_gpus()
    module = importlib.import_module(f"mmfm.cli.{name}")
    try:
        return module.main(arguments[1:]) or 0
    except (ValueError, OSError) as error:
        message = error if isinstance(error, ValueError) or error.errno is None else explain(error)
        print(f"{name}: error: {' '.join(str(message).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"{name}: {str(stop) or 'stopped; the same command goes on from here'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
