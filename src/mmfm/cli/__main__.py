"""``mmfm STAGE ...``: run one stage by hand, or a tool. ``mmfm STAGE --help`` explains it."""

import importlib
import sys

from mmfm.infra.launch import join_gpus
from mmfm.infra.space import explain

COMMANDS = {
    "demo_images": "unpack the embedded images into an ImageFolder",
    "list_images": "list and split an image folder",
    "extract": "encode all images: global tokens and latent moments",
    "latent_stats": "mean and variance of the latents per position",
    "fit_gmm": "fit the mixture of the global tokens by EM",
    "spatial_gmm": "mean latent and variance of every mode",
    "train_decoder": "train the decoder from latents to images",
    "train": "train the flow-matching model",
    "sample": "generate images",
    "fid_reference": "feature moments of the real images",
    "fid": "Frechet distance of generated images",
    "scale": "estimate what a configuration costs",
    "sweep": "fits with several numbers of modes side by side",
    "clean": "remove unfinished work that no target refers to",
    "doctor": "say what this installation can and can't do",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; what the user can mend is one line on standard error and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print("usage: mmfm COMMAND [ARGUMENTS]\n\nThe stages, in the order of the workflow, and tools:\n")
        for command, summary in COMMANDS.items():
            print(f"  {command:<15}{summary}")
        print(
            "\n`mmfm COMMAND --help` explains one. Usually Snakemake calls them: snakemake results/fid/... --cores all"
        )
        return 0
    if name not in COMMANDS:
        from mmfm.config import nearest

        print(f"mmfm: error: no command '{name}'{nearest(name, COMMANDS)}; see mmfm --help", file=sys.stderr)
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
