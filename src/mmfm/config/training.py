"""Sections of the flow-matching model: its sizes, its training, and recipes."""

# ruff: noqa: RUF009 - `nested` returns a field

from dataclasses import dataclass, replace
from typing import Any

from mmfm.config import choices
from mmfm.config.keys import budget, fraction, key, nested, operation

_LARGEST_GAMMA = 20
"""A label's loss can be as large as the mean times the number of labels; this power of the ratio must stay finite."""


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

    every: int = operation(
        "steps between preview grids; 0 for none but preview.png, made at the end", unit="steps", minimum=0
    )
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
        fraction(self.decay, f"{where}.decay")
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
        fraction(self.ema_decay, f"{where}.ema_decay")
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
    gpus: str | int = operation(
        "GPUs of a training on each of its nodes: a number, `auto`: the key `gpus`; a recipe can set it for a model",
        as_before="auto",
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
    weights: str = key(
        "`train`; or `published`, or weights of yours (ema.safetensors, or a published .pt), in which `{encoder}` and "
        "`{setting}` stand for the names: nothing is trained then",
        path=True,
        as_before="train",
    )

    def check(self, where: str) -> None:
        """Raise ValueError if keys contradict each other."""
        if self.decay_end_epoch <= self.constant_epochs:
            raise ValueError(f"'{where}.decay_end_epoch' must be above '{where}.constant_epochs'")
        if self.decay_end_epoch <= self.initial_phase.epochs:
            raise ValueError(f"'{where}.decay_end_epoch' must be above '{where}.initial_phase.epochs'")
        self.check_budget(where, where)
        for name in ("ema_decay", "label_dropout", "mode_dropout"):
            fraction(getattr(self, name), f"{where}.{name}")
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
        idle: dict[str, Any] = {"weights": "train"}  # what is trained does not depend on what else is given
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
class Recipe:
    """Keys of `train` for some settings and models: laid over `train` where both match, also for the guide."""

    settings: tuple[str, ...] = key("settings that it is for; empty for all", choices=choices.SETTINGS, as_before=())
    models: tuple[str, ...] = key("entries of `models` that it is for; empty for all", as_before=())
    train: dict[str, Any] = key(
        "keys of `train`, all but `model`, `seed` and `weights`; `epochs` and `steps` do not count for a guide",
        part_of=Train,
    )

    def check(self, where: str) -> None:
        """Raise ValueError at a key that belongs to a target's name."""
        for name in ("model", "seed", "weights"):
            if name in self.train:
                raise ValueError(
                    f"'{where}.train.{name}' can't be in a recipe; set 'train.{name}'"
                    + ("" if name == "weights" else ", or name it in the target")
                )

    def matches(self, setting: str, model: str) -> bool:
        """Whether it is for a setting and a model."""
        return (not self.settings or setting in self.settings) and (not self.models or model in self.models)
