"""The sections of the configuration and their keys: one table of all there is to set.

A key's kind (see :mod:`mmfm.config`) says what a change of it means for results that are there.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, get_type_hints

from mmfm.config import choices
from mmfm.config.choices import did_you_mean

_LARGEST_GAMMA = 20
"""The ratio of a label's loss to the mean reaches the number of labels; a power of it must stay below infinity."""

NEVER = object()
"""The value ``as_before`` of a key that was always there."""


def key(
    help: str,
    *,
    kind: str = "identity",
    unit: str = "",
    choices: Mapping[str, Any] | None = None,
    minimum: float | None = None,
    as_before: Any = NEVER,
) -> Any:
    """Declare a configuration key with what the documentation, the schema and the validation need.

    Args:
        kind: ``identity``, ``budget`` or ``operation``, see :mod:`mmfm.config`.
        choices: table of the values that it takes, in :mod:`mmfm.config.choices`.
        as_before: of a key that is added to a section later: the value with which the section means what it meant
            without the key. At that value parameters and fingerprints leave it out, so that nothing is made again, and
            a configuration without the key has it.
    """
    about = {"help": help, "kind": kind, "unit": unit, "choices": choices, "minimum": minimum, "as_before": as_before}
    return field(metadata=about)


operation = functools.partial(key, kind="operation")
budget = functools.partial(key, kind="budget")


def about(help: str = "") -> dict[str, Any]:
    """Return the metadata of a section, or of a mapping of names to sections."""
    return {"help": help, "kind": "section", "as_before": NEVER}


def _fraction(value: float, where: str) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"'{where}' is {value}; it must be in [0, 1)")


def _times(interval: tuple[float, float], where: str) -> None:
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"'{where}.interval' is {list(interval)}; give times 0 <= lowest <= highest <= 1")


@dataclass(frozen=True)
class Data:
    """Which images, and which of them are held out of training."""

    root: str = key("ImageFolder with one folder per class; `demo` unpacks the embedded images")
    holdout: int = key("images kept out of training, chosen by a hash of their path", unit="images", minimum=0)
    seed: int = key("seed of the choice of held-out images", minimum=0)
    unreadable: str = key(
        "a damaged image stops the stage that meets it, or is found when listing (every image is decoded) and left out",
        choices=choices.UNREADABLE,
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

    family: str = key("architecture", choices=choices.ENCODER_FAMILIES)
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
    covariance_type: str = key("shape of the covariances", choices=choices.COVARIANCES)
    init: str = key("start of EM", choices=choices.STARTS)
    reg_covar: float = key("added to every variance", minimum=0)
    tol: float = key("stop when the mean log-likelihood rises by less", unit="nats per image", minimum=0)
    max_iter: int = budget("at most this many EM iterations", unit="iterations", minimum=1)
    seed: int = key("seed of the start", minimum=0)
    precision: str = key("arithmetic of the E-step's products", choices=choices.E_STEP_PRECISIONS)
    chunk_size: int = operation("images per E-step product", unit="images", minimum=1)
    n_init: int = budget("starts; the one that ends with the best log-likelihood is kept", minimum=1)
    init_means: str = key("file of K means to start from instead of `init` (.npy or gmm.safetensors); empty for none")
    e_step: str = key("`truncated`: images meet the modes near their last one only", choices=choices.E_STEPS)
    cache_gb: float = operation(
        "tokens that a process keeps in memory, and at most a quarter of what is free", unit="GB", minimum=0
    )

    def check(self, where: str) -> None:
        """Raise ValueError if keys do not go together."""
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
        "one variance a mode, as published, or one for every position of its latent",
        choices=choices.SPATIAL_COVARIANCES,
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

    def check(self, where: str) -> None:
        """Raise ValueError if keys do not go together."""
        if self.hidden_size % self.num_heads:
            raise ValueError(f"'{where}.hidden_size' {self.hidden_size} is no multiple of num_heads {self.num_heads}")


@dataclass(frozen=True)
class Model:
    """Sizes of a DiTDH: encoder blocks first, head blocks second."""

    hidden_size: tuple[int, int] = key("widths")
    depth: tuple[int, int] = key("numbers of blocks")
    num_heads: tuple[int, int] = key("attention heads")

    def check(self, where: str) -> None:
        """Raise ValueError if keys do not go together."""
        for width, heads in zip(self.hidden_size, self.num_heads, strict=True):
            if width % heads or (width // heads) % 4:
                raise ValueError(f"'{where}': width {width} over {heads} heads must give a multiple of 4 per head")


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
        choices=choices.WEIGHTINGS,
    )
    by: str = key("which label: the mode of the source, or the image's class", choices=choices.WEIGHTED_LABELS)
    decay: float = key("decay of the running mean at every step in which the label occurs", minimum=0)
    gamma: float = key("exponent of `focal`", minimum=0)
    warmup_epochs: int = key("epochs in which all weights are 1", unit="epochs", minimum=0)
    bounds: tuple[float, float] = key("smallest and largest weight")

    def check(self, where: str) -> None:
        """Raise ValueError if keys do not go together."""
        _fraction(self.decay, f"{where}.decay")
        if self.gamma > _LARGEST_GAMMA:
            raise ValueError(f"'{where}.gamma' is {self.gamma}; it must be at most {_LARGEST_GAMMA}")
        if not 0 < self.bounds[0] <= 1 <= self.bounds[1]:
            raise ValueError(f"'{where}.bounds' are {list(self.bounds)}; give 0 < smallest <= 1 <= largest")


@dataclass(frozen=True)
class Train:
    """Flow matching."""

    model: str = key("name of an entry of `models`")
    seed: int = key("seed of initialisation, data order, noise and, when sampling, of the images", minimum=0)
    assignment: str = key(
        "mode of an image: drawn from the posterior of its token, or the likeliest", choices=choices.ASSIGNMENTS
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
    precision: str = key("`auto`: bf16 autocast on a GPU, float32 on a CPU", choices=choices.PRECISIONS)
    micro_batch: int = operation("images per forward pass and process; 0 for the whole share", unit="images", minimum=0)
    workers: int = operation("image-reading processes per rank", minimum=0)
    latent_cache_gb: float = operation("encode once and keep the latents if they fit in this", unit="GB", minimum=0)
    checkpoint_every: int = operation("steps between checkpoints", unit="steps", minimum=1)
    keep_checkpoints: int = operation("newest checkpoints that are kept", minimum=1)
    log_every: int = operation("steps between lines of the history", unit="steps", minimum=1)
    compile: bool = operation("use torch.compile")
    preview: Preview = field(metadata=about("sample grids and distances during training"))
    label_dropout: float = key("probability with which a class label is hidden (settings class, class_gmm)", minimum=0)
    mode_dropout: float = key("probability with which a mode is hidden from the model (setting mode)", minimum=0)
    means_precision: str = key(
        "the source's means in memory; `auto`: bf16 on a GPU, float32 on a CPU", choices=choices.PRECISIONS
    )
    means_device: str = operation(
        "where the means lie: on the GPU, or in the host's memory with a gather per batch",
        choices=choices.MEANS_DEVICES,
    )
    loss_weighting: LossWeighting = field(metadata=about("weights of the losses by label"))
    schedule: str = key(
        "how the learning rate falls from `lr` to `final_lr` between `constant_epochs` and `decay_end_epoch`",
        choices=choices.SCHEDULES,
    )
    checkpoint_activations: bool = operation("recompute the blocks in the backward pass: less memory, a third slower")
    sharding: str = operation(
        "processes hold the whole model, or shards of weights, optimiser and average (FSDP2)", choices=choices.SHARDINGS
    )
    milestones: tuple[int, ...] = operation(
        "epochs whose checkpoints stay, so that `epochs` can be lowered to them", unit="epochs", minimum=1
    )
    logger: str = operation("where to watch besides the history", choices=choices.LOGGERS)

    def check(self, where: str) -> None:
        """Raise ValueError if keys do not go together."""
        if self.decay_end_epoch <= self.constant_epochs:
            raise ValueError(f"'{where}.decay_end_epoch' must be above '{where}.constant_epochs'")
        for name in ("ema_decay", "label_dropout", "mode_dropout"):
            _fraction(getattr(self, name), f"{where}.{name}")

    def effective(self, setting: choices.Setting) -> "Train":
        """Return the section with the keys that change nothing in a setting at one value, whatever is configured."""
        idle: dict[str, Any] = {}
        if setting.condition != "class":
            idle["label_dropout"] = 0.0
        if setting.condition != "mode":
            idle["mode_dropout"] = 0.0
        if not setting.mixture:
            idle |= {"assignment": "soft", "means_precision": "auto"}
        if self.loss_weighting.rule == "none":
            idle["loss_weighting"] = LossWeighting("none", "mode", 0.0, 0.0, 0, (1.0, 1.0))
        return replace(self, **idle)


@dataclass(frozen=True)
class Guidance:
    """Guidance while sampling: classifier-free, or autoguidance where a guide is given."""

    scale: float = key("of classifier-free guidance; 1 for none (targets `_ag` take `guide.scale`)", minimum=0)
    interval: tuple[float, float] = key("times (lowest, highest) between which guidance applies")

    def check(self, where: str) -> None:
        """Raise ValueError if keys do not go together."""
        _times(self.interval, where)


@dataclass(frozen=True)
class Sample:
    """Generation."""

    n_images: int = key("images to generate", unit="images", minimum=1)
    time_points: int = key("points of the time grid, one more than steps; 1 decodes the source itself", minimum=1)
    solver: str = key(
        "integration rule; from `dopri5` on with steps of its own choice between the first and the last time point",
        choices=choices.SOLVERS,
    )
    precision: str = key(
        "`auto`: bf16 autocast on a GPU, float32 on a CPU; `reference`: bf16 autocast with state and time in bf16 too",
        choices=choices.SAMPLING_PRECISIONS,
    )
    shard_size: int = key("images per shard: the unit of resumption", unit="images", minimum=1)
    batch_size: int = operation("images per model call", unit="images", minimum=1)
    guidance: Guidance = field(metadata=about("guidance while sampling"))
    rtol: float = key("relative tolerance of the solvers with steps of their own", minimum=0)
    atol: float = key("absolute tolerance of the solvers with steps of their own", minimum=0)
    mode_draw: str = key("how modes are drawn from the mixture's weights", choices=choices.MODE_DRAWS)
    label_draw: str = key("class labels in equal numbers, or drawn at random", choices=choices.LABEL_DRAWS)
    features: bool = operation("write the configured detector's features of every shard, for `fid` to use")
    means_device: str = operation("where the source's means lie, as in `train`", choices=choices.MEANS_DEVICES)

    def check(self, where: str) -> None:
        """Raise ValueError if keys do not go together."""
        if not choices.SOLVERS[self.solver].adaptive:
            return
        if self.precision == "reference":
            raise ValueError(f"'{where}.precision' reference has bf16 times, too coarse for {self.solver}: use euler")
        if self.rtol + self.atol <= 0:
            raise ValueError(f"'{where}.rtol' and '{where}.atol' are both 0; {self.solver} needs one of them")

    def effective(self, setting: choices.Setting) -> "Sample":
        """Return the section with the keys that change nothing in a setting at one value, whatever is configured."""
        idle: dict[str, Any] = {}
        if setting.condition != "class":
            idle["label_draw"] = "equal"
        if not setting.mixture:
            idle["mode_draw"] = "multinomial"
        if not choices.SOLVERS[self.solver].adaptive:
            idle |= {"rtol": 0.0, "atol": 0.0}
        return replace(self, **idle)


@dataclass(frozen=True)
class Guide:
    """The weaker model of autoguidance, for the targets `..._ag`; no key touches any other target."""

    weights: str = key("`train`, or a file of weights, `{encoder}` and `{setting}` standing for the names")
    model: str = key("name of an entry of `models`")
    epochs: int = budget("passes over the training images", unit="epochs", minimum=1)
    scale: float = key("v = v_guide + scale (v - v_guide)", minimum=0)
    interval: tuple[float, float] = key("times (lowest, highest) between which guidance applies")

    def check(self, where: str) -> None:
        """Raise ValueError if keys do not go together."""
        _times(self.interval, where)


@dataclass(frozen=True)
class Fid:
    """Frechet distance between generated and real images."""

    detector: str = key("feature network", choices=choices.DETECTORS)
    weights: str = key("its weights file")
    reference: str = key("`train` (the training images) or an .npz with `mu` and `sigma`")
    batch_size: int = operation("images per detector call", unit="images", minimum=1)
    workers: int = operation("image-reading processes per rank", minimum=0)


@dataclass(frozen=True)
class Sweep:
    """Fits with several numbers of modes side by side."""

    modes: tuple[int, ...] = key("numbers of modes K", minimum=1)

    def check(self, where: str) -> None:
        """Raise ValueError if keys do not go together."""
        if not self.modes:
            raise ValueError(f"'{where}.modes' must be a list of at least one number, got an empty one")


@dataclass(frozen=True)
class Config:
    """The whole configuration."""

    run: str = key("folder below `results/` that keeps this configuration's results apart; empty for none")
    gpus: str | int = operation("GPUs per job: a number, or `auto` for the limit in the Snakemake profile")
    processes: int = operation("processes per job on a CPU", minimum=1)
    encoders: dict[str, Encoder] = field(metadata=about("encoders by name"))
    models: dict[str, Model] = field(metadata=about("model sizes by name"))
    data: Data = field(metadata=about())
    image: Image = field(metadata=about())
    extract: Extract = field(metadata=about())
    gmm: Gmm = field(metadata=about())
    spatial_gmm: SpatialGmm = field(metadata=about())
    decoder: Decoder = field(metadata=about())
    train: Train = field(metadata=about())
    sample: Sample = field(metadata=about())
    fid: Fid = field(metadata=about())
    sweep: Sweep = field(metadata=about())
    guide: Guide = field(metadata=about())

    def section(self, name: str, encoder: str = "", model: str = "") -> Any:
        """Return a section; ``encoder`` and ``model`` pick the entry of those that are configured by name."""
        if name == "encoder":
            return _named(self.encoders, encoder, "encoders")
        if name == "model":
            return _named(self.models, model or self.train.model, "models")
        return getattr(self, name)


def _named(mapping: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in mapping:
        raise ValueError(f"no '{name}' in '{where}'{did_you_mean(name, mapping)}; configured: {', '.join(mapping)}")
    return mapping[name]


def declared(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield dotted name, type and metadata of every key of a section's dataclass, nested sections included."""
    hints = get_type_hints(kind)
    for f in fields(kind):
        if is_dataclass(hints[f.name]):
            yield from declared(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, hints[f.name], f.metadata


def keys_of_kind(values: Any, *kinds: str) -> dict[str, Any]:
    """Return the keys of a built section that are of the given kinds as plain JSON values, nested sections included.

    A key that was added later is left out at the value that means "as before".
    """
    result: dict[str, Any] = {}
    for f in fields(values):
        value = getattr(values, f.name)
        if is_dataclass(value):
            if nested := keys_of_kind(value, *kinds):
                result[f.name] = nested
        elif f.metadata["kind"] in kinds and value != f.metadata["as_before"]:
            result[f.name] = list(value) if isinstance(value, tuple) else value
    return result
