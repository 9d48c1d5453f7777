"""The stages of the workflow: the one table that commands, rules, fingerprints, estimates and documents read.

Nothing here imports PyTorch: Snakemake reads it at every start.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A stage: one command ``mmfm NAME``, one rule, and one module, ``mmfm.stages.NAME``.

    Attributes:
        summary: what it does, for ``mmfm --help``.
        version: raised whenever its code changes its results; part of the rule's parameter and of the fingerprint of
            its state.
        sections: of the configuration that it reads, and so what makes it run again.
        parents: stages whose outputs it reads.
        outputs: names of the files that its rule declares.
        unit: what a killed run does not do again; empty where there is nothing to resume.
        estimated: whether its needs depend on the data, so that ``mmfm scale`` shows them and rules ask for them.
    """

    summary: str
    version: int
    sections: tuple[str, ...]
    parents: tuple[str, ...]
    outputs: tuple[str, ...]
    unit: str = ""
    estimated: bool = True


STAGES: dict[str, Stage] = {
    "list_images": Stage(
        "list and split an image folder",
        version=1,
        sections=("data",),
        parents=(),
        outputs=("listing.train.safetensors", "listing.heldout.safetensors"),
        estimated=False,
    ),
    "extract": Stage(
        "encode all images: global tokens and latent moments",
        version=1,
        sections=("image", "encoder", "extract"),
        parents=("list_images",),
        outputs=("cls_tokens.zarr", "latent_moments.safetensors"),
        unit="shard of images",
    ),
    "latent_stats": Stage(
        "mean and variance of the latents per position",
        version=1,
        sections=(),
        parents=("extract",),
        outputs=("stats.pt", "stats.json"),
    ),
    "fit_gmm": Stage(
        "fit the mixture of the global tokens by EM",
        version=3,
        sections=("gmm",),
        parents=("list_images", "extract"),
        outputs=(
            "gmm.safetensors",
            "assignment.safetensors",
            "report.json",
            "likelihood.png",
            "weights.png",
            "modes.png",
        ),
        unit="EM iteration",
    ),
    "spatial_gmm": Stage(
        "mean latent and variance of every mode",
        version=1,
        sections=("image", "encoder", "spatial_gmm"),
        parents=("list_images", "latent_stats", "fit_gmm"),
        outputs=("spatial_gmm.zarr", "report.json"),
        unit="mode",
    ),
    "train_decoder": Stage(
        "train the decoder from latents to images",
        version=1,
        sections=("image", "encoder", "decoder"),
        parents=("list_images",),
        outputs=("decoder.safetensors", "history.jsonl", "curve.png", "reconstruction.png"),
        unit="step",
    ),
    "train": Stage(
        "train the flow-matching model",
        version=2,
        sections=("image", "encoder", "model", "train"),
        parents=("list_images", "latent_stats", "fit_gmm", "spatial_gmm"),
        outputs=("ema.safetensors", "history.jsonl", "curve.png"),
        unit="step",
    ),
    "sample": Stage(
        "generate images",
        version=3,
        sections=("image", "encoder", "sample"),
        parents=("latent_stats", "spatial_gmm", "train_decoder", "train"),
        outputs=("images.npz", "grid.png", "samples.json"),
        unit="shard of images",
    ),
    "fid_reference": Stage(
        "feature moments of the real images",
        version=1,
        sections=("image", "fid"),
        parents=("list_images",),
        outputs=("reference.safetensors",),
        unit="shard of images",
    ),
    "fid": Stage(
        "Frechet distance of generated images",
        version=1,
        sections=("fid",),
        parents=("sample", "fid_reference"),
        outputs=(".txt", ".json"),
    ),
    "sweep": Stage(
        "fits with several numbers of modes side by side",
        version=1,
        sections=("sweep",),
        parents=("fit_gmm", "spatial_gmm"),
        outputs=("sweep.png", "sweep.json"),
        estimated=False,
    ),
}
"""All stages, in the order of the workflow."""


def below(stage: str) -> list[str]:
    """Return a stage and those that read, directly or not, what it makes, in the order of the workflow."""
    found = {stage}
    for name, other in STAGES.items():
        if found.intersection(other.parents):
            found.add(name)
    return [name for name in STAGES if name in found]


def readers(section: str) -> list[str]:
    """Return the stages that read a section of the configuration."""
    return [name for name, stage in STAGES.items() if section in stage.sections]
