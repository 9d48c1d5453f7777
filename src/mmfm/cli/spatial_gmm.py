"""``mmfm spatial_gmm``: compute the mean latent and variance of every mode."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
For every mode of the mixture, compute the mean latent of its images and their horizontal flips, and one variance for
the whole latent (spatial_gmm.covariance_type=spherical, as published) or one per element (diag). This spatial mixture
is the source of flow matching in the settings gmm, mode and class_gmm. The images are taken sorted by
mode; latents come from the latent cache, unless latents.cache says otherwise.

  mmfm spatial_gmm --config config/config.yaml --listing listing.train.safetensors \\
      --encoder-weights resources/demo/encoder --stats stats.pt --gmm gmm/gmm.safetensors \\
      --assignment gmm/assignment.safetensors --out spatial_gmm.zarr

reads   the images of the listing, the encoder, the latent statistics, the mixture and its assignment
writes  spatial_gmm.zarr  means (K, C, H, W), variances, weights, counts
        report.json       beside it: empty modes, range of the variances, coupling cost of three sources

A mode without images gets the average of the others. Inputs that were not made from one another are refused.

After an interruption, the same command resumes with the unfinished modes. To share the modes among N processes, use
torchrun or `python -m mmfm.infra.launch --gpus N -- spatial_gmm ...`; the result does not depend on N."""


def main(arguments: list[str]) -> int:
    """Parse the arguments, run the stage, and print a summary."""
    parser = StageParser("spatial_gmm", DESCRIPTION)
    parser.add_argument("--listing", type=Path, required=True, help="listing of the training images")
    parser.add_argument("--encoder-weights", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--stats", type=Path, required=True, help="latent statistics (.pt), from latent_stats")
    parser.add_argument("--gmm", type=Path, required=True, help="gmm.safetensors, from fit_gmm")
    parser.add_argument("--assignment", type=Path, required=True, help="assignment.safetensors, from fit_gmm")
    parser.add_argument("--out", type=Path, required=True, help="spatial mixture (zarr, output)")
    options, config = parser.parse(arguments)
    from mmfm.infra.distributed import process_group
    from mmfm.stages.spatial_gmm import SpatialFiles, spatial_gmm

    files = SpatialFiles(options.listing, options.encoder_weights, options.stats, options.gmm, options.assignment)
    with process_group() as ranks:
        report = spatial_gmm(config, files, options.out, ranks)
    if ranks.is_main:
        low, high = report["variance"]["min"], report["variance"]["max"]
        costs = ", ".join(f"{name} {cost:.3f}" for name, cost in report["coupling_cost"].items())
        print(
            f"spatial_gmm: {report['n_components']:,} modes ({report['empty_components']:,} empty) from "
            f"{report['n_images']:,} images, variances {low:.3f} to {high:.3f}; coupling cost: {costs}"
        )
    return 0
