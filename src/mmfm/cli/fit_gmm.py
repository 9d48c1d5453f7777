"""``mmfm fit_gmm``: fit the mixture of the global tokens."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
Fit a Gaussian mixture of gmm.n_components modes to the global tokens by expectation-maximisation (EM), and assign every
image to its most likely mode. Flow matching then starts from these modes: each image is paired with noise of its mode.

  mmfm fit_gmm --config config/config.yaml --tokens cls_tokens.zarr --listing listing.train.safetensors \\
      --out-dir gmm/ gmm.n_components=64

reads   cls_tokens.zarr         from `extract`
        the listing             and a few of its images, only for modes.png, which is left out without --listing
writes  gmm.safetensors         weights, means, variances (float64)
        assignment.safetensors  mode of every image, images of every mode
        report.json             log-likelihood by iteration, used and empty modes, BIC, separation of the modes,
                                agreement with the classes
        likelihood.png          log-likelihood by iteration
        weights.png             weights of the modes
        modes.png               the images nearest to some modes

EM starts from k-means (gmm.init=kmeans), k-means++, random images, or means in a file (gmm.init_means). It stops when
the mean log-likelihood improves by less than gmm.tol, or after gmm.max_iter iterations. With gmm.e_step=truncated, each
image is compared only with modes near its previous mode, which is faster on a CPU from about 1,000 modes. Tokens are
read in chunks; up to gmm.cache_gb of them stay in memory. docs/mixture.md has the details.

After an interruption, the same command resumes at the last complete iteration. A larger gmm.max_iter continues a
finished fit. To share the tokens among N processes, use torchrun or `python -m mmfm.infra.launch --gpus N -- fit_gmm
...`; the result is the same up to rounding."""


def main(arguments: list[str]) -> int:
    """Parse the arguments, run the stage, and print a summary."""
    parser = StageParser("fit_gmm", DESCRIPTION)
    parser.add_argument("--tokens", type=Path, required=True, help="token store (zarr), from extract")
    parser.add_argument("--listing", type=Path, help="listing of the training images, for modes.png")
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
