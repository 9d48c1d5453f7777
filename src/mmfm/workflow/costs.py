"""Sizes and rates from which the cost of every stage is estimated. Pure arithmetic, no PyTorch.

The estimates set the rules' resources and fill the tables in docs/scale.md. File sizes are exact for fixed layouts.
Tests compare the model's operations, parameters and stored activations with those that PyTorch counts; the rest of the
memory is a rule of thumb. Times follow from the rates of the cards, of which those of H100 and H200 were measured. A
multiplication and an addition count as two operations.
"""

import contextlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mmfm.config import Decoder, Model
from mmfm.config.choices import CARDS, Card, known_card
from mmfm.infra import model_folder
from mmfm.models.flops import transformer_flops

FLOAT, DOUBLE = 4, 8
IMAGENET_IMAGES, DEMO_IMAGES = 1_281_167, 10_000
IMAGENET_BYTES, DEMO_BYTES = 110_000, 1_000  # average size of an image file
DECODED_BYTES = 13.2e6  # of image files decoded per second and process: 120 images of ImageNet's size

PROCESS_BYTES = 3e9  # host memory of PyTorch, its libraries and a CUDA context
WORKER_BYTES = 0.7e9

TRAINED_BYTES = 16  # per parameter: weight, gradient and AdamW's two moments in float32
EMA_BYTES = 4
COPY_BYTES = 2  # bf16 copies of the weights, which autocast keeps for a step
CONTEXT_BYTES = 1e9  # GPU memory of the CUDA context and the libraries' workspaces
FLOAT32_ACTIVATIONS = 1.55  # what a model keeps for backward in float32, as a multiple of what it keeps in bf16
USABLE = 0.95  # share of a GPU's memory that allocations can take
COMPILED = 1.5  # speed with torch.compile, as a multiple of eager mode; measured on an H200
HASHED_BYTES = 1e9  # per second and process, SHA-256 in hardware
PIXEL_COPIES = 4  # live arrays of a decoded image's values: patches, image, its scaled copy, what it is compared with
INFERENCE_COPIES = 12  # live activations of a layer without backward pass, as multiples of its input


@dataclass(frozen=True)
class Rates:
    """Sustained rates.

    Attributes:
        single, half: operations per second and process, in float32 without TF32 and in bf16.
        encoder: operations of the frozen encoder per second and process, in its own precision.
        decode: images read, decoded and cropped per second and reading process.
        disk: bytes per second, shared by all processes.
    """

    single: float
    half: float
    encoder: float
    decode: float
    disk: float


DEFAULT_CARD = "A100-40GB"


def card_of(name: str) -> tuple[str, Card]:
    """Return a card and its name: the one that is asked for, or for ``auto`` a visible one, else the default."""
    found = (_visible_card() or DEFAULT_CARD) if name == "auto" else name
    return found, CARDS[found]


def _visible_card() -> str | None:
    """Return the name of the first GPU that nvidia-smi lists; None if there is none, or none of the known ones."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None  # a broken driver is no reason to fail here
    return known_card((listed.splitlines() or [""])[0])


def gpu_rates(card: Card, precision: str = "float32") -> Rates:
    """Return the rates of a card with an encoder of a precision, of ImageNet's files and of a shared disk."""
    encoder = {"float32": card.single, "tf32": card.tf32, "bf16": card.half}[precision]
    return Rates(single=card.single, half=card.half, encoder=encoder, decode=120, disk=1e9)


CPU = Rates(single=5e10, half=5e10, encoder=5e10, decode=1000, disk=2e8)
"""A process with the demo's small images and two cores, on which its training reached this (docs/demo.md)."""


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


def encoder_size(weights: str, input_size: int, patch: int, fetched: str = "published") -> EncoderSize:
    """Return the sizes in a folder's config.json; without one, those of a base model (width 768, 12 layers).

    Args:
        weights: the key's value: a folder, or `hf:` and the id of a model.
        patch: side of a patch in pixels, where the folder does not say.
        fetched: folder of fetched files, which models are below.
    """
    folder = Path(fetched) / "models" / weights[3:] if weights.startswith("hf:") else Path(weights)
    width, depth = 768, 12
    # The stage that reads a damaged file reports it.
    with contextlib.suppress(OSError, ValueError):
        about = model_folder.read(folder)
        width, depth = about.width or width, about.depth or depth
        patch = about.patch_size(str(folder)) or patch
    grid = input_size // patch
    return EncoderSize(width, depth, grid**2 + 5, grid)


def dit_parameters(model: Model, channels: int, labels: int = 0) -> float:
    """Weights of a DiTDH; a block has 18 squared widths (attention 4, SwiGLU 8, modulation 6)."""
    (first, second), depth = model.hidden_size, model.depth
    blocks = sum(18 * w**2 * d for w, d in zip(model.hidden_size, depth, strict=True))
    around = 2 * channels * (first + second) + first * second + 2 * first**2 + 2 * second**2
    return blocks + around + labels * first


def dit_activations(model: Model, tokens: int, channels: int, recomputed: bool = False) -> float:
    """Bytes per image that a DiTDH keeps for the backward pass under bf16 autocast.

    An encoder block keeps 52 bytes per element of its tokens: for attention 24 (the float32 input and its norm, 4 each;
    the bf16 norm 2, queries and keys 4, the projection that holds the values 6, output and update 2 each), for the MLP
    28. A head block keeps 27 more, because each token has its own modulation. Attention keeps a number per token and
    head. If blocks are recomputed, only their inputs are kept, and those of one block at a time.
    """
    (first, second), (encoder, head) = model.hidden_size, model.depth
    around = 6 * first + 20 * second + 10 * channels
    heads = 4 * sum(n * d for n, d in zip(model.num_heads, model.depth, strict=True))
    if recomputed:
        return tokens * (4 * first * encoder + 2 * second * head + around)
    return tokens * (52 * first * encoder + 79 * second * head + around + heads)


def block_activations(model: Model, tokens: int) -> float:
    """Bytes per image that the largest block keeps while it is recomputed."""
    return tokens * max(52 * model.hidden_size[0], 79 * model.hidden_size[1])


def decoder_parameters(decoder: Decoder, channels: int, tokens: int, patch: int) -> float:
    """Weights of the decoder, with the table of positions; arguments as in :func:`~mmfm.models.flops.decoder_flops`.

    The output layer has a row for each value of a patch: with large patches, most of the weights.
    """
    w, inner = decoder.hidden_size, decoder.intermediate_size
    block = 4 * (w**2 + w) + 2 * w * inner + inner + w + 4 * w  # attention, MLP, norms
    ends = (channels + 1) * w + 2 * w + (w + 1) * 3 * patch**2
    return decoder.num_layers * block + ends + (tokens + 2) * w  # with the class token and its position


def decoder_activations(decoder: Decoder, channels: int, tokens: int, patch: int) -> float:
    """Bytes per image that decoder and loss keep for the backward pass under bf16 autocast.

    A block keeps 24 bytes per element of its tokens, 4 per element of the MLP's inner ones, and a number per token and
    head; the ends keep the bf16 latents, the input of the last norm in float32 and in bf16 what it gives; the loss
    keeps each value's difference in float32.
    """
    w = decoder.hidden_size
    blocks = decoder.num_layers * (24 * w + 4 * decoder.intermediate_size + 4 * decoder.num_heads)
    return (tokens + 1) * (blocks + 6 * w) + tokens * (2 * channels + FLOAT * 3 * patch**2)


@dataclass(frozen=True)
class Work:
    """The work of a whole stage, all processes together.

    Attributes:
        reads, writes: bytes.
        single, half: operations in float32 and in bf16.
        encoder: operations of the frozen encoder.
        images: image files that are decoded.
        workers: image-reading processes per rank.
        alone: bytes that the main process writes and hashes while the others wait, such as checkpoints.
    """

    reads: float
    writes: float
    single: float = 0.0
    half: float = 0.0
    encoder: float = 0.0
    images: float = 0.0
    workers: int = 0
    alone: float = 0.0

    def seconds(self, rates: Rates, processes: int) -> float:
        """Return the longest of arithmetic, decoding and disk access, which overlap, plus what one does alone."""
        arithmetic = self.single / rates.single + self.half / rates.half + self.encoder / rates.encoder
        decoding = self.images / (rates.decode * max(1, self.workers) * processes)
        together = (self.reads + self.writes - self.alone) / rates.disk
        return max(arithmetic / processes, decoding, together) + self.alone * (1 / rates.disk + 1 / HASHED_BYTES)


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
        longest: limit of :attr:`minutes`.
        cached: bytes of ``disk`` that are the latent cache, which all stages share.
    """

    work: Work
    seconds: float
    disk: float
    host: float
    main: float
    device: float
    longest: float
    cached: float = 0.0

    @property
    def flops(self) -> float:
        """Operations of all processes together."""
        return self.work.single + self.work.half + self.work.encoder

    def mem_mb(self, processes: int, on_gpu: bool) -> int:
        """Host memory of the whole job in MB."""
        return int((processes * (self.host + (0 if on_gpu else self.device)) + self.main) / 1e6)

    @property
    def disk_mb(self) -> int:
        """Disk space in MB, with a reserve of a tenth."""
        return int(1.1 * self.disk / 1e6) + 100

    @property
    def minutes(self) -> int:
        """Time limit for schedulers: four times the estimate plus half an hour, but no longer than they accept.

        A job that is cut off can resume.
        """
        return max(1, int(min(4 * self.seconds / 60 + 30, self.longest)))
