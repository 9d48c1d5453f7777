"""``mmfm COMMAND ...``: run one stage by hand, or a tool. ``mmfm COMMAND --help`` explains it."""

import importlib
import keyword
import sys

from mmfm.config.registry import STAGES
from mmfm.infra.disk import explain
from mmfm.infra.launch import join_gpus
from mmfm.infra.versions import version

GROUPS: dict[str, dict[str, str]] = {
    "Before a run, and for troubleshooting": {
        "init": "look at a folder of images and write a configuration for it",
        "doctor": "check this installation",
        "scale": "estimate what a configuration costs",
    },
    "While it runs": {
        "status": "show what is finished, running, stopped and failed",
    },
    "Stages, in workflow order": {
        "demo_images": "unpack the demo's images into a folder",
        **{name: stage.summary for name, stage in STAGES.items()},
    },
    "Results": {
        "milestone": "write the weights of an earlier step of a training",
        "compare": "compare finished results in a table and a picture",
        "seeds": "mean and range of results that differ in their seed",
        "curve": "metrics against evaluations, training step, guidance or number of modes",
        "heldout": "likelihood of held-out images under mixtures",
        "fdr": "distances in several detectors' features, as one number",
        "memorisation": "compare generated images with the training images nearest to them",
        "adm_reference": "write real images and their moments for other programs",
        "evaluate": "score images of any system, or check the metrics",
    },
    "Published files": {
        "fetch": "fetch published files, encoders and detectors",
        "import": "write a published file as one of this project",
        "export": "write a finished target as a folder to give away",
    },
    "To free disk space": {
        "clean": "remove state that no target uses, or latent caches",
    },
}
DOCUMENTS = dict.fromkeys(("fetch", "import", "export"), "docs/published.md") | {
    "memorisation": "docs/metrics.md#memorisation"
}
"""The documents that explain the tools' errors."""

COMMANDS = {name: summary for commands in GROUPS.values() for name, summary in commands.items()}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a mistake of the user is reported in one line on standard error, with exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else "--help"
    if name == "--version":
        print(f"mmfm {version('mmfm') or '(not installed)'}")
        return 0
    if name in ("-h", "--help"):
        print("usage: mmfm COMMAND [ARGUMENTS]\n")
        print("Image generation by flow matching from a Gaussian mixture. Usually you do not run the stages yourself:")
        print("name a result, and Snakemake runs every stage that it needs.\n")
        print("  snakemake results/fid/dinov2_mode.txt\n")
        for title, commands in GROUPS.items():
            print(f"{title}:")
            print("".join(f"  {command:<15}{summary}\n" for command, summary in commands.items()))
        print("`mmfm COMMAND --help` explains a command and lists the configuration keys that it reads.")
        return 0
    if name not in COMMANDS:
        from mmfm.config.choices import did_you_mean

        print(f"mmfm: error: unknown command '{name}'{did_you_mean(name, COMMANDS)}; see mmfm --help", file=sys.stderr)
        return 2
    _gpu_locks = join_gpus()
    module = importlib.import_module(f"mmfm.cli.{name}{'_' * keyword.iskeyword(name)}")
    try:
        return module.main(arguments[1:]) or 0
    except (ValueError, OSError) as error:
        message = error if isinstance(error, ValueError) or error.errno is None else explain(error)
        document = STAGES[name].document if name in STAGES else DOCUMENTS.get(name)
        see = f" (see {document})" if document else ""
        print(f"{name}: error: {' '.join(str(message).split())}{see}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"{name}: {str(stop) or 'stopped; run the same command to resume'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
