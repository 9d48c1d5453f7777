"""The values that configuration keys accept: one table per key, with the code that implements each value.

To add an encoder family, detector, metric or solver, write it in its own file and add a line here. The schema, error
messages, estimates and documentation are built from these tables, so this module must not import PyTorch.
"""

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

_OTHER_NAMES = {"fid": "frechet"}
"""Usual names of what has another one here, for hints."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean '...'?)`` for the closest known word; an empty string if none is close."""
    if _OTHER_NAMES.get(word) in (known := list(known)):
        return f" (did you mean '{_OTHER_NAMES[word]}'?)"
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


@dataclass(frozen=True)
class Choice:
    """One value of a key.

    Attributes:
        implementation: ``module:name``; empty if the value has no code of its own.
    """

    implementation: str = ""

    def load(self) -> Any:
        """Import and return the implementation."""
        module, _, name = self.implementation.partition(":")
        return getattr(importlib.import_module(module), name)


C = TypeVar("C", bound=Choice)


class Choices(dict[str, C]):
    """The values of a key, by name. Looking up an unknown name raises ValueError and suggests the closest one."""

    def __init__(self, what: str, values: dict[str, C]) -> None:
        super().__init__(values)
        self.what = what

    def require(self, name: str) -> None:
        """Raise ValueError unless ``name`` is one of the values."""
        self[name]

    def __missing__(self, name: str) -> C:
        raise ValueError(f"unknown {self.what} '{name}'{did_you_mean(name, self)}; it must be one of {', '.join(self)}")


def plain(what: str, *names: str) -> Choices[Choice]:
    """Return values without implementations, which stages handle by name."""
    return Choices(what, {name: Choice() for name in names})


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderFamily(Choice):
    """An encoder architecture, implemented by a :class:`mmfm.autoencoder.family.AnyFamily`.

    Attributes:
        patch: patch size of the base model in pixels, for estimates made before its config.json is downloaded.
        model_types: accepted values of `model_type` in config.json; empty for all that a library has.
        timm: whether folders are in timm's layout.
        image_mean, image_std: normalisation of the usual weights.
    """

    patch: int = 16
    model_types: tuple[str, ...] = ()
    timm: bool = False
    image_mean: tuple[float, float, float] = _IMAGENET_MEAN
    image_std: tuple[float, float, float] = _IMAGENET_STD


@dataclass(frozen=True)
class DetectorKind(Choice):
    """A feature network, implemented by (path, digest, device) -> :class:`mmfm.evaluation.detector.Detector`.

    Attributes:
        features: dimension of an image's features.
        flops: operations per image.
        weight_bytes: size of the weights.
        remedy: how to get the weights, for error messages.
        size: side of the images it takes, in pixels; 0 for any.
        cpu_rate: images per second and CPU core, measured, if that is slow; 0 if it is not.
        classifies: whether it has spatial features and logits, for sFID and the Inception Score.
    """

    features: int = 0
    flops: float = 0.0
    weight_bytes: float = 0.0
    remedy: str = ""
    size: int = 0
    cpu_rate: float = 0.0
    classifies: bool = False


@dataclass(frozen=True)
class Metric(Choice):
    """A quality metric of generated images.

    It is implemented by (generated, reference, device) -> values by name, of which its own and ``NAME_std`` are used;
    generated and reference are :class:`mmfm.evaluation.collected.Statistics`. Metrics with the same implementation are
    computed together.

    Attributes:
        title: its name in results.
        needs: kind of statistics, of ``mmfm.evaluation.collected.KINDS``.
        larger: whether larger is better.
    """

    title: str = ""
    needs: str = "gaussian"
    larger: bool = False


@dataclass(frozen=True)
class Solver(Choice):
    """An ODE solver; see :mod:`mmfm.flow.solver`.

    Attributes:
        evaluations: velocity evaluations per step; None for adaptive solvers.
    """

    evaluations: int | None = None

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own steps between the first and the last time point."""
        return self.evaluations is None


@dataclass(frozen=True)
class Covariance(Choice):
    """A shape of covariances, handled by name in the mixture's code.

    Attributes:
        truncatable: whether the truncated E-step supports it.
    """

    truncatable: bool = False


@dataclass(frozen=True)
class Start(Choice):
    """An initialisation of EM.

    Attributes:
        rows: images per component that it uses.
    """

    rows: int = 1


@dataclass(frozen=True)
class Setting(Choice):
    """A training setting: its source and its condition.

    Attributes:
        mixture: the source is the spatial mixture, not N(0, I).
        condition: the label that the model sees: ``mode`` (index of the source's mode), ``class`` (the image's class),
            or None (no label).
    """

    mixture: bool = False
    condition: str | None = None


SETTINGS = Choices(
    "setting",
    {
        "uncond": Setting(),
        "gmm": Setting(mixture=True),
        "mode": Setting(mixture=True, condition="mode"),
        "class": Setting(condition="class"),
        "class_gmm": Setting(mixture=True, condition="class"),
    },
)
"""The training settings, by the names used in targets and commands."""

ENCODER_FAMILIES = Choices(
    "encoder family",
    {
        "dinov2": EncoderFamily("mmfm.autoencoder.families.dinov2:FAMILY", 14, ("dinov2", "dinov2_with_registers")),
        "siglip2": EncoderFamily(
            "mmfm.autoencoder.families.siglip2:FAMILY",
            16,
            ("siglip", "siglip_vision_model"),
            False,
            (0.5,) * 3,
            (0.5,) * 3,
        ),
        "mae": EncoderFamily("mmfm.autoencoder.families.mae:FAMILY", 16, ("vit_mae",)),
        "hf": EncoderFamily("mmfm.autoencoder.families.hf:FAMILY"),
        "timm": EncoderFamily("mmfm.autoencoder.families.timm:FAMILY", timm=True),
    },
)

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"

DETECTORS = Choices(
    "detector",
    {
        "fashion": DetectorKind(
            "mmfm.evaluation.detectors.fashion:load", 64, 2e7, 1e6, "`tools/train_detector.py` makes them", 32
        ),
        "encoder": DetectorKind(
            "mmfm.evaluation.detectors.encoder:load",
            remedy="they are the model.safetensors in an encoder's folder (a workflow takes those of fid.encoder, an "
            "entry of encoders, or of the run's own encoder)",
        ),
        "inception": DetectorKind(
            "mmfm.evaluation.detectors.inception:load",
            2048,
            11.4e9,
            0.1e9,
            f"`mmfm fetch --url {INCEPTION_URL} FILE` gets them (95.7 MB)",
            cpu_rate=1.4,
            classifies=True,
        ),
    },
)

_MANIFOLD = "mmfm.evaluation.scores:manifold_scores"

KID_SUBSET = 1000
"""Images in a subset of KID, as torch-fidelity draws them."""

METRICS = Choices(
    "metric",
    {
        "frechet": Metric("mmfm.evaluation.scores:frechet", "Frechet distance"),
        "sfid": Metric("mmfm.evaluation.scores:sfid", "sFID", "spatial"),
        "inception_score": Metric("mmfm.evaluation.scores:inception_score", "Inception Score", "logits", larger=True),
        "precision": Metric(_MANIFOLD, "precision", "bank", larger=True),
        "recall": Metric(_MANIFOLD, "recall", "bank", larger=True),
        "density": Metric(_MANIFOLD, "density", "bank", larger=True),
        "coverage": Metric(_MANIFOLD, "coverage", "bank", larger=True),
        "kid": Metric("mmfm.evaluation.scores:kid", "KID", "bank"),
    },
)
"""Metrics of generated images. The first is the headline number, by which results are compared."""

MIN_PATCHES, MAX_PATCHES = 8, 16
"""Patches per side for the detector `encoder`: small images are enlarged, and 16 patches of 14 pixels are 224."""


def feature_patches(size: int, patch: int) -> int:
    """Return the patches per side to which the detector `encoder` resizes images of ``size`` pixels."""
    return min(max(round(size / patch), MIN_PATCHES), MAX_PATCHES)


SOLVERS = Choices(
    "solver",
    {
        "euler": Solver("mmfm.flow.solver:euler", 1),
        "heun": Solver("mmfm.flow.solver:heun", 2),
        "dopri5": Solver("mmfm.flow.solver:adaptive"),
        "dopri8": Solver("mmfm.flow.solver:adaptive"),
        "bosh3": Solver("mmfm.flow.solver:adaptive"),
        "adaptive_heun": Solver("mmfm.flow.solver:adaptive"),
    },
)
"""The adaptive solvers are torchdiffeq's. Its fehlberg2 is left out because it misses its tolerance by far."""

COVARIANCES = Choices(
    "covariance_type",
    {
        "diag": Covariance(truncatable=True),
        "spherical": Covariance(truncatable=True),
        "tied": Covariance(),
        "full": Covariance(),
    },
)
SPATIAL_COVARIANCES = Choices("covariance_type", {n: COVARIANCES[n] for n in ("spherical", "diag")})

STARTS = Choices("start", {"kmeans": Start(rows=20), "k-means++": Start(rows=256), "random_from_data": Start(rows=1)})

SCHEDULES = Choices(
    "schedule",
    {
        "constant_then_linear": Choice("mmfm.training.schedule:ConstantThenLinear"),
        "cosine": Choice("mmfm.training.schedule:Cosine"),
    },
)

WEIGHTINGS = Choices(
    "weighting rule",
    {
        "none": Choice(),
        "focal": Choice("mmfm.training.weighting:focal"),
        "sqrt": Choice("mmfm.training.weighting:sqrt"),
        "log": Choice("mmfm.training.weighting:log"),
        "inverse": Choice("mmfm.training.weighting:inverse"),
    },
)

LOGGERS = Choices(
    "logger",
    {
        "tensorboard": Choice("mmfm.training.loggers:TensorBoard"),
        "wandb": Choice("mmfm.training.loggers:Wandb"),
        "none": Choice("mmfm.training.loggers:NoLogger"),
    },
)

SHARDINGS = Choices(
    "sharding",
    {
        "ddp": Choice("mmfm.training.parallel:Whole"),
        "fsdp": Choice("mmfm.training.parallel:Sharded"),
    },
)

MODE_DRAWS = Choices(
    "mode_draw",
    {
        "multinomial": Choice("mmfm.infra.rng:uniform"),
        "stratified": Choice("mmfm.infra.rng:stratified"),
    },
)

LABEL_DRAWS = Choices(
    "label_draw",
    {
        "equal": Choice("mmfm.generation.conditioning:equal_labels"),
        "random": Choice("mmfm.generation.conditioning:random_labels"),
    },
)

PRECISIONS = plain("precision", "auto", "float32", "bf16")
ENCODER_PRECISIONS = plain("precision", "float32", "tf32", "bf16")
SAMPLING_PRECISIONS = plain("precision", "auto", "float32", "bf16", "reference")
MEANS_PRECISIONS = plain("precision", "auto", "float32", "bf16", "reference")
CROPS = plain("crop", "image", "encoder")
ASSIGNMENTS = plain("assignment", "soft", "hard")
INITS = plain("initialisation", "xavier", "pytorch")
E_STEPS = plain("e_step", "exact", "truncated")
E_STEP_PRECISIONS = plain("precision", "float32", "float64")
LATENT_CACHES = plain("choice", "auto", "on", "off")


@dataclass(frozen=True)
class Card(Choice):
    """A GPU, as far as estimates need it.

    Attributes:
        single: sustained operations per second in float32 without TF32, in large products.
        tf32: the same of an encoder whose products are in TF32.
        half: the same of a training step under bf16 autocast, in eager mode.
        memory: bytes.
        peak: of dense bf16 products by the data sheet, operations per second.
        origin: where the rates are from.
    """

    single: float = 0.0
    tf32: float = 0.0
    half: float = 0.0
    memory: float = 0.0
    peak: float = 0.0
    origin: str = ""


_GIB = 2.0**30
_A100 = "60 and 27 % of the peaks; the rest follows from the published training time"

CARDS = Choices(
    "card",
    {
        "auto": Card(),
        "A100-40GB": Card("", 12e12, 42e12, 43e12, 40 * _GIB, 312e12, _A100),
        "A100-80GB": Card("", 12e12, 42e12, 43e12, 80 * _GIB, 312e12, _A100),
        "H100": Card("", 44e12, 136e12, 200e12, 80 * _GIB, 989e12, "measured"),
        "H200": Card("", 44e12, 145e12, 215e12, 141e9, 989e12, "measured"),
        "L40S": Card("", 36e12, 49e12, 54e12, 48 * _GIB, 362e12, "40, 27 and 15 % of the peaks"),
        "RTX4090": Card("", 33e12, 33e12, 41e12, 24 * _GIB, 165e12, "40, 40 and 25 % of the peaks"),
    },
)
"""Multiplications and additions count as two operations. Peaks are those of the data sheets, dense."""


def known_card(name: str) -> str | None:
    """Return the entry of ``CARDS`` for a name that nvidia-smi or PyTorch prints, such as NVIDIA A100-SXM4-40GB.

    None for other cards, and for a part of a card in MIG mode, whose rates and memory are smaller.
    """
    words = set(name.upper().replace("-", " ").replace("RTX 4090", "RTX4090").split())
    known = (card for card in CARDS if card != "auto" and words.issuperset(card.upper().split("-")))
    return None if "MIG" in words else next(known, None)


MEANS_DEVICES = plain("place", "device", "host")
WEIGHTED_LABELS = plain("label", "mode", "class")
UNREADABLE = plain("treatment of damaged images", "error", "skip")
