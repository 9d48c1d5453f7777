"""The sections of the configuration and their keys: one table of all there is to set.

A key's kind (see :mod:`mmfm.config`) says what a change of it means for results that are there.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmfm.config.spelling import nearest

FIXED_SOLVERS = ("euler", "heun")
ADAPTIVE_SOLVERS = ("dopri5", "dopri8", "bosh3", "adaptive_heun")
"""Solvers of torchdiffeq that choose their steps. Its fehlberg2 misses its tolerance by far in tests/test_flow.py."""
SOLVERS = (*FIXED_SOLVERS, *ADAPTIVE_SOLVERS)


def key(help: str, *, kind: str = "identity", unit: str = "", choices: tuple = (), minimum: float | None = None) -> Any:
    """Declare a configuration key with what the documentation, the schema and the validation need."""
    return field(metadata={"help": help, "kind": kind, "unit": unit, "choices": choices, "minimum": minimum})


operation = functools.partial(key, kind="operation")
budget = functools.partial(key, kind="budget")


@dataclass(frozen=True)
class Data:
    """Which images, and which of them are held out of training."""

    root: str = key("ImageFolder with one folder per class; `demo` unpacks the embedded images")
    holdout: int = key("images kept out of training, chosen by a hash of their path", unit="images", minimum=0)
    seed: int = key("seed of the choice of held-out images", minimum=0)
    unreadable: str = key(
        "a damaged image stops the stage that meets it, or is found when listing (every image is decoded) and left out",
        choices=("error", "skip"),
    )
    workers: int = operation(
        "image-decoding processes for `unreadable: skip`; 0 decodes in the stage itself", minimum=0
    )


@dataclass(frozen=True)
class Image:
    """What an image is to every stage."""

    size: int = key("side of the square that images are cropped to (ADM centre crop)", unit="pixels", minimum=8)


@dataclass(frozen=True)
class Encoder:
    """A frozen vision encoder."""

    family: str = key("architecture", choices=("dinov2", "siglip2", "mae"))
    weights: str = key("folder in the Hugging Face layout, or `hf:` and a model id, which a rule downloads")
    input_size: int = key("side of the encoder's input; images are resized to it", unit="pixels", minimum=8)


@dataclass(frozen=True)
class Extract:
    """Global tokens and latent moments of the training images, in one pass."""

    shard_size: int = key("images per shard: the unit of resumption", unit="images", minimum=1)
    batch_size: int = operation("images per encoder call", unit="images", minimum=1)
    workers: int = operation("image-reading processes per rank; 0 reads in the rank itself", minimum=0)


@dataclass(frozen=True)
class Gmm:
    """The mixture of the global tokens."""

    n_components: int = key("number of modes K", minimum=1)
    covariance_type: str = key("shape of the covariances", choices=("diag", "spherical", "tied", "full"))
    init: str = key("start of EM", choices=("kmeans", "k-means++", "random_from_data"))
    reg_covar: float = key("added to every variance", minimum=0)
    tol: float = key("stop when the mean log-likelihood rises by less", unit="nats per image", minimum=0)
    max_iter: int = budget("at most this many EM iterations", unit="iterations", minimum=1)
    seed: int = key("seed of the start", minimum=0)
    precision: str = key("arithmetic of the E-step's products", choices=("float32", "float64"))
    chunk_size: int = operation("images per E-step product", unit="images", minimum=1)
    n_init: int = budget("starts; the one that ends with the best log-likelihood is kept", minimum=1)
    init_means: str = key("file of K means to start from instead of `init` (.npy or gmm.safetensors); empty for none")
    e_step: str = key("`truncated`: images meet the modes near their last one only", choices=("exact", "truncated"))
    cache_gb: float = operation(
        "tokens that a process keeps in memory, and at most a quarter of what is free", unit="GB", minimum=0
    )


@dataclass(frozen=True)
class SpatialGmm:
    """Mean latent and variance of every mode."""

    batch_size: int = operation("images per encoder call", unit="images", minimum=1)
    workers: int = operation("image-reading processes per rank", minimum=0)
    covariance_type: str = key(
        "one variance a mode, as published, or one for every position of its latent", choices=("spherical", "diag")
    )


@dataclass(frozen=True)
class Decoder:
    """The ViT decoder that turns latents into images."""

    weights: str = key("a decoder file, `{encoder}` standing for the encoder's name, or `train` to train one's own")
    hidden_size: int = key("width", minimum=1)
    intermediate_size: int = key("width of the MLPs", minimum=1)
    num_heads: int = key("attention heads", minimum=1)
    num_layers: int = key("depth", minimum=1)
    noise: float = key("tokens get noise of a standard deviation uniform in [0, noise]", minimum=0)
    global_batch: int = key("images per step over all processes", unit="images", minimum=1)
    lr: float = key("peak learning rate (AdamW, cosine to 0 at `horizon`)", minimum=0)
    horizon: int = key("step at which the learning rate reaches 0", unit="steps", minimum=1)
    steps: int = budget("optimiser steps", unit="steps", minimum=1)
    seed: int = key("seed of initialisation, data order and noise", minimum=0)
    micro_batch: int = operation("images per forward pass and process; 0 for the whole share", unit="images", minimum=0)
    workers: int = operation("image-reading processes per rank", minimum=0)
    latent_cache_gb: float = operation("encode once and keep the latents if they fit in this", unit="GB", minimum=0)
    checkpoint_every: int = operation("steps between checkpoints", unit="steps", minimum=1)


@dataclass(frozen=True)
class Model:
    """Sizes of a DiTDH: encoder blocks first, head blocks second."""

    hidden_size: tuple[int, int] = key("widths")
    depth: tuple[int, int] = key("numbers of blocks")
    num_heads: tuple[int, int] = key("attention heads")


@dataclass(frozen=True)
class Preview:
    """Sample grids and Frechet distances during training, from the EMA weights."""

    every: int = operation("steps between preview grids; 0 for none", unit="steps", minimum=0)
    n_images: int = operation("images in a grid", unit="images", minimum=1)
    time_points: int = operation("time points of the solver, of grids and of distances", minimum=2)
    fid_every: int = operation(
        "steps between measurements of the Frechet distance by the detector `fid.detector` from the stage's reference, "
        "and one at the end; 0 for none",
        unit="steps",
        minimum=0,
    )
    fid_images: int = operation("images generated for it, from the same noise every time", unit="images", minimum=2)
    fid_batch_size: int = operation("images of it per model and detector call", unit="images", minimum=1)


@dataclass(frozen=True)
class LossWeighting:
    """Weights of the losses by label, from a running mean of every label's loss."""

    rule: str = key(
        "weight of a label whose running loss is r times the mean: `focal` r^gamma, `sqrt` the root of r, `log` "
        "ln(1 + r), `inverse` 1/r; scaled to mean 1 over the labels",
        choices=("none", "focal", "sqrt", "log", "inverse"),
    )
    by: str = key("which label: the mode of the source, or the image's class", choices=("mode", "class"))
    decay: float = key("decay of the running mean at every step in which the label occurs", minimum=0)
    gamma: float = key("exponent of `focal`", minimum=0)
    warmup_epochs: int = key("epochs in which all weights are 1", unit="epochs", minimum=0)
    bounds: tuple[float, float] = key("smallest and largest weight")


@dataclass(frozen=True)
class Train:
    """Flow matching."""

    model: str = key("name of an entry of `models`")
    seed: int = key("seed of initialisation, data order, noise and, when sampling, of the images", minimum=0)
    assignment: str = key(
        "mode of an image: drawn from the posterior of its token, or the likeliest", choices=("soft", "hard")
    )
    flip: bool = key("flip images horizontally with probability 1/2")
    global_batch: int = key("images per step over all processes", unit="images", minimum=1)
    epochs: int = budget("passes over the training images", unit="epochs", minimum=1)
    lr: float = key("learning rate (AdamW) until `constant_epochs`", minimum=0)
    final_lr: float = key("learning rate from `decay_end_epoch` on", minimum=0)
    constant_epochs: int = key("epochs before the learning rate starts to fall", unit="epochs", minimum=0)
    decay_end_epoch: int = key("epoch at which the linear fall ends", unit="epochs", minimum=1)
    betas: tuple[float, float] = key("AdamW's decay rates")
    weight_decay: float = key("AdamW's weight decay", minimum=0)
    clip_norm: float = key("largest gradient norm; 0 for no clipping", minimum=0)
    ema_decay: float = key("decay of the weights' exponential moving average", minimum=0)
    precision: str = key("`auto`: bf16 autocast on a GPU, float32 on a CPU", choices=("auto", "float32", "bf16"))
    micro_batch: int = operation("images per forward pass and process; 0 for the whole share", unit="images", minimum=0)
    workers: int = operation("image-reading processes per rank", minimum=0)
    latent_cache_gb: float = operation("encode once and keep the latents if they fit in this", unit="GB", minimum=0)
    checkpoint_every: int = operation("steps between checkpoints", unit="steps", minimum=1)
    keep_checkpoints: int = operation("newest checkpoints that are kept", minimum=1)
    log_every: int = operation("steps between lines of the history", unit="steps", minimum=1)
    compile: bool = operation("use torch.compile")
    preview: Preview = field(metadata={"help": "sample grids and distances during training", "kind": "section"})
    label_dropout: float = key("probability with which a class label is hidden (settings class, class_gmm)", minimum=0)
    mode_dropout: float = key("probability with which a mode is hidden from the model (setting mode)", minimum=0)
    means_precision: str = key(
        "the source's means in memory; `auto`: bf16 on a GPU, float32 on a CPU", choices=("auto", "float32", "bf16")
    )
    means_device: str = operation(
        "where the means lie: on the GPU, or in the host's memory with a gather per batch", choices=("device", "host")
    )
    loss_weighting: LossWeighting = field(metadata={"help": "weights of the losses by label", "kind": "section"})
    schedule: str = key(
        "how the learning rate falls from `lr` to `final_lr` between `constant_epochs` and `decay_end_epoch`",
        choices=("constant_then_linear", "cosine"),
    )
    checkpoint_activations: bool = operation("recompute the blocks in the backward pass: less memory, a third slower")
    sharding: str = operation(
        "processes hold the whole model, or shards of weights, optimiser and average (FSDP2)", choices=("ddp", "fsdp")
    )
    milestones: tuple[int, ...] = operation(
        "epochs whose checkpoints stay, so that `epochs` can be lowered to them", unit="epochs", minimum=1
    )
    logger: str = operation("where to watch besides the history", choices=("tensorboard", "wandb", "none"))


@dataclass(frozen=True)
class Guidance:
    """Guidance while sampling: classifier-free, or autoguidance where a guide is given."""

    scale: float = key("of classifier-free guidance; 1 for none (targets `_ag` take `guide.scale`)", minimum=0)
    interval: tuple[float, float] = key("times (lowest, highest) between which guidance applies")


@dataclass(frozen=True)
class Sample:
    """Generation."""

    n_images: int = key("images to generate", unit="images", minimum=1)
    time_points: int = key("points of the time grid, one more than steps; 1 decodes the source itself", minimum=1)
    solver: str = key(
        "integration rule; from `dopri5` on with steps of its own choice between the first and the last time point",
        choices=SOLVERS,
    )
    precision: str = key(
        "`auto`: bf16 autocast on a GPU, float32 on a CPU; `reference`: bf16 autocast with state and time in bf16 too",
        choices=("auto", "float32", "bf16", "reference"),
    )
    shard_size: int = key("images per shard: the unit of resumption", unit="images", minimum=1)
    batch_size: int = operation("images per model call", unit="images", minimum=1)
    guidance: Guidance = field(metadata={"help": "guidance while sampling", "kind": "section"})
    rtol: float = key("relative tolerance of the solvers with steps of their own", minimum=0)
    atol: float = key("absolute tolerance of the solvers with steps of their own", minimum=0)
    mode_draw: str = key("how modes are drawn from the mixture's weights", choices=("multinomial", "stratified"))
    label_draw: str = key("class labels in equal numbers, or drawn at random", choices=("equal", "random"))
    features: bool = operation("write the configured detector's features of every shard, for `fid` to use")
    means_device: str = operation("where the source's means lie, as in `train`", choices=("device", "host"))


@dataclass(frozen=True)
class Guide:
    """The weaker model of autoguidance, for the targets `..._ag`; no key touches any other target."""

    weights: str = key("`train`, or a file of weights, `{encoder}` and `{setting}` standing for the names")
    model: str = key("name of an entry of `models`")
    epochs: int = budget("passes over the training images", unit="epochs", minimum=1)
    scale: float = key("v = v_guide + scale (v - v_guide)", minimum=0)
    interval: tuple[float, float] = key("times (lowest, highest) between which guidance applies")


@dataclass(frozen=True)
class Fid:
    """Frechet distance between generated and real images."""

    detector: str = key("feature network", choices=("fashion", "inception"))
    weights: str = key("its weights file")
    reference: str = key("`train` (the training images) or an .npz with `mu` and `sigma`")
    batch_size: int = operation("images per detector call", unit="images", minimum=1)
    workers: int = operation("image-reading processes per rank", minimum=0)


@dataclass(frozen=True)
class Sweep:
    """Fits with several numbers of modes side by side."""

    modes: tuple[int, ...] = key("numbers of modes K", minimum=1)


SECTIONS: dict[str, type] = {
    "data": Data,
    "image": Image,
    "encoder": Encoder,
    "extract": Extract,
    "gmm": Gmm,
    "spatial_gmm": SpatialGmm,
    "decoder": Decoder,
    "model": Model,
    "train": Train,
    "sample": Sample,
    "fid": Fid,
    "sweep": Sweep,
}


@dataclass(frozen=True)
class Config:
    """The whole configuration."""

    run: str = key("folder below `results/` that keeps this configuration's results apart; empty for none")
    gpus: str | int = operation("GPUs per job: a number, or `auto` for the limit in the Snakemake profile")
    processes: int = operation("processes per job on a CPU", minimum=1)
    encoders: dict[str, Encoder] = field(metadata={"help": "encoders by name", "kind": "section"})
    models: dict[str, Model] = field(metadata={"help": "model sizes by name", "kind": "section"})
    data: Data = field(metadata={"help": "", "kind": "section"})
    image: Image = field(metadata={"help": "", "kind": "section"})
    extract: Extract = field(metadata={"help": "", "kind": "section"})
    gmm: Gmm = field(metadata={"help": "", "kind": "section"})
    spatial_gmm: SpatialGmm = field(metadata={"help": "", "kind": "section"})
    decoder: Decoder = field(metadata={"help": "", "kind": "section"})
    train: Train = field(metadata={"help": "", "kind": "section"})
    sample: Sample = field(metadata={"help": "", "kind": "section"})
    fid: Fid = field(metadata={"help": "", "kind": "section"})
    sweep: Sweep = field(metadata={"help": "", "kind": "section"})
    guide: Guide = field(metadata={"help": "", "kind": "section"})

    def section(self, name: str, encoder: str = "", model: str = "") -> Any:
        """Return a section; ``encoder`` and ``model`` pick the entry of those that are configured by name."""
        if name == "encoder":
            return _named(self.encoders, encoder, "encoders")
        if name == "model":
            return _named(self.models, model or self.train.model, "models")
        return getattr(self, name)


def _named(mapping: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in mapping:
        raise ValueError(f"no '{name}' in '{where}'{nearest(name, mapping)}; configured: {', '.join(mapping)}")
    return mapping[name]
