"""``mmfm spatial_gmm``: mean latent and variance of every mode."""

from pathlib import Path

from mmfm.cli.common import StageParser

DESCRIPTION = """\
For every mode of the mixture: the mean latent of its images and their horizontal flips, and one variance for the whole
latent (spatial_gmm.covariance_type=spherical, as published) or one for every position (diag). This is the source of the
flow in the settings `gmm` and `mode`. The images are encoded once, sorted by mode; latents are never stored.

  mmfm spatial_gmm --config config/config.yaml --listing listing.train.safetensors \\
      --encoder-weights resources/demo/encoder --stats stats.pt --gmm gmm/gmm.safetensors \\
      --assignment gmm/assignment.safetensors --out spatial_gmm.zarr

reads   the images of the listing, the encoder, the latent statistics, the mixture and its assignment
writes  spatial_gmm.zarr  means (K, C, H, W), variances, weights, counts
        report.json       beside it: empty modes, range of the variances, coupling cost of three sources

A mode without images gets the average of the others. Inputs that were not made from one another are refused.

Resumes by mode: killed at any instant, the same command goes on with the unfinished ones. Under torchrun, or
`python -m mmfm.infra.launch --gpus N -- spatial_gmm ...`, the processes take whole modes and the result does not depend
on their number."""


def main(arguments: list[str]) -> int:
    """Parse, check that the inputs belong together, load the encoder, run."""
    parser = StageParser("spatial_gmm", DESCRIPTION)
    parser.add_argument("--listing", type=Path, required=True, help="listing of the training images")
    parser.add_argument("--encoder-weights", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--stats", type=Path, required=True, help="latent statistics (.pt)")
    parser.add_argument("--gmm", type=Path, required=True, help="gmm.safetensors from fit_gmm")
    parser.add_argument("--assignment", type=Path, required=True, help="assignment.safetensors from fit_gmm")
    parser.add_argument("--out", type=Path, required=True, help="spatial mixture (output, zarr)")
    options, sections = parser.parse(arguments)
    from mmfm.encoders import load_encoder
    from mmfm.infra import store
    from mmfm.infra.distributed import process_group
    from mmfm.mixture import spatial
    from mmfm.mixture.gaussian import Mixture
    from mmfm.rae import RAE, load_statistics

    mixture = Mixture.load(options.gmm)
    assignment, about_assignment = store.map_arrays(options.assignment)
    if "labels" not in assignment:
        raise ValueError(f"'{options.assignment}' is no assignment of images to modes; make it with fit_gmm")
    with process_group() as ranks:
        digests = ranks.from_main(
            lambda: check_inputs(options.listing, options.encoder_weights, options.stats, mixture, about_assignment)
        )
        settings = sections["encoder"]
        encoder = load_encoder(settings.family, options.encoder_weights, settings.input_size, ranks.device)
        latent_shape = (encoder.hidden_size, *encoder.grid)
        rae = RAE(encoder, None, *load_statistics(options.stats, latent_shape))
        report = spatial.fit(
            options.listing,
            lambda images: rae.encode(images).latent,
            latent_shape,
            assignment["labels"],
            mixture.weights.numpy(),
            options.out,
            sections,
            digests,
            ranks,
            {"encoder_digest": options.encoder_weights, "stats_digest": options.stats, "gmm_digest": options.gmm},
        )
        if ranks.is_main:
            low, high = report["variance"]["min"], report["variance"]["max"]
            costs = ", ".join(f"{name} {cost:.3f}" for name, cost in report["coupling_cost"].items())
            print(
                f"spatial_gmm: {report['n_components']:,} modes ({report['empty_components']:,} empty) from "
                f"{report['n_images']:,} images, variances {low:.3f} to {high:.3f}; coupling cost: {costs}"
            )
    return 0


def check_inputs(
    listing: Path, encoder_weights: Path, stats: Path, mixture, about_assignment: dict
) -> dict[str, str]:  # fmt: skip
    """Return the digests of the inputs.

    Args:
        mixture: the loaded :class:`mmfm.mixture.gaussian.Mixture` with its metadata.
        about_assignment: metadata of the assignment.

    Raises:
        ValueError: two inputs were not made from one another; the message names them and the remedy.
    """
    from mmfm.data import Listing
    from mmfm.infra import store

    digests = {
        "listing_digest": Listing.open(listing).digest,
        "encoder_digest": store.folder_digest(encoder_weights),
        "stats_digest": store.file_digest(stats),
        "gmm_digest": mixture.metadata["digest"],
    }
    about_stats = store.read_json(stats.with_suffix(".json")) if stats.with_suffix(".json").exists() else {}
    checks = [
        (about_assignment, "gmm_digest", "the assignment", "the mixture (--gmm)", "take both from one run of fit_gmm"),
        (about_assignment, "listing_digest", "the assignment", "this listing", "run extract and fit_gmm on it"),
        (mixture.metadata, "listing_digest", "the mixture", "this listing", "run extract and fit_gmm on it"),
        (mixture.metadata, "encoder_digest", "the mixture", "this encoder", "run extract and fit_gmm with it"),
        (about_stats, "listing_digest", "the latent statistics", "this listing", "run extract and latent_stats on it"),
        (
            about_stats,
            "encoder_digest",
            "the latent statistics",
            "this encoder",
            "run extract and latent_stats with it",
        ),
    ]
    for about, name, made, source, remedy in checks:
        # Published files say less about where they come from; what they don't say can't be checked.
        if about.get(name) is not None and about[name] != digests[name]:
            raise ValueError(
                f"{made} {'were' if made.endswith('s') else 'was'} not made from {source} ({name} differs); {remedy}"
            )
    if about_stats and about_stats.get("digest") != digests["stats_digest"]:
        raise ValueError(f"'{stats}' is not the file that its .json describes; run latent_stats again")
    return digests
