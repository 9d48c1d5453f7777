"""The sections of the configuration and their keys, with help, kind and range.

A key's kind (see :mod:`mmfm.config`) decides what happens to existing results when the key changes.
"""

# ruff: noqa: RUF009 - `nested` returns a field

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, get_type_hints

from mmfm.config import choices
from mmfm.config.choices import did_you_mean

_LARGEST_GAMMA = 20
"""A label's loss can be as large as the mean times the number of labels; this power of the ratio must stay finite."""

_CROP = (
    "what images are cropped to: `image`, `image.size`, and then resized to the encoder's input, as in training; or "
    "`encoder`, the encoder's input size itself"
)

NEVER = object()
"""``as_before`` of a key that its section has had from the start."""


def key(
    help: str,
    *,
    kind: str = "identity",
    unit: str = "",
    choices: Mapping[str, Any] | None = None,
    minimum: float | None = None,
    path: bool = False,
    as_before: Any = NEVER,
    part_of: type | None = None,
) -> Any:
    """Declare a configuration key, with the metadata for documentation, schema and validation.

    Args:
        kind: ``identity``, ``budget`` or ``operation``; see :mod:`mmfm.config`.
        choices: table of the accepted values, in :mod:`mmfm.config.choices`.
        path: whether the value names a file or folder; a leading ``~`` is the home directory.
        as_before: for a key that is added to an existing section: the value that preserves the old behaviour. It is
            the key's default, and parameters and fingerprints omit it, so adding the key reruns nothing.
        part_of: for a mapping of some of a section's keys to values: the section.
    """
    about = {"help": help, "kind": kind, "unit": unit, "choices": choices, "minimum": minimum, "path": path}
    return field(metadata=about | {"as_before": as_before, "part_of": part_of})


operation = functools.partial(key, kind="operation")
budget = functools.partial(key, kind="budget")


def nested(*, as_before: Any = NEVER) -> Any:
    """Declare a section, or a mapping of names to sections; ``as_before`` as for :func:`key`."""
    return field(metadata={"kind": "section", "as_before": as_before})


def _fraction(value: float, where: str) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"'{where}' is {value}; it must be in [0, 1)")


def _times(interval: tuple[float, float], where: str) -> None:
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"'{where}.interval' is {list(interval)}; give times 0 <= lowest <= highest <= 1")


def _share(value: float, where: str) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"'{where}' is {value}; it must be above 0 and at most 1, which takes all")


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
        _share(self.images, f"{where}.images")
        _share(self.classes, f"{where}.classes")


@dataclass(frozen=True)
class Data:
    """The images, and how many of them are held out of training."""

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


@dataclass(frozen=True)
class Image:
    """Images, as all stages see them."""

    size: int = key("side of the square to which images are cropped (ADM's centre crop)", unit="pixels", minimum=8)


@dataclass(frozen=True)
class Encoder:
    """A frozen vision encoder."""

    family: str = key("architecture", choices=choices.ENCODER_FAMILIES)
    weights: str = key(
        "folder in the Hugging Face layout, or `hf:` followed by the id of a model to download", path=True
    )
    input_size: int = key("side of the encoder's input, to which images are resized", unit="pixels", minimum=8)


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
        "`compute` takes the moments of `extract`; else a file of statistics (.pt with `mean` and `var`), in which "
        "`{encoder}` stands for the encoder's name",
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

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
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


@dataclass(frozen=True)
class Decoder:
    """The ViT decoder that turns latents into images."""

    weights: str = key(
        "decoder file, in which `{encoder}` stands for the encoder's name; or `train` to train one", path=True
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
class Model:
    """Sizes of a DiTDH: [encoder blocks, head blocks]."""

    hidden_size: tuple[int, int] = key("widths")
    depth: tuple[int, int] = key("numbers of blocks")
    num_heads: tuple[int, int] = key("attention heads")

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
        for width, heads in zip(self.hidden_size, self.num_heads, strict=True):
            if width % heads or (width // heads) % 4:
                raise ValueError(f"'{where}': width {width} over {heads} heads must give a multiple of 4 per head")


@dataclass(frozen=True)
class Preview:
    """Sample grids and Frechet distances during training, from the EMA weights."""

    every: int = operation("steps between preview grids; 0 for none", unit="steps", minimum=0)
    n_images: int = operation("images in a grid", unit="images", minimum=1)
    time_points: int = operation("time points of the solver, for grids and distances", minimum=2)
    fid_every: int = operation(
        "steps between measurements of the Frechet distance (with `fid.detector`), besides one at the end; 0 for none",
        unit="steps",
        minimum=0,
    )
    fid_images: int = operation("images per measurement, from the same noise every time", unit="images", minimum=2)
    fid_batch_size: int = operation("images per model and detector call during a measurement", unit="images", minimum=1)


@dataclass(frozen=True)
class LossWeighting:
    """Loss weights by label, from a running mean of each label's loss."""

    rule: str = key(
        "weight of a label whose running loss is r times the mean: `focal` r^gamma, `sqrt` the root of r, `log` "
        "ln(1 + r), `inverse` 1/r; weights are scaled to mean 1 over the labels",
        choices=choices.WEIGHTINGS,
    )
    by: str = key(
        "what counts as the label: the mode of the source, or the image's class", choices=choices.WEIGHTED_LABELS
    )
    decay: float = key("decay of the running mean per step in which the label occurs", minimum=0)
    gamma: float = key("exponent of `focal`", minimum=0)
    warmup_epochs: int = key("first epochs, in which all weights are 1", unit="epochs", minimum=0)
    bounds: tuple[float, float] = key("smallest and largest weight")
    warmup_steps: int = key(
        "first steps, in which all weights are 1, instead of `warmup_epochs`; 0: `warmup_epochs` counts",
        unit="steps",
        minimum=0,
        as_before=0,
    )

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
        _fraction(self.decay, f"{where}.decay")
        if self.gamma > _LARGEST_GAMMA:
            raise ValueError(f"'{where}.gamma' is {self.gamma}; it must be at most {_LARGEST_GAMMA}")
        if not 0 < self.bounds[0] <= 1 <= self.bounds[1]:
            raise ValueError(f"'{where}.bounds' are {list(self.bounds)}; give 0 < smallest <= 1 <= largest")


@dataclass(frozen=True)
class InitialPhase:
    """Another learning rate and EMA decay at the start of training, as in the published recipes."""

    epochs: int = key("first epochs, with `lr` and `ema_decay` of this phase", unit="epochs", minimum=0, as_before=0)
    lr: float = key("learning rate of the phase", minimum=0, as_before=0.0)
    ema_decay: float = key("EMA decay of the phase", minimum=0, as_before=0.0)

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
        _fraction(self.ema_decay, f"{where}.ema_decay")
        if self.epochs and not self.lr:
            raise ValueError(f"'{where}.lr' is 0, so nothing is learnt in '{where}.epochs' {self.epochs}; set it")


@dataclass(frozen=True)
class Train:
    """Training of the flow-matching model."""

    model: str = key("name of an entry of `models`")
    seed: int = key("seed of initialisation, data order and noise; also of the sampled images", minimum=0)
    assignment: str = key(
        "mode of an image: drawn from the posterior given its token, or the most likely one",
        choices=choices.ASSIGNMENTS,
    )
    flip: bool = key("flip images horizontally with probability 1/2")
    global_batch: int = key("images per step, all processes together", unit="images", minimum=1)
    epochs: int = budget("passes over the training images", unit="epochs", minimum=1)
    lr: float = key("learning rate (AdamW) until `constant_epochs`", minimum=0)
    final_lr: float = key("learning rate from `decay_end_epoch` on", minimum=0)
    constant_epochs: int = key("epochs before the learning rate starts to fall", unit="epochs", minimum=0)
    decay_end_epoch: int = key("epoch at which the learning rate reaches `final_lr`", unit="epochs", minimum=1)
    betas: tuple[float, float] = key("AdamW's betas")
    weight_decay: float = key("AdamW's weight decay", minimum=0)
    clip_norm: float = key("gradients are clipped to this norm; 0 for no clipping", minimum=0)
    ema_decay: float = key("decay of the exponential moving average (EMA) of the weights", minimum=0)
    precision: str = key("`auto`: bf16 autocast on a GPU, float32 on a CPU", choices=choices.PRECISIONS)
    micro_batch: int = operation("images per forward pass and process; 0 for its whole share", unit="images", minimum=0)
    workers: int = operation("image-reading processes per rank", minimum=0)
    checkpoint_every: int = operation("steps between checkpoints", unit="steps", minimum=1)
    keep_checkpoints: int = operation("number of newest checkpoints to keep", minimum=1)
    log_every: int = operation("steps between entries of history.jsonl", unit="steps", minimum=1)
    compile: bool = operation("compile the network's blocks with torch.compile: faster on a GPU, other rounding")
    preview: Preview = nested()
    label_dropout: float = key("probability of hiding the class from the model (settings class, class_gmm)", minimum=0)
    mode_dropout: float = key("probability of hiding the mode from the model (setting mode)", minimum=0)
    means_precision: str = key(
        "precision of the source's means in memory; `auto`: bf16 on a GPU, float32 on a CPU; `reference`: bf16, and "
        "standard deviations rounded to bf16 too",
        choices=choices.MEANS_PRECISIONS,
    )
    means_device: str = operation(
        "where the source's means are kept: on the GPU, or in host memory and gathered for every batch",
        choices=choices.MEANS_DEVICES,
    )
    loss_weighting: LossWeighting = nested()
    schedule: str = key(
        "how the learning rate falls from `lr` to `final_lr` between `constant_epochs` and `decay_end_epoch`",
        choices=choices.SCHEDULES,
    )
    checkpoint_activations: bool = operation("recompute activations in the backward pass: less memory, a third slower")
    sharding: str = operation(
        "each process holds the whole model, or a shard of weights, optimiser state and EMA (FSDP2)",
        choices=choices.SHARDINGS,
    )
    milestones: tuple[int, ...] = operation(
        "epochs whose checkpoints are kept, so that `epochs` can be lowered to them later", unit="epochs", minimum=1
    )
    logger: str = operation("where to log besides history.jsonl", choices=choices.LOGGERS)
    deterministic: bool = operation(
        "on a GPU, choose slower algorithms that repeat a run to the last bit (on a CPU it always does)",
        as_before=False,
    )
    profile: tuple[int, ...] = operation(
        "[first, last] step to profile: a trace and a table of the time, in `profile/` of the state directory; [] for "
        "none",
        unit="steps",
        minimum=0,
        as_before=(),
    )
    initial_phase: InitialPhase = nested()
    steps: int = budget(
        "optimiser steps, instead of `epochs`; 0: `epochs` counts", unit="steps", minimum=0, as_before=0
    )
    milestone_steps: tuple[int, ...] = operation(
        "steps whose checkpoints are kept besides those of `milestones`, for targets with `.stepN`",
        unit="steps",
        minimum=1,
        as_before=(),
    )
    init: str = key(
        "initial weights of the linear layers in the blocks: `xavier` (uniform, zero biases), or `pytorch`, the "
        "defaults of PyTorch, as in the published code",
        choices=choices.INITS,
        as_before="xavier",
    )

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
        if self.decay_end_epoch <= self.constant_epochs:
            raise ValueError(f"'{where}.decay_end_epoch' must be above '{where}.constant_epochs'")
        if self.decay_end_epoch <= self.initial_phase.epochs:
            raise ValueError(f"'{where}.decay_end_epoch' must be above '{where}.initial_phase.epochs'")
        self.check_budget(where, where)
        for name in ("ema_decay", "label_dropout", "mode_dropout"):
            _fraction(getattr(self, name), f"{where}.{name}")
        if self.profile and not (len(self.profile) == 2 and 0 < self.profile[0] <= self.profile[1]):
            raise ValueError(f"'{where}.profile' is {list(self.profile)}; give the first and the last step, or []")

    def check_budget(self, phase: str, budget: str) -> None:
        """Raise ValueError if the initial phase is longer than a budget in epochs.

        A budget in steps may end anywhere: the published weights of step 25,000 are from within a phase of 25,020.

        Args:
            phase, budget: dotted names of the sections with the phase and with the budget, for the message.
        """
        if not self.steps and self.initial_phase.epochs > self.epochs:
            raise ValueError(
                f"'{phase}.initial_phase.epochs' is {self.initial_phase.epochs}, more than '{budget}.epochs' "
                f"{self.epochs}; lower it, or, to stop early in the same training, give the budget in '{budget}.steps'"
            )

    def target_step(self, steps_per_epoch: int) -> int:
        """Return the optimiser step at which training ends."""
        return self.steps or self.epochs * steps_per_epoch

    def kept_steps(self, steps_per_epoch: int) -> frozenset[int]:
        """Return the steps whose checkpoints are kept."""
        return frozenset((*(epoch * steps_per_epoch for epoch in self.milestones), *self.milestone_steps))

    def effective(self, setting: choices.Setting) -> "Train":
        """Return the section with every key that the setting ignores at a fixed value."""
        idle: dict[str, Any] = {}
        if self.steps:
            idle["epochs"] = 1
        if not self.initial_phase.epochs:
            idle["initial_phase"] = InitialPhase(0, 0.0, 0.0)
        if setting.condition != "class":
            idle["label_dropout"] = 0.0
        if setting.condition != "mode":
            idle["mode_dropout"] = 0.0
        if not setting.mixture:
            idle |= {"assignment": "soft", "means_precision": "auto"}
        if self.loss_weighting.rule == "none":
            idle["loss_weighting"] = LossWeighting("none", "mode", 0.0, 0.0, 0, (1.0, 1.0), 0)
        elif self.loss_weighting.warmup_steps:
            idle["loss_weighting"] = replace(self.loss_weighting, warmup_epochs=0)
        return replace(self, **idle)


@dataclass(frozen=True)
class Guidance:
    """Guidance during sampling: classifier-free, or autoguidance if there is a guide."""

    scale: float = key("guidance scale; 1 for none (targets with `_ag` take `guide.scale`)", minimum=0)
    interval: tuple[float, float] = key("lowest and highest time at which guidance applies")

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
        _times(self.interval, where)


@dataclass(frozen=True)
class Sample:
    """Generation of images."""

    n_images: int = key("images to generate", unit="images", minimum=1)
    time_points: int = key("points of the time grid, one more than steps; 1 decodes the source itself", minimum=1)
    solver: str = key(
        "ODE solver; those from `dopri5` on are adaptive and use only the first and the last time point",
        choices=choices.SOLVERS,
    )
    precision: str = key(
        "`auto`: bf16 autocast on a GPU, float32 on a CPU; `reference`: bf16 autocast for the decoder too, and noise, "
        "source, state, time and guidance in bf16, as published",
        choices=choices.SAMPLING_PRECISIONS,
    )
    shard_size: int = key("images per shard, the unit of resumption", unit="images", minimum=1)
    batch_size: int = operation("images per model call", unit="images", minimum=1)
    guidance: Guidance = nested()
    rtol: float = key("relative tolerance of the adaptive solvers", minimum=0)
    atol: float = key("absolute tolerance of the adaptive solvers", minimum=0)
    mode_draw: str = key("how modes are drawn from the mixture's weights", choices=choices.MODE_DRAWS)
    label_draw: str = key("class labels: equally often each, or drawn at random", choices=choices.LABEL_DRAWS)
    features: bool = operation("also write the features of `fid.detector`, which `fid` then uses")
    means_device: str = operation("as `train.means_device`", choices=choices.MEANS_DEVICES)
    compile: bool = operation("as `train.compile`", as_before=False)

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
        if not choices.SOLVERS[self.solver].adaptive:
            return
        if self.precision == "reference":
            raise ValueError(f"'{where}.precision' reference has bf16 times, too coarse for {self.solver}; use euler")
        if self.rtol + self.atol <= 0:
            raise ValueError(f"'{where}.rtol' and '{where}.atol' are both 0; {self.solver} needs a positive one")

    def effective(self, setting: choices.Setting) -> "Sample":
        """Return the section with every key that the setting ignores at a fixed value."""
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
    """The weaker model of autoguidance, for targets with `_ag` only."""

    weights: str = key(
        "`train`, or a weights file, in which `{encoder}` and `{setting}` stand for the names", path=True
    )
    model: str = key("name of an entry of `models`")
    epochs: int = budget("passes over the training images", unit="epochs", minimum=1)
    scale: float = key("guidance scale: v_guide + scale (v - v_guide)", minimum=0)
    interval: tuple[float, float] = key("lowest and highest time at which guidance applies")
    steps: int = budget(
        "optimiser steps, instead of `epochs`; 0: `epochs` counts", unit="steps", minimum=0, as_before=0
    )

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
        _times(self.interval, where)


@dataclass(frozen=True)
class Fid:
    """Frechet distance between generated and real images."""

    detector: str = key("feature network", choices=choices.DETECTORS)
    weights: str = key("weights file of the detector; none for `encoder`", path=True, as_before="")
    reference: str = key(
        "what to compare with: `train` (the training images), or an .npz file with `mu` and `sigma`", path=True
    )
    batch_size: int = operation("images per detector call", unit="images", minimum=1)
    workers: int = operation("image-reading processes per rank", minimum=0)
    encoder: str = key(
        "with the detector `encoder`: the entry of `encoders` whose global tokens are the features; empty for the "
        "run's own encoder, which favours its own mixture",
        as_before="",
    )

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
        if self.detector != "encoder" and not self.weights:
            remedy = choices.DETECTORS[self.detector].remedy
            raise ValueError(f"'{where}.weights' is empty, but the detector {self.detector} has weights: {remedy}")


@dataclass(frozen=True)
class Sweep:
    """Mixtures with different numbers of modes, compared."""

    modes: tuple[int, ...] = key("numbers of modes to compare", minimum=1)

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
        if not self.modes:
            raise ValueError(f"'{where}.modes' must list at least one number, got an empty list")


@dataclass(frozen=True)
class Recipe:
    """Keys of `train` for some settings and models: laid over `train` where both match, also for the guide."""

    settings: tuple[str, ...] = key("settings that it is for; empty for all", choices=choices.SETTINGS, as_before=())
    models: tuple[str, ...] = key("entries of `models` that it is for; empty for all", as_before=())
    train: dict[str, Any] = key(
        "keys of `train`, all but `model` and `seed`; `epochs` and `steps` do not count for a guide", part_of=Train
    )

    def check(self, where: str) -> None:
        """Raise ValueError at a key that belongs to a target's name."""
        for name in ("model", "seed"):
            if name in self.train:
                raise ValueError(
                    f"'{where}.train.{name}' can't be in a recipe; set 'train.{name}', or name it in the target"
                )

    def matches(self, setting: str, model: str) -> bool:
        """Whether it is for a setting and a model."""
        return (not self.settings or setting in self.settings) and (not self.models or model in self.models)


@dataclass(frozen=True)
class Config:
    """The whole configuration."""

    run: str = key("subfolder of `results/` for this configuration; empty for `results/` itself")
    gpus: str | int = operation("GPUs per job: a number, or `auto` for the limit in the Snakemake profile")
    processes: int = operation("processes per job on a CPU", minimum=1)
    card: str = operation(
        "GPU whose speed and memory estimates assume; `auto`: the one that nvidia-smi names, else an A100-40GB",
        choices=choices.CARDS,
        as_before="auto",
    )
    max_runtime_hours: float = operation(
        "longest `runtime` that a rule requests, because schedulers reject longer ones; stages resume in the next job",
        unit="hours",
        minimum=0,
        as_before=24.0,
    )
    encoders: dict[str, Encoder] = nested()
    models: dict[str, Model] = nested()
    data: Data = nested()
    image: Image = nested()
    latents: Latents = nested()
    extract: Extract = nested()
    latent_stats: LatentStats = nested()
    gmm: Gmm = nested()
    spatial_gmm: SpatialGmm = nested()
    decoder: Decoder = nested()
    train: Train = nested()
    sample: Sample = nested()
    fid: Fid = nested()
    sweep: Sweep = nested()
    guide: Guide = nested()
    recipes: dict[str, Recipe] = nested(as_before={})

    def check(self, where: str) -> None:
        """Raise ValueError if a key names an entry that does not exist, or recipes contradict `train` or each other."""
        self.section("model")
        if self.fid.encoder:
            self.section("encoder", self.fid.encoder)
        for name, recipe in self.recipes.items():
            for model in recipe.models:
                _named(self.models, model, "models", f"'recipes.{name}.models' names ")
            self._check_recipe(name, overlaid(self.train, recipe.train))
        for setting in choices.SETTINGS:
            for model in self.models:
                matching = [name for name, recipe in self.recipes.items() if recipe.matches(setting, model)]
                if len(matching) > 1:
                    both = " and ".join(f"'recipes.{name}'" for name in matching[:2])
                    raise ValueError(f"{both} are both for the setting {setting} and the model {model}; narrow one")

    def _check_recipe(self, name: str, train: Train) -> None:
        where, recipe = f"recipes.{name}.train", self.recipes[name]
        train.loss_weighting.check(f"{where}.loss_weighting")
        train.initial_phase.check(f"{where}.initial_phase")
        # A recipe for guides only may have a phase that is longer than the budget of `train`.
        replace(train, steps=1).check(where)
        weighting = train.loss_weighting
        lacking = [setting for setting in recipe.settings if not choices.SETTINGS[setting].mixture]
        if "loss_weighting" in recipe.train and weighting.rule != "none" and weighting.by == "mode" and lacking:
            raise ValueError(
                f"'{where}.loss_weighting.by' is mode, but the setting '{lacking[0]}' has no modes; set it to class, "
                f"or take the setting out of 'recipes.{name}.settings'"
            )

    def recipe_of(self, setting: str, model: str) -> str:
        """Return the name of the recipe for a setting and an entry of `models`; empty if there is none."""
        return next((name for name, recipe in self.recipes.items() if recipe.matches(setting, model)), "")

    def train_of(self, setting: str, model: str = "", *, guide: bool = False) -> Train:
        """Return the section `train` of a training: with its recipe laid over it, and of a guide its budget.

        Args:
            model: entry of `models`; empty for ``train.model``.
        """
        train = replace(self.train, model=model or self.train.model)
        if name := self.recipe_of(setting, train.model):
            train = overlaid(train, self.recipes[name].train)
        return replace(train, epochs=self.guide.epochs, steps=self.guide.steps) if guide else train

    def check_training(self, setting: str, model: str = "", *, guide: bool = False) -> None:
        """Raise ValueError if a training's initial phase is longer than its budget; arguments as for :meth:`train_of`.

        This is checked for the trainings of a run: a recipe for guides may be longer than the budget of `train`.
        """
        train = self.train_of(setting, model, guide=guide)
        name = self.recipe_of(setting, train.model)
        given = self.recipes[name].train if name else {}
        phase, budget = (f"recipes.{name}.train" if key in given else "train" for key in ("initial_phase", "epochs"))
        train.check_budget(phase, "guide" if guide else budget)

    def section(self, name: str, encoder: str = "", model: str = "") -> Any:
        """Return a section; ``encoder`` and ``model`` name the entry of ``encoders`` and ``models``."""
        if name == "encoder":
            return _named(self.encoders, encoder, "encoders")
        if name == "model":
            return _named(self.models, model or self.train.model, "models")
        return getattr(self, name)


def _named(mapping: Mapping[str, Any], name: str, where: str, who: str = "") -> Any:
    if name not in mapping:
        what = f"{who or 'no '}'{name}'{', which is not' if who else ''} in '{where}'"
        raise ValueError(f"{what}{did_you_mean(name, mapping)}; configured: {', '.join(mapping)}")
    return mapping[name]


def overlaid(section: Any, values: Mapping[str, Any]) -> Any:
    """Return a section with other values for some keys, nested sections included."""
    changed = {
        name: overlaid(getattr(section, name), value) if isinstance(value, Mapping) else value
        for name, value in values.items()
    }
    return replace(section, **changed)


def declared(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield the dotted name, type and metadata of every key of a section, nested sections included."""
    hints = get_type_hints(kind)
    for f in fields(kind):
        if is_dataclass(hints[f.name]):
            yield from declared(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, hints[f.name], f.metadata


def keys_of_kind(values: Any, *kinds: str) -> dict[str, Any]:
    """Return the keys of a section that are of the given kinds, nested sections included, as plain JSON values.

    Keys at their ``as_before`` value are omitted.
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
