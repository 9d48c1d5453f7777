"""A configuration for a folder of images: every value with its reason, within the time that there is.

Pure arithmetic on what is known of images, encoder and machine; nothing here reads a file or imports PyTorch.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from mmfm.config import Config, Model, build
from mmfm.workflow.costs import EncoderSize, Rates
from mmfm.workflow.facts import Facts
from mmfm.workflow.resources import Estimator

SETTINGS = ("uncond", "gmm", "mode")
"""The settings that are compared within the time."""

FEWEST_IMAGES = 64
"""Four modes of 16 images, batches of 8: with fewer, neither a mode nor a distance means anything."""

BUDGET = 3600.0
"""Seconds for all three settings, decoder included."""

_STARTUP = 8.0  # seconds until a stage has loaded Python, PyTorch and its inputs
_PER_MODE = 40
_FEWEST_STEPS, _ENOUGH_STEPS, _MOST_STEPS = 500, 2_000, 20_000
_SIZES = (32, 48, 64, 96, 128, 192, 256)
_LARGEST_ON_CPU = 128
_COMMENTS_AT = 34


@dataclass(frozen=True)
class Images:
    """What matters of the images.

    Attributes:
        root: their folder.
        count: of images.
        classes: number of class folders.
        side: median of the shorter sides, pixels.
        mean_bytes: mean size of a file.
        damaged: whether some can't be read.
    """

    root: str
    count: int
    classes: int
    side: int
    mean_bytes: float
    damaged: bool


@dataclass(frozen=True)
class EncoderChoice:
    """An encoder and its sizes.

    Attributes:
        family: in :data:`mmfm.config.choices.ENCODER_FAMILIES`.
        weights: the value of the key.
        reason: why this one.
        width, depth, patch: channels, layers, pixels a side of a token.
    """

    family: str
    weights: str
    reason: str
    width: int
    depth: int
    patch: int


@dataclass(frozen=True)
class Machine:
    """What runs it.

    Attributes:
        name: for people, e.g. ``2 cores``.
        gpu: whether jobs get a GPU.
        cores: of the CPU.
        rates: measured or assumed.
    """

    name: str
    gpu: bool
    cores: int
    rates: Rates


@dataclass(frozen=True)
class Line:
    """One value of the configuration: its dotted key, and why."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Suggestion:
    """A configuration with reasons, and what it will take.

    Attributes:
        lines: the values, sections together.
        seconds: estimate by part of the work, for the three settings.
        doubt: what speaks against the size that was asked for; empty if nothing does.
    """

    lines: tuple[Line, ...]
    seconds: dict[str, float]
    doubt: str

    def value(self, key: str) -> Any:
        """Return the value of a dotted key."""
        return next(line.value for line in self.lines if line.key == key)

    @property
    def minutes(self) -> int:
        """All of it, at least one."""
        return max(1, round(sum(self.seconds.values()) / 60))


@dataclass(frozen=True)
class _Plan:
    """What is tried: sides of the images (pixels) and of the latent grid, name and sizes of the model."""

    size: int
    grid: int
    model: str
    sizes: Model


def suggest(
    images: Images, encoder: EncoderChoice, machine: Machine, defaults: Mapping[str, Any], size: int | None = None,
    budget: float = BUDGET,
) -> Suggestion:  # fmt: skip
    """Suggest values for the keys that depend on the images, the encoder and the machine.

    The first plan is taken that leaves time for enough steps; larger models come first, then larger images, then finer
    latents.

    Args:
        defaults: the contents of config.yaml, over which the suggestion lies.
        size: side of the images in pixels, where the user wants a certain one.
        budget: seconds for the settings in :data:`SETTINGS`.

    Raises:
        ValueError: too few images, or a size as in :func:`require_size`.
    """
    if images.count < FEWEST_IMAGES:
        raise ValueError(
            f"'{images.root}' has {images.count} readable image{'' if images.count == 1 else 's'}; at least "
            f"{FEWEST_IMAGES} are needed, and some hundred for a distance that means something: add images"
        )
    base = _Base(images, encoder, machine, defaults, size)
    plans = list(base.plans())
    for plan in plans:
        epochs = base.longest(plan, budget)
        if base.steps(epochs) >= base.enough:
            break
    return Suggestion(tuple(base.lines(plan, epochs)), base.seconds(plan, epochs), base.doubt)


def require_size(size: int) -> None:
    """Raise ValueError if images can't have this side, in pixels: below 8, or none that a grid of tokens divides."""
    if size < 8:
        raise ValueError(f"an image size of {size} is too small; images have at least 8 pixels a side")
    if size % 4:
        below = size // 4 * 4
        raise ValueError(f"an image size of {size} is not a multiple of 4; take {below} or {below + 4}")


class _Base:
    """The values that do not depend on the plan, and the costs of plans."""

    def __init__(
        self,
        images: Images,
        encoder: EncoderChoice,
        machine: Machine,
        defaults: Mapping[str, Any],
        size: int | None,
    ) -> None:
        self.images, self.encoder, self.machine, self.defaults = images, encoder, machine, defaults
        self.size = size
        self.holdout = min(images.count // 10, 2_000) if images.count >= 500 else 0
        self.n = images.count - self.holdout
        self.modes = min(8192, max(4, _power_below(self.n // _PER_MODE)))
        self.batch = min(256 if machine.gpu else 32, max(8, _power_below(self.n // 8)))
        self.epoch = self.n // self.batch
        self.enough = _ENOUGH_STEPS
        self.sampled = 10_000 if machine.gpu else min(10_000, 1_000 * math.ceil(1.5 * encoder.width / 1_000))
        self.features = encoder.width

    def plans(self) -> Iterable[_Plan]:
        """Yield plans, the best first."""
        for name, model in self.models():
            for size in self.sizes():
                for grid in (16, 8, 4):
                    # A token of more than 16 pixels a side can't say what is in it; finer ones take many steps' time.
                    fits = size % grid == 0 and (grid == 4 or size // grid >= 8) and (size // grid <= 16 or self.size)
                    if fits and (grid < 16 or self.machine.gpu):
                        yield _Plan(size, grid, name, model)

    def sizes(self) -> list[int]:
        """Return the sides of images to try, in pixels, the largest first; ValueError as in :func:`require_size`."""
        if self.size is not None:
            require_size(self.size)
            return [self.size]
        fitting = [size for size in _SIZES if size <= min(self.largest, 1.1 * self.images.side)] or [_SIZES[0]]
        return [fitting[-1], *(size for size in (128, 64) if size < fitting[-1])]

    @property
    def largest(self) -> int:
        """Largest side of images that this machine has the time for, pixels."""
        return max(_SIZES) if self.machine.gpu else _LARGEST_ON_CPU

    @property
    def doubt(self) -> str:
        """What speaks against the size that was asked for."""
        if self.size is None:
            return ""
        reasons = []
        if self.size > self.largest:
            reasons.append(f"this machine has the time for at most {self.largest}")
        if self.size > 1.1 * self.images.side:
            reasons.append(f"smaller images (median {self.images.side:,}) are enlarged")
        return " and ".join(reasons)

    def models(self) -> Iterable[tuple[str, Model]]:
        """Yield models whose head is at least as wide as the latents have channels, the largest first."""
        if self.machine.gpu:
            yield "S", self.configured("S")
        tiny = self.configured("tiny")
        if tiny.hidden_size[1] >= self.encoder.width:
            yield "tiny", tiny
            return
        head = 64 * math.ceil(self.encoder.width / 64)
        heads = (tiny.num_heads[0], head // 64)
        yield f"tiny{head}", Model((tiny.hidden_size[0], head), tiny.depth, heads)

    def configured(self, model: str) -> Model:
        """Return the sizes of a model that the defaults have."""
        sizes: Model = build(Model, self.defaults["models"][model], f"models.{model}")
        return sizes

    def steps(self, epochs: int) -> int:
        """Return the optimiser steps of so many epochs."""
        return epochs * self.epoch

    def longest(self, plan: _Plan, budget: float) -> int:
        """Return the epochs that fit the budget, within the fewest and the most steps."""
        low, high = (max(1, math.ceil(steps / self.epoch)) for steps in (_FEWEST_STEPS, _MOST_STEPS))
        if sum(self.seconds(plan, low).values()) > budget:
            return low
        while low < high:
            middle = (low + high + 1) // 2
            if sum(self.seconds(plan, middle).values()) <= budget:
                low = middle
            else:
                high = middle - 1
        return low

    def seconds(self, plan: _Plan, epochs: int) -> dict[str, float]:
        """Estimate the seconds of a plan by part of the work."""
        e, times = self.encoder, len(SETTINGS)
        size = EncoderSize(e.width, e.depth, plan.grid**2 + 5, plan.grid)
        facts = Facts(self.n, self.images.mean_bytes, "", size, self.machine.rates)
        config: Config = build(Config, merged(self.defaults, nested(self.lines(plan, epochs))))
        needs = Estimator(config, next(iter(config.encoders)), 1, self.machine.gpu, facts).stages()
        took = {name: need.seconds + _STARTUP for name, need in needs.items()}
        return {
            "encoding": took["extract"] + took["latent_stats"] + took["spatial_gmm"],
            "mixture": took["fit_gmm"],
            "decoder": took["train_decoder"],
            f"{times} trainings": times * took["train"],
            f"{times} x {self.sampled:,} samples": times * took["sample"],
            "distances": took["fid_reference"] + times * took["fid"],
        }

    def decoder_steps(self, epochs: int) -> int:
        """Return the steps of the decoder: as many as a setting's, within bounds."""
        return min(10_000, max(1_000, self.steps(epochs)))

    def decoder_sizes(self, size: int) -> dict[str, int]:
        """Return the decoder's sizes for images of ``size`` pixels."""
        if self.machine.gpu:
            width, depth = (512, 12) if size > 128 else (384, 6)
        else:
            width, depth = (256, 4) if size > 64 else (192, 4)
        return {
            "hidden_size": width, "intermediate_size": 4 * width, "num_heads": width // 64, "num_layers": depth,
        }  # fmt: skip

    @property
    def time_points(self) -> int:
        """Time points of the solver."""
        return 50 if self.machine.gpu else 25

    @property
    def workers(self) -> int:
        """Image-reading processes of a GPU job; on a CPU they would take cores from the arithmetic."""
        return min(8, max(1, self.machine.cores // 2)) if self.machine.gpu else 0

    def lines(self, plan: _Plan, epochs: int) -> list[Line]:
        """Return all values with their reasons."""
        return [
            *self._images(plan), *self._encoder(plan), *self._mixture(), *self._model(plan),
            *self._training(plan, epochs), *self._decoder(plan, epochs), *self._measuring(),
        ]  # fmt: skip

    def _images(self, plan: _Plan) -> Iterable[Line]:
        i = self.images
        yield Line("data.root", i.root, f"{i.count:,} images, {_classes(i.classes)}")
        if not self.holdout:
            floor = "with fewer than 500 images none can be spared for a floor"
        elif self.holdout <= self.features:
            floor = f"for a floor of the distances, a high one: fewer images than the {self.features:,} features"
        else:
            floor = "for a floor of the distances: that of real images"
        share = f"{self.holdout / i.count:.0%} " if self.holdout else ""
        yield Line("data.holdout", self.holdout, share + floor)
        if i.damaged:
            yield Line("data.unreadable", "skip", "some can't be read; they are found by decoding all, and left out")
            if self.machine.cores > 1:
                yield Line("data.workers", min(8, self.machine.cores), "decoding processes of the listing")
        median = f"shorter sides have {i.side:,} pixels in the median"
        if self.size:
            why = f"as asked for, but {self.doubt}" if self.doubt else "as asked for"
        elif plan.size > i.side:
            why = f"{median}; smaller images are enlarged"
        elif plan.size < self.sizes()[0]:
            why = f"{median}; larger images leave time for too few steps"
        else:
            why = f"{median}; at most {self.largest} on this machine"
        yield Line("image.size", plan.size, why)

    def _encoder(self, plan: _Plan) -> Iterable[Line]:
        e, entry = self.encoder, f"encoders.{self.encoder.family}"
        yield Line(f"{entry}.family", e.family, "by the model_type in its config.json")
        yield Line(f"{entry}.weights", e.weights, e.reason)
        yield Line(
            f"{entry}.input_size", plan.grid * e.patch,
            f"{plan.grid} x {plan.grid} patches of {e.patch} pixels: latents of {e.width} x {plan.grid} x {plan.grid}",
        )  # fmt: skip
        if self.workers:
            for stage in ("extract", "spatial_gmm"):
                yield Line(f"{stage}.workers", self.workers, f"image-reading processes, of {self.machine.cores} cores")

    def _mixture(self) -> Iterable[Line]:
        yield Line(
            "gmm.n_components", self.modes,
            f"{self.n // self.modes} images a mode; a power of two that leaves {_PER_MODE} or more"
            if self.n >= _PER_MODE * self.modes
            else f"{self.n // self.modes} images a mode, and fewer modes would hardly be a mixture",
        )  # fmt: skip
        around = sorted({k for k in (self.modes // 4, self.modes, 4 * self.modes) if 2 <= k <= self.n // 8})
        yield Line("sweep.modes", around, "around it, for the target sweep.png")

    def _model(self, plan: _Plan) -> Iterable[Line]:
        head, width = plan.sizes.hidden_size[1], self.encoder.width
        if plan.model not in self.defaults["models"]:
            why = f"as `tiny`, but its head can hold the latents' {width} channels"
            yield Line(f"models.{plan.model}.hidden_size", list(plan.sizes.hidden_size), why)
            yield Line(f"models.{plan.model}.depth", list(plan.sizes.depth), "as `tiny`")
            yield Line(f"models.{plan.model}.num_heads", list(plan.sizes.num_heads), "32 and 64 channels a head")
        size = "the largest that leaves time for enough steps" if self.machine.gpu else "small: there is no GPU"
        yield Line("train.model", plan.model, f"{size}; its head's width {head} holds the {width} channels")

    def _training(self, plan: _Plan, epochs: int) -> Iterable[Line]:
        steps = self.steps(epochs)
        yield Line("train.global_batch", self.batch, f"at most an eighth of the {self.n:,} training images")
        if steps >= _MOST_STEPS:
            why = "enough; more is left for you to raise"
        elif steps >= self.enough:
            why = "what fits the time"
        else:
            why = f"few, for lack of time; {self.enough:,} would be a start"
        yield Line("train.epochs", epochs, f"{steps:,} steps, {self.epoch:,} an epoch: {why}")
        widest = max(plan.sizes.hidden_size)
        lr = 1e-3 if widest <= 256 else (5e-4 if widest <= 1024 else 2e-4)
        yield Line("train.lr", lr, f"for a width of {widest}: 1e-3 for small models, 2e-4 as published for large ones")
        yield Line("train.final_lr", lr / 10, "a tenth")
        yield Line("train.constant_epochs", epochs // 2, "half of the epochs")
        yield Line("train.decay_end_epoch", max(1, epochs), "the schedule ends with the budget")
        ema = min(0.9995, round(1 - 10 / steps, 4))
        yield Line("train.ema_decay", ema, "averages over a tenth of the steps, at most 2,000")
        yield Line("train.preview.every", max(100, steps // 4), "steps: four grids of samples on the way")
        if self.workers:
            yield Line("train.workers", self.workers, f"image-reading processes, of {self.machine.cores} cores")

    def _decoder(self, plan: _Plan, epochs: int) -> Iterable[Line]:
        steps, sizes = self.decoder_steps(epochs), self.decoder_sizes(plan.size)
        yield Line("decoder.weights", "train", "there is none for these images yet")
        where = f"for images of {plan.size} pixels {'on a GPU' if self.machine.gpu else 'without a GPU'}"
        yield Line("decoder.hidden_size", sizes["hidden_size"], where)
        yield Line("decoder.intermediate_size", sizes["intermediate_size"], "four times the width")
        yield Line("decoder.num_heads", sizes["num_heads"], "64 channels a head")
        yield Line("decoder.num_layers", sizes["num_layers"], where)
        yield Line("decoder.global_batch", self.batch, "as in train")
        yield Line("decoder.lr", 1e-3 if sizes["hidden_size"] <= 256 else 5e-4, "for this width")
        noise = 1.2 if self.steps(epochs) < 10_000 else 0.8
        yield Line("decoder.noise", noise, "latents are still noisy after few steps (published: 0.8)" if noise > 1 else
                   "as published")  # fmt: skip
        yield Line("decoder.horizon", steps, "the learning rate reaches 0 with the last step")
        yield Line("decoder.steps", steps, "as many as the flow's, within 1,000 to 10,000")
        if self.workers:
            yield Line("decoder.workers", self.workers, f"image-reading processes, of {self.machine.cores} cores")

    def _measuring(self) -> Iterable[Line]:
        enough = "more than" if self.sampled > self.features else "for lack of time no more than"
        yield Line("sample.n_images", self.sampled, f"{enough} the distance's {self.features:,} features")
        yield Line("sample.time_points", self.time_points, f"{self.time_points - 1} steps of the solver")
        yield Line("fid.detector", "encoder", "needs no download; not an FID")
        if self.workers:
            yield Line("fid.workers", self.workers, f"image-reading processes, of {self.machine.cores} cores")


def _power_below(value: float) -> int:
    """Return the largest power of two that is at most ``value``; 1 below that."""
    return 1 << max(0, int(value).bit_length() - 1)


def _classes(count: int) -> str:
    return "one class" if count == 1 else f"{count:,} classes"


def nested(lines: Iterable[Line]) -> dict[str, Any]:
    """Return the values of lines as nested mappings, as YAML would be read."""
    result: dict[str, Any] = {}
    for line in lines:
        *folders, key = line.key.split(".")
        section = result
        for folder in folders:
            section = section.setdefault(folder, {})
        section[key] = line.value
    return result


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings laid over one another."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return result


def as_yaml(lines: Iterable[Line]) -> str:
    """Return lines as YAML, sections in the order of their first line, the reason beside every value."""
    lines = list(lines)
    reasons = {line.key: line.reason for line in lines}
    return "".join(_render(nested(lines), "", reasons))


def _render(section: Mapping[str, Any], prefix: str, reasons: Mapping[str, str]) -> Iterable[str]:
    for name, value in section.items():
        key, indent = f"{prefix}{name}", "  " * prefix.count(".")
        if isinstance(value, Mapping):
            yield f"{'' if prefix else chr(10)}{indent}{name}:\n"
            yield from _render(value, f"{key}.", reasons)
        else:
            text = f"{indent}{name}: {scalar(value)}"
            yield f"{text:<{_COMMENTS_AT}}  # {reasons[key]}\n"


def scalar(value: Any) -> str:
    """Return a value as YAML on one line; text that looks like a number is quoted."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").rstrip("\n")
