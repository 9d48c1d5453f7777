"""``mmfm fit_gmm``: the mixture of the global tokens."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
Fit a Gaussian mixture of gmm.n_components modes to the global tokens by expectation-maximisation, and give every image
to its likeliest mode. The modes become the source of the flow: each image is coupled to noise of its own mode.

  mmfm fit_gmm --config config/config.yaml --tokens cls_tokens.zarr --listing listing.train.safetensors \\
      --out-dir gmm/ gmm.n_components=64

reads   cls_tokens.zarr         from `extract`
        the listing and some of its images, for the picture modes.png alone: without --listing there is none
writes  gmm.safetensors         weights, means, variances (float64)
        assignment.safetensors  mode of every image, images of every mode
        report.json             log-likelihood by iteration, used and empty modes, BIC, separation of the modes,
                                agreement with the classes
        likelihood.png, weights.png
        modes.png               the images nearest to some modes

Start: k-means (gmm.init=kmeans), k-means++, random images, or the means of a file (gmm.init_means). Stops when the mean
log-likelihood changes by less than gmm.tol, or after gmm.max_iter iterations. gmm.e_step=truncated lets images meet the
modes near their last one only, which is faster on a CPU from about a thousand modes on. Tokens are streamed in chunks;
gmm.cache_gb of them stay in memory. docs/mixture.md explains the engine.

Resumes by iteration: killed at any instant, the same command goes on from the newest whole one. Raising gmm.max_iter
continues a finished fit. Under torchrun, or `python -m mmfm.infra.launch --gpus N -- fit_gmm ...`, the processes share
the tokens; the result is the same to rounding for any number of them."""


def main(arguments: list[str]) -> int:
    """Parse, fit."""
    parser = StageParser("fit_gmm", DESCRIPTION)
    parser.add_argument("--tokens", type=Path, required=True, help="token store from extract (zarr)")
    parser.add_argument("--listing", type=Path, help="listing of the training images, to draw modes.png")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder of the outputs")
    options, config = parser.parse(arguments)
    from mmfm.infra.distributed import process_group
    from mmfm.stages.fit_gmm import fit_gmm

    with process_group() as ranks:
        report = fit_gmm(config, options.tokens, options.listing, options.out_dir, ranks)
    if ranks.is_main:
        print(
            f"fit_gmm: {report['active_components']:,} of {report['n_components']:,} modes have images; "
            f"log-likelihood {report['log_likelihood']:.3f} nats per image after {report['n_iter']} iterations"
        )
    return 0
