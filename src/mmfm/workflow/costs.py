"""Sizes, operations and rates from which the cost of every stage is estimated. Pure arithmetic, no PyTorch.

The estimates set the rules' resources and fill the table in docs/scale.md. File sizes are exact for fixed layouts,
memory is a rule of thumb, and times follow from the rates below, which are assumptions: nothing was measured at full
size. A multiplication and an addition count as two operations.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from mmfm.config import Decoder, Model

FLOAT, DOUBLE = 4, 8
IMAGENET_IMAGES, DEMO_IMAGES = 1_281_167, 10_000
IMAGENET_BYTES, DEMO_BYTES = 110_000, 1_000  # average size of an image file
DECODED_BYTES = 13.2e6  # of image files decoded per second and process: 120 images of ImageNet's size

PROCESS_BYTES = 3e9  # host memory of PyTorch, its libraries and a CUDA context
WORKER_BYTES = 0.7e9

TRAINED_BYTES = 16  # per parameter: weight, gradient and AdamW's two moments in float32
EMA_BYTES = 4
ACTIVATION_BYTES = 34  # per element of a token and layer, kept for backward in bf16 (Korthikanti et al. 2022)
INFERENCE_COPIES = 12  # live activations of a layer without backward pass, as multiples of its input


@dataclass(frozen=True)
class Rates:
    """Sustained rates.

    Attributes:
        single, half: operations per second and process, in float32 without TF32 and in bf16.
        decode: images read, decoded and cropped per second and reading process.
        disk: bytes per second, shared by all processes.
    """

    single: float
    half: float
    decode: float
    disk: float


GPU = Rates(single=12e12, half=50e12, decode=120, disk=1e9)
"""An A100: 60 % of its float32 peak, and the bf16 rate implied by the published 21 hours for 20 epochs on eight."""

CPU = Rates(single=1e11, half=1e11, decode=1000, disk=2e8)
"""One core, with the demo's small images."""


@dataclass(frozen=True)
class EncoderSize:
    """Sizes of a vision transformer: width, layers, tokens per image, side of the latent grid."""

    width: int
    depth: int
    tokens: int
    grid: int

    @property
    def latent(self) -> int:
        """Elements of a latent, C * H * W."""
        return self.width * self.grid**2

    @property
    def parameters(self) -> float:
        """Weights of the blocks."""
        return 12 * self.width**2 * self.depth

    @property
    def flops(self) -> float:
        """Operations per image, forward."""
        return transformer_flops(self.width, self.depth, self.tokens, 4 * self.width)


def encoder_size(weights: str, input_size: int, patch: int) -> EncoderSize:
    """Return the sizes in a local folder's config.json; without one, those of a base model (width 768, 12 layers)."""
    path, values = Path(weights) / "config.json", {}
    if path.is_file():
        with contextlib.suppress(ValueError):  # the stage that reads a damaged file reports it
            values = json.loads(path.read_text())
            values = values.get("vision_config", values)
    grid = input_size // int(values.get("patch_size", patch))
    return EncoderSize(int(values.get("hidden_size", 768)), int(values.get("num_hidden_layers", 12)), grid**2 + 5, grid)


def transformer_flops(width: int, depth: int, tokens: int, inner: int, maps: int = 2) -> float:
    """Operations per image, forward, with ``maps`` MLP matrices per block, of size width x ``inner``."""
    return depth * tokens * (8 * width**2 + 2 * maps * width * inner + 4 * tokens * width)


def dit_parameters(model: Model, channels: int, labels: int = 0) -> float:
    """Weights of a DiTDH; a block has 18 squared widths (attention 4, SwiGLU 8, modulation 6)."""
    (first, second), depth = model.hidden_size, model.depth
    blocks = sum(18 * w**2 * d for w, d in zip(model.hidden_size, depth, strict=True))
    around = 2 * channels * (first + second) + first * second + 2 * first**2 + 2 * second**2
    return blocks + around + labels * first


def dit_flops(model: Model, tokens: int) -> float:
    """Operations per image, forward; the head blocks compute their modulation for every token."""
    flops = 0.0
    for index, (width, depth) in enumerate(zip(model.hidden_size, model.depth, strict=True)):
        flops += transformer_flops(width, depth, tokens, 8 * width // 3, maps=3)
        flops += depth * 12 * width**2 * (tokens if index else 1)
    return flops


def decoder_parameters(decoder: Decoder) -> float:
    """Weights of the decoder's blocks."""
    w = decoder.hidden_size
    return decoder.num_layers * (4 * w**2 + 2 * w * decoder.intermediate_size)


def decoder_flops(decoder: Decoder, tokens: int) -> float:
    """Operations per image, forward."""
    return transformer_flops(decoder.hidden_size, decoder.num_layers, tokens, decoder.intermediate_size)


@dataclass(frozen=True)
class Work:
    """The work of a whole stage, all processes together.

    Attributes:
        reads, writes: bytes.
        single, half: operations in float32 and in bf16.
        images: image files that are decoded.
        workers: image-reading processes per rank.
    """

    reads: float
    writes: float
    single: float = 0.0
    half: float = 0.0
    images: float = 0.0
    workers: int = 0

    def seconds(self, rates: Rates, processes: int) -> float:
        """Return the longest of arithmetic, decoding and disk access, which overlap."""
        arithmetic = (self.single / rates.single + self.half / rates.half) / processes
        decoding = self.images / (rates.decode * max(1, self.workers) * processes)
        return max(arithmetic, decoding, (self.reads + self.writes) / rates.disk)


@dataclass(frozen=True)
class Resources:
    """What a job of a stage takes.

    Attributes:
        work: what it does.
        seconds: how long that takes.
        disk: peak bytes on disk, state and results together.
        host: bytes of host memory per process, including its reading processes.
        main: bytes of host memory that the main process takes in addition.
        device: bytes of GPU memory per process; on a CPU they add to ``host``.
    """

    work: Work
    seconds: float
    disk: float
    host: float
    main: float
    device: float

    @property
    def flops(self) -> float:
        """Operations of all processes together."""
        return self.work.single + self.work.half

    def mem_mb(self, processes: int, on_gpu: bool) -> int:
        """Host memory of the whole job in MB."""
        return int((processes * (self.host + (0 if on_gpu else self.device)) + self.main) / 1e6)

    @property
    def disk_mb(self) -> int:
        """Disk space in MB, with a reserve of a tenth."""
        return int(1.1 * self.disk / 1e6) + 100

    @property
    def minutes(self) -> int:
        """Time limit for schedulers: four times the estimate plus half an hour. A job that is cut off can resume."""
        return int(4 * self.seconds / 60) + 30
