"""Sections of the images, the encoder, the mixture, the decoder and the evaluation."""

# ruff: noqa: RUF009 - `nested` returns a field

from dataclasses import dataclass, replace

from mmfm.config import choices
from mmfm.config.keys import budget, key, nested, operation, share

_CROP = (
    "what images are cropped to: `image`, `image.size`, and then resized to the encoder's input, as in training; or "
    "`encoder`, the encoder's input size itself"
)

_BANK_IMAGES = 10_000
"""As many as in ADM's reference files."""


@dataclass(frozen=True)
class Limit:
    """A share of the images, chosen class by class before any are held out."""

    images: float = key("share of each class's images, at least one; 1 for all", as_before=1.0)
    classes: float = key(
        "share of the classes, at least one; 1 for all. The others keep their labels, but have no images", as_before=1.0
    )
    seed: int = key("seed of both choices", minimum=0, as_before=42)

    def check(self, where: str) -> None:
        """Raise ValueError if a share is out of range."""
        share(self.images, f"{where}.images")
        share(self.classes, f"{where}.classes")


@dataclass(frozen=True)
class Data:
    """The images, and which are held out of training."""

    root: str = key(
        "folder of images with one subfolder per class; `demo` for the images in this repository", path=True
    )
    holdout: int = key("images held out of training, chosen by a hash of their path", unit="images", minimum=0)
    seed: int = key("seed for choosing the held-out images", minimum=0)
    unreadable: str = key(
        "a damaged image stops the stage that reads it, or is left out of the listing (every image is decoded)",
        choices=choices.UNREADABLE,
    )
    workers: int = operation("processes decoding images for `unreadable: skip`; 0: the stage itself", minimum=0)
    limit: Limit = nested()
    heldout_root: str = key(
        "folder of held-out images in the layout of `root`, instead of `holdout`; empty for none",
        path=True,
        as_before="",
    )

    def check(self, where: str) -> None:
        """Raise ValueError if held-out images are asked for in two ways."""
        if self.holdout and self.heldout_root:
            raise ValueError(
                f"'{where}.holdout' is {self.holdout} and '{where}.heldout_root' is '{self.heldout_root}'; set "
                f"'{where}.holdout' to 0 to use the folder, or leave the folder empty"
            )


@dataclass(frozen=True)
class Published:
    """The files that the paper's authors published, for keys with the value `published`."""

    repository: str = operation("their repository on the Hugging Face hub", as_before="luo00042/mm-fm")
    revision: str = operation("its branch, tag or commit", as_before="main")
    root: str = operation(
        "folder in which you have them, as in the repository; empty: those needed are fetched", path=True, as_before=""
    )
    folder: str = operation(
        "where fetched files go, encoders too; may be shared by several working directories",
        path=True,
        as_before="published",
    )


@dataclass(frozen=True)
class Image:
    """Images, as all stages see them."""

    size: int = key("side of the square to which images are cropped (ADM's centre crop)", unit="pixels", minimum=8)


@dataclass(frozen=True)
class Encoder:
    """A frozen vision encoder."""

    family: str = key(
        "architecture: one of the paper's, or `hf` or `timm` for any vision transformer of these libraries",
        choices=choices.ENCODER_FAMILIES,
    )
    weights: str = key(
        "folder in the Hugging Face layout, or `hf:` and the id of a model to download (`hf:ID@COMMIT` for one commit)",
        path=True,
    )
    input_size: int = key("side of the encoder's input, to which images are resized", unit="pixels", minimum=8)
    precision: str = key(
        "of the encoder: `tf32` rounds the factors of products to TF32 on a GPU, `bf16` is autocast; posteriors, EM "
        "and detectors are exact in any case",
        choices=choices.ENCODER_PRECISIONS,
        as_before="float32",
    )
    norm_affine: bool = key(
        "keep weight and bias of the encoder's final norm, which the paper removes", as_before=False
    )


@dataclass(frozen=True)
class Latents:
    """The latent cache: images are encoded once, for all stages, settings and runs."""

    cache: str = operation(
        "keep latents on disk: `auto` if they take at most 20 GB and half of what is free",
        choices=choices.LATENT_CACHES,
        as_before="auto",
    )
    folder: str = operation(
        "where to keep them; may be shared by several working directories", path=True, as_before="latents"
    )


@dataclass(frozen=True)
class Extract:
    """One pass over the training images for their global tokens and latent moments."""

    shard_size: int = key("images per shard, the unit of resumption", unit="images", minimum=1)
    batch_size: int = operation("images per encoder call", unit="images", minimum=1)
    workers: int = operation("image-reading processes per rank; 0: the rank itself", minimum=0)
    crop: str = key(_CROP, choices=choices.CROPS, as_before="image")


@dataclass(frozen=True)
class LatentStats:
    """The statistics by which latents are normalised."""

    weights: str = key(
        "`compute` takes the moments of `extract`; else `published`, or a file of statistics (.pt with `mean` and "
        "`var`), in which `{encoder}` stands for the encoder's name",
        path=True,
        as_before="compute",
    )
    mean: bool = key("subtract the mean; false only divides by the standard deviation", as_before=True)


@dataclass(frozen=True)
class Gmm:
    """The Gaussian mixture of the global tokens."""

    n_components: int = key("number of modes K", minimum=1)
    covariance_type: str = key("shape of the covariances", choices=choices.COVARIANCES)
    init: str = key("initialisation of EM", choices=choices.STARTS)
    reg_covar: float = key("added to every variance", minimum=0)
    tol: float = key("stop when the mean log-likelihood improves by less than this", unit="nats per image", minimum=0)
    max_iter: int = budget("largest number of EM iterations", unit="iterations", minimum=1)
    seed: int = key("seed of the initialisation", minimum=0)
    precision: str = key("precision of the matrix products in the E-step", choices=choices.E_STEP_PRECISIONS)
    chunk_size: int = operation("images per matrix product in the E-step", unit="images", minimum=1)
    n_init: int = budget("number of initialisations; the fit with the best log-likelihood is kept", minimum=1)
    init_means: str = key(
        "file of K means (.npy or gmm.safetensors) to start from instead of `init`; empty for none", path=True
    )
    e_step: str = key("`truncated` evaluates only the modes near an image's previous mode", choices=choices.E_STEPS)
    cache_gb: float = operation(
        "memory per process for caching tokens, at most a quarter of what is free", unit="GB", minimum=0
    )
    weights: str = key(
        "`fit`; or `published`, or a mixture of yours (gmm.safetensors, or a published .pkl), in which `{encoder}` "
        "stands for the encoder's name",
        path=True,
        as_before="fit",
    )
    shrinkage: float = key(
        "rows that the variance pooled over all modes counts for in each mode's own; 0 for none, `diag` only",
        unit="rows",
        minimum=0,
        as_before=0.0,
    )

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
        if self.shrinkage and self.covariance_type != "diag":
            raise ValueError(
                f"'{where}.shrinkage' is {self.shrinkage:g}, but covariance_type is {self.covariance_type}, and only "
                f"diag variances are shrunk; set '{where}.shrinkage' to 0 or '{where}.covariance_type' to diag"
            )
        if self.e_step == "truncated" and not choices.COVARIANCES[self.covariance_type].truncatable:
            able = " or ".join(name for name, shape in choices.COVARIANCES.items() if shape.truncatable)
            raise ValueError(
                f"'{where}.e_step' truncated needs covariance_type {able}, not {self.covariance_type}; "
                f"set '{where}.e_step' to exact"
            )
        if self.init_means and self.n_init > 1:
            raise ValueError(f"'{where}.n_init' is {self.n_init}, but '{where}.init_means' is one start; set it to 1")


@dataclass(frozen=True)
class SpatialGmm:
    """Mean latent and variance of every mode."""

    batch_size: int = operation("images per encoder call", unit="images", minimum=1)
    workers: int = operation("image-reading processes per rank", minimum=0)
    covariance_type: str = key(
        "one variance per mode, as published, or one per element of its latent",
        choices=choices.SPATIAL_COVARIANCES,
    )
    crop: str = key(_CROP, choices=choices.CROPS, as_before="image")
    weights: str = key(
        "`compute`; or `published`, or a spatial mixture of yours (spatial_gmm.zarr, or a published .pkl), in which "
        "`{encoder}` stands for the encoder's name",
        path=True,
        as_before="compute",
    )


@dataclass(frozen=True)
class Decoder:
    """The ViT decoder that turns latents into images."""

    weights: str = key(
        "`train` to train one; or `published`, or a decoder of yours (decoder.safetensors, or a published .pt), in "
        "which `{encoder}` stands for the encoder's name",
        path=True,
    )
    hidden_size: int = key("width", minimum=1)
    intermediate_size: int = key("width of the MLPs", minimum=1)
    num_heads: int = key("attention heads", minimum=1)
    num_layers: int = key("number of blocks", minimum=1)
    noise: float = key("standard deviation of the noise on tokens, drawn uniformly from [0, noise]", minimum=0)
    global_batch: int = key("images per step, all processes together", unit="images", minimum=1)
    lr: float = key("peak learning rate (AdamW, cosine to 0 at `horizon`)", minimum=0)
    horizon: int = key("step at which the learning rate reaches 0", unit="steps", minimum=1)
    steps: int = budget("optimiser steps", unit="steps", minimum=1)
    seed: int = key("seed of initialisation, data order and noise", minimum=0)
    micro_batch: int = operation("images per forward pass and process; 0 for its whole share", unit="images", minimum=0)
    workers: int = operation("image-reading processes per rank", minimum=0)
    checkpoint_every: int = operation("steps between checkpoints", unit="steps", minimum=1)

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"'{where}.hidden_size' {self.hidden_size} must be a multiple of num_heads {self.num_heads}"
            )


@dataclass(frozen=True)
class Fid:
    """Frechet distance between generated and real images, and other metrics."""

    detector: str = key("feature network", choices=choices.DETECTORS)
    weights: str = key(
        "weights file of the detector, or `fetch` to fetch Inception's; none for `encoder`", path=True, as_before=""
    )
    reference: str = key(
        "what to compare with: `train` (the training images), `published` (ADM's batch of ImageNet at 256 pixels), or "
        "an .npz file with `mu` and `sigma`",
        path=True,
    )
    batch_size: int = operation("images per detector call", unit="images", minimum=1)
    workers: int = operation("image-reading processes per rank", minimum=0)
    encoder: str = key(
        "with the detector `encoder`: the entry of `encoders` whose global tokens are the features; empty for the "
        "run's own encoder, which favours its own mixture",
        as_before="",
    )
    metrics: tuple[str, ...] = key(
        "what to compute of the generated images, in one pass; `frechet` must be among them",
        choices=choices.METRICS,
        as_before=("frechet",),
    )
    reference_images: int = key(
        "real images whose features are kept for metrics that compare single images (precision, recall, density, "
        "coverage, kid): evenly spaced in the listing or in `arr_0` of the .npz; 8 kB each with Inception",
        unit="images",
        minimum=10,
        as_before=_BANK_IMAGES,
    )

    def read_by(self, stage: str) -> "Fid":
        """Return the section with the keys that a stage ignores at fixed values.

        The reference depends on the kinds of statistics that the metrics need, not on the metrics themselves.
        Reconstructions are compared with their originals, by fixed metrics.
        """
        if stage == "reconstruction":
            return replace(self, metrics=("frechet",), reference="train", reference_images=_BANK_IMAGES)
        if stage != "fid_reference":
            return self
        needed = {choices.METRICS[name].needs for name in self.metrics}
        kept = [name for name, kind in (("sfid", "spatial"), ("kid", "bank")) if kind in needed]
        most = self.reference_images if "bank" in needed else _BANK_IMAGES
        return replace(self, metrics=("frechet", *kept), reference_images=most)

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
        if "frechet" not in self.metrics:
            raise ValueError(f"'{where}.metrics' lacks frechet, by which results are compared; add it")
        if not choices.DETECTORS[self.detector].classifies:
            for name in self.metrics:
                if choices.METRICS[name].needs in ("spatial", "logits"):
                    raise ValueError(
                        f"'{where}.metrics' has {name}, which the detector {self.detector} can't give; leave it out, "
                        f"or set '{where}.detector' to inception"
                    )
        if self.detector != "encoder" and not self.weights:
            remedy = "set it to fetch, or to the file" if self.detector == "inception" else "set it to the file"
            raise ValueError(
                f"'{where}.weights' is empty, but the detector {self.detector} has weights; {remedy}: "
                f"{choices.DETECTORS[self.detector].remedy}"
            )
        if self.weights == "fetch" and self.detector != "inception":
            raise ValueError(f"'{where}.weights' is fetch, but only inception can be fetched, not {self.detector}")


@dataclass(frozen=True)
class Sweep:
    """Mixtures with different numbers of modes, compared."""

    modes: tuple[int, ...] = key("numbers of modes to compare", minimum=1)

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
        if not self.modes:
            raise ValueError(f"'{where}.modes' must list at least one number, got an empty list")
