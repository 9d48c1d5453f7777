"""What a configuration costs: bytes, memory, arithmetic and time of every stage. Pure arithmetic, no PyTorch.

The estimates size the rules' resources and fill the table in docs/scale.md. Bytes are exact where files have a fixed
layout, activations and other memory are rules of thumb, and times follow from the rates below, which are assumptions:
nothing here was measured at full size. A multiplication and an addition count as two operations.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from mmfm.config import Decoder, Model

FLOAT, DOUBLE = 4, 8
IMAGENET_IMAGES, DEMO_IMAGES = 1_281_167, 10_000
IMAGENET_BYTES, DEMO_BYTES = 110_000, 1_000  # of an image on average

PROCESS_BYTES = 3e9  # PyTorch, its libraries and a CUDA context, in host memory
WORKER_BYTES = 0.7e9

TRAINED_BYTES = 16  # of a parameter: weight, gradient, two moments of AdamW, float32
EMA_BYTES = 4
ACTIVATION_BYTES = 34  # of a token's element and layer, kept for the backward pass in bf16 (Korthikanti et al. 2022)
INFERENCE_COPIES = 12  # live activations of one layer without a backward pass, in units of its input


@dataclass(frozen=True)
class Rates:
    """Sustained rates that times are computed from.

    Attributes:
        single, half: floating-point operations per second and process, in float32 without TF32 and in bf16.
        decode: images read, decoded and cropped per second and reading process.
        disk: bytes per second of the disk, shared by all processes.
    """

    single: float
    half: float
    decode: float
    disk: float


GPU = Rates(single=12e12, half=50e12, decode=120, disk=1e9)
"""An A100: 60 % of its peak in float32, and in bf16 what the published 21 hours of 20 epochs on eight come to."""

CPU = Rates(single=1e11, half=1e11, decode=1000, disk=2e8)
"""One core; the small images of the demo."""


@dataclass(frozen=True)
class EncoderSize:
    """Sizes of a vision transformer: width, layers, tokens of an image, side of the latent grid."""

    width: int
    depth: int
    tokens: int
    grid: int

    @property
    def latent(self) -> int:
        """Numbers in a latent, C H W."""
        return self.width * self.grid**2

    @property
    def parameters(self) -> float:
        """Weights of the blocks."""
        return 12 * self.width**2 * self.depth

    @property
    def flops(self) -> float:
        """Operations of one image's forward pass."""
        return transformer_flops(self.width, self.depth, self.tokens, 4 * self.width)


def encoder_size(weights: str, input_size: int, patch: int) -> EncoderSize:
    """Return the sizes in a local folder's config.json, or those of a base model (width 768, 12 layers)."""
    path, values = Path(weights) / "config.json", {}
    if path.is_file():
        with contextlib.suppress(ValueError):  # a damaged file is the business of the stage that reads it
            values = json.loads(path.read_text())
            values = values.get("vision_config", values)
    grid = input_size // int(values.get("patch_size", patch))
    return EncoderSize(int(values.get("hidden_size", 768)), int(values.get("num_hidden_layers", 12)), grid**2 + 5, grid)


def transformer_flops(width: int, depth: int, tokens: int, inner: int, maps: int = 2) -> float:
    """Operations of plain blocks: four square maps, ``maps`` maps to or from the inner width, attention."""
    return depth * tokens * (8 * width**2 + 2 * maps * width * inner + 4 * tokens * width)


def dit_parameters(model: Model, channels: int, labels: int = 0) -> float:
    """Weights of a DiTDH: blocks of 18 squared widths (attention 4, SwiGLU 8, modulation 6) and what surrounds them."""
    (first, second), depth = model.hidden_size, model.depth
    blocks = sum(18 * w**2 * d for w, d in zip(model.hidden_size, depth, strict=True))
    around = 2 * channels * (first + second) + first * second + 2 * first**2 + 2 * second**2
    return blocks + around + labels * first


def dit_flops(model: Model, tokens: int) -> float:
    """Operations of one image's forward pass; the head blocks' modulation is made for every token."""
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
    """Operations of one image's forward pass."""
    return transformer_flops(decoder.hidden_size, decoder.num_layers, tokens, decoder.intermediate_size)


@dataclass(frozen=True)
class Need:
    """What one stage takes.

    Attributes:
        reads, writes: bytes over the whole stage, all processes together.
        disk: most bytes that lie on the disk at a time, state and results.
        host: bytes of memory per process with its reading processes.
        main: bytes of host memory that the main process takes besides.
        device: bytes of memory per process on its GPU; on a CPU they come on top of ``host``.
        flops: operations of all processes together.
        seconds: the longest of arithmetic, decoding and disk.
    """

    reads: float
    writes: float
    disk: float
    host: float
    main: float
    device: float
    flops: float
    seconds: float

    def mem_mb(self, processes: int, on_gpu: bool) -> int:
        """Host memory of the whole job in MB."""
        return int((processes * (self.host + (0 if on_gpu else self.device)) + self.main) / 1e6)

    @property
    def disk_mb(self) -> int:
        """Disk in MB, with a reserve of a tenth."""
        return int(1.1 * self.disk / 1e6) + 100

    @property
    def minutes(self) -> int:
        """A limit for schedulers: four times the estimate and half an hour. A job that is cut off can go on."""
        return int(4 * self.seconds / 60) + 30
