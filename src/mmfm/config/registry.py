"""The stages of the workflow: the table behind commands, rules, fingerprints, estimates and documentation.

This module must not import PyTorch: Snakemake reads it at every start.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A stage: one command ``mmfm NAME``, one rule, and one module, ``mmfm.stages.NAME``.

    Attributes:
        summary: what it does, for ``mmfm --help``.
        version: raise it whenever a code change alters results; part of the rule's parameter and of the fingerprint
            of the stage's state.
        sections: sections of the configuration that it reads; a change in one makes the stage run again.
        parents: stages whose outputs it reads.
        outputs: names of the files that its rule declares.
        document: the document that explains it, below the repository; its errors end with this.
        unit: unit of work that survives a kill; empty if there is nothing to resume.
        estimated: whether its cost depends on the data, so that it is estimated for ``mmfm scale`` and for its rule.
    """

    summary: str
    version: int
    sections: tuple[str, ...]
    parents: tuple[str, ...]
    outputs: tuple[str, ...]
    document: str
    unit: str = ""
    estimated: bool = True


STAGES: dict[str, Stage] = {
    "list_images": Stage(
        "list an image folder and hold some images out",
        version=1,
        sections=("data",),
        parents=(),
        outputs=("listing.train.safetensors", "listing.heldout.safetensors"),
        document="docs/your-own-data.md",
        estimated=False,
    ),
    "extract": Stage(
        "encode the training images: global tokens and latent moments",
        version=1,
        sections=("image", "encoder", "latents", "extract"),
        parents=("list_images",),
        outputs=("cls_tokens.zarr", "latent_moments.safetensors"),
        document="docs/stages.md#extract",
        unit="shard of images",
    ),
    "latent_stats": Stage(
        "compute the mean and variance of the latents per position",
        version=1,
        sections=("latent_stats",),
        parents=("extract",),
        outputs=("stats.pt", "stats.json"),
        document="docs/stages.md#latent_stats",
    ),
    "fit_gmm": Stage(
        "fit a Gaussian mixture to the global tokens by EM",
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
        document="docs/mixture.md",
        unit="EM iteration",
    ),
    "spatial_gmm": Stage(
        "compute the mean latent and variance of every mode",
        version=1,
        sections=("image", "encoder", "latents", "spatial_gmm"),
        parents=("list_images", "latent_stats", "fit_gmm"),
        outputs=("spatial_gmm.zarr", "report.json"),
        document="docs/stages.md#spatial_gmm",
        unit="mode",
    ),
    "train_decoder": Stage(
        "train the decoder that turns latents into images",
        version=1,
        sections=("image", "encoder", "latents", "decoder"),
        parents=("list_images",),
        outputs=("decoder.safetensors", "history.jsonl", "curve.png", "reconstruction.png"),
        document="docs/training.md",
        unit="step",
    ),
    "train": Stage(
        "train the flow-matching model",
        version=2,
        sections=("image", "encoder", "latents", "model", "train"),
        parents=("list_images", "latent_stats", "fit_gmm", "spatial_gmm"),
        outputs=("ema.safetensors", "history.jsonl", "curve.png"),
        document="docs/training.md",
        unit="step",
    ),
    "sample": Stage(
        "generate images",
        version=3,
        sections=("image", "encoder", "sample"),
        parents=("latent_stats", "spatial_gmm", "train_decoder", "train"),
        outputs=("images.npz", "grid.png", "samples.json"),
        document="docs/stages.md#sample",
        unit="shard of images",
    ),
    "fid_reference": Stage(
        "compute the feature moments of real images",
        version=1,
        sections=("image", "fid"),
        parents=("list_images",),
        outputs=("reference.safetensors",),
        document="docs/stages.md#fid_reference",
        unit="shard of images",
    ),
    "fid": Stage(
        "compute the Frechet distance of generated images",
        version=1,
        sections=("fid",),
        parents=("sample", "fid_reference"),
        outputs=(".txt", ".json"),
        document="docs/stages.md#fid",
    ),
    "reconstruction": Stage(
        "measure how closely the decoder reconstructs real images",
        version=1,
        sections=("image", "encoder", "fid"),
        parents=("list_images", "train_decoder"),
        outputs=(".txt", ".json", ".png"),
        document="docs/stages.md#reconstruction",
        unit="shard of images",
    ),
    "mode_quality": Stage(
        "find the modes whose generated images are poor",
        version=1,
        sections=("image", "encoder", "extract"),
        parents=(
            "list_images",
            "extract",
            "latent_stats",
            "fit_gmm",
            "spatial_gmm",
            "train_decoder",
            "sample",
        ),
        outputs=(".json", ".png", ".txt"),
        document="docs/metrics.md#modes",
    ),
    "sweep": Stage(
        "compare mixtures with different numbers of modes",
        version=1,
        sections=("sweep",),
        parents=("fit_gmm", "spatial_gmm"),
        outputs=("sweep.png", "sweep.json"),
        document="docs/diagnostics.md#choosing-k",
        estimated=False,
    ),
}
"""All stages, in the order of the workflow."""


def below(stage: str) -> list[str]:
    """Return a stage and every stage that depends on it, directly or not, in workflow order."""
    found = {stage}
    for name, other in STAGES.items():
        if found.intersection(other.parents):
            found.add(name)
    return [name for name in STAGES if name in found]


def readers(section: str) -> list[str]:
    """Return the stages that read a section."""
    return [name for name, stage in STAGES.items() if section in stage.sections]
