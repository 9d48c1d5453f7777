"""The values that keys of the configuration can take: a table each, and where their implementations lie.

To add an encoder family, a detector, a metric or a solver, write it into a file of its own and name it here. Schema,
error messages, estimates and documents read the tables, so nothing here imports PyTorch.
"""

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean ...?)`` for the likeliest of the known words, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


@dataclass(frozen=True)
class Choice:
    """One value of a key.

    Attributes:
        implementation: ``module:name``; empty where the value names no code of its own.
    """

    implementation: str = ""

    def load(self) -> Any:
        """Import and return the implementation."""
        module, _, name = self.implementation.partition(":")
        return getattr(importlib.import_module(module), name)


C = TypeVar("C", bound=Choice)


class Choices(dict[str, C]):
    """The values of a key by name; to ask for another one is a ValueError that names the nearest."""

    def __init__(self, what: str, values: dict[str, C]) -> None:
        super().__init__(values)
        self.what = what

    def require(self, name: str) -> None:
        """Raise ValueError unless there is such a value."""
        self[name]

    def __missing__(self, name: str) -> C:
        raise ValueError(f"unknown {self.what} '{name}'{did_you_mean(name, self)}; it must be one of {', '.join(self)}")


def plain(what: str, *names: str) -> Choices[Choice]:
    """Return values that a stage tells apart by name."""
    return Choices(what, {name: Choice() for name in names})


@dataclass(frozen=True)
class EncoderFamily(Choice):
    """An architecture of frozen encoders, implemented by a :class:`mmfm.autoencoder.encoders.Family`.

    Attributes:
        patch: pixels a side of a token of the base model, for estimates before its config.json is fetched.
    """

    patch: int = 16


@dataclass(frozen=True)
class DetectorKind(Choice):
    """A feature network, implemented by (path, digest, device) -> :class:`mmfm.evaluation.detector.Detector`.

    Attributes:
        features: numbers that describe an image.
        flops: operations per image.
        weight_bytes: size of the weights.
        remedy: how to get them.
    """

    features: int = 0
    flops: float = 0.0
    weight_bytes: float = 0.0
    remedy: str = ""


@dataclass(frozen=True)
class Metric(Choice):
    """A measure of generated images, implemented by (moments of their features, reference) -> float.

    Attributes:
        title: its name in results.
    """

    title: str = ""


@dataclass(frozen=True)
class Solver(Choice):
    """A rule of integration; see :mod:`mmfm.flow.solver`.

    Attributes:
        evaluations: of the velocity per step; None where the solver chooses its steps.
    """

    evaluations: int | None = None

    @property
    def adaptive(self) -> bool:
        """Whether it chooses its steps between the first and the last time point."""
        return self.evaluations is None


@dataclass(frozen=True)
class Covariance(Choice):
    """A shape of covariances, which the mixture's own code tells apart.

    Attributes:
        truncatable: whether the E-step can leave components out.
        spatial: whether a mixture over latents can have it.
    """

    truncatable: bool = False
    spatial: bool = False


@dataclass(frozen=True)
class Start(Choice):
    """A start of EM.

    Attributes:
        rows: images per component that it looks at.
    """

    rows: int = 1


@dataclass(frozen=True)
class Setting(Choice):
    """What distinguishes a training setting.

    Attributes:
        mixture: the source is the spatial mixture, not N(0, I).
        condition: what the model sees: ``mode`` (the index of the source's mode), ``class`` (the image's class), or
            None (no label term at all).
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
"""The settings that targets and commands name: where paths start, and what the model sees."""

ENCODER_FAMILIES = Choices(
    "encoder family",
    {
        "dinov2": EncoderFamily("mmfm.autoencoder.families.dinov2:FAMILY", patch=14),
        "siglip2": EncoderFamily("mmfm.autoencoder.families.siglip2:FAMILY", patch=16),
        "mae": EncoderFamily("mmfm.autoencoder.families.mae:FAMILY", patch=16),
    },
)

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"

DETECTORS = Choices(
    "detector",
    {
        "fashion": DetectorKind(
            "mmfm.evaluation.detectors.fashion:load", 64, 2e7, 1e6, "make it with tools/train_detector.py"
        ),
        "inception": DetectorKind(
            "mmfm.evaluation.detectors.inception:load",
            2048,
            11.4e9,
            0.1e9,
            f"download {INCEPTION_URL} and set fid.weights to the file ({INCEPTION_FILE}, 95.7 MB)",
        ),
    },
)

METRICS = Choices("metric", {"frechet": Metric("mmfm.evaluation.frechet:from_moments", "Frechet distance")})
"""All of them are measured by `fid`; the first one is the result's own number."""

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
"""The adaptive ones are torchdiffeq's by the same names; its fehlberg2 misses its tolerance by far."""

COVARIANCES = Choices(
    "covariance_type",
    {
        "diag": Covariance(truncatable=True, spatial=True),
        "spherical": Covariance(truncatable=True, spatial=True),
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
SAMPLING_PRECISIONS = plain("precision", "auto", "float32", "bf16", "reference")
ASSIGNMENTS = plain("assignment", "soft", "hard")
E_STEPS = plain("e_step", "exact", "truncated")
E_STEP_PRECISIONS = plain("precision", "float32", "float64")
MEANS_DEVICES = plain("place", "device", "host")
WEIGHTED_LABELS = plain("label", "mode", "class")
UNREADABLE = plain("treatment of damaged images", "error", "skip")
