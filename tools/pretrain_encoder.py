"""Pretrain the demo's encoders on Fashion-MNIST without labels (see ``--help``)."""

import argparse
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import mmfm.infra.torchvision_ops  # noqa: F401  # isort: skip  (before transformers, which imports torchvision)

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTMAEConfig,
    ViTMAEModel,
)

from fashion_mnist import (
    DEMO,
    HelpFormatter,
    ProgressLine,
    Split,
    add_common_arguments,
    batch_indices,
    describe_run,
    load_checkpoint,
    load_splits,
    mixture_purity,
    nearest_neighbour_accuracy,
    save_checkpoint,
    save_weights,
    write_json,
)
from mmfm.config.choices import ENCODER_FAMILIES
from mmfm.infra.store import file_digest

DESCRIPTION = """\
Pretrain a tiny encoder (DINOv2 with registers, SigLIP or ViT-MAE) on the 60,000 training images of Fashion-MNIST,
without labels. All learn by the same two losses, whatever the architecture's own training is.

The encoder sees two random views of each image. Its global token learns which views belong together (SimCLR); its patch
tokens learn to reproduce the pixels, so that a decoder can reconstruct the image.
Labels are only used for evaluation: the accuracy of 20 nearest neighbours among the global tokens of 5,000 training
images, and the purity of a ten-component mixture fitted to those of the test images, compared with the same on pixels.

The committed DINOv2 was made in two runs of half an hour each on one busy core: first six layers, then ten, the upper
four of which started as the identity. The others took one short run each.
  python tools/pretrain_encoder.py --depth 6 --out /tmp/base
  python tools/pretrain_encoder.py --depth 10 --grow /tmp/base --steps 1600 --lr 5e-4 --seed 1
  python tools/pretrain_encoder.py --family siglip2 --depth 4 --steps 1200 --out resources/demo/siglip2
  python tools/pretrain_encoder.py --family mae --depth 4 --steps 1200 --out resources/demo/mae

A quick test, in seconds:
  python tools/pretrain_encoder.py --data resources/demo/fashion-mnist --steps 20 --out /tmp/encoder
"""
REGISTERS, SIZE, PATCH = 4, 32, 8
MEAN, STD = 0.5, 0.5
Tokens = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(B, 3, 32, 32) to patch tokens (B, 16, C) and global tokens (B, C)."""


def build_encoder(family: str, width: int, depth: int) -> PreTrainedModel:
    """Build an encoder of 32x32 RGB images into 16 patch tokens.

    The affine part of the final layer norm is not trained, because the pipeline drops it.
    """
    heads = width // 32
    sizes = {"image_size": SIZE, "patch_size": PATCH, "hidden_size": width, "num_attention_heads": heads}
    sizes["num_hidden_layers"] = depth
    encoder: PreTrainedModel
    if family == "dinov2":
        options = {"mlp_ratio": 4, "num_register_tokens": REGISTERS, "drop_path_rate": 0.0, "layerscale_value": 1.0}
        encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, **options))
    elif family == "siglip2":
        encoder = SiglipVisionModel(SiglipVisionConfig(**sizes, intermediate_size=4 * width))
    else:
        encoder = ViTMAEModel(ViTMAEConfig(**sizes, intermediate_size=4 * width, mask_ratio=0.0))
        # transformers may leave the frozen position embeddings at zero, which would leave the patches without order.
        encoder.embeddings.position_embeddings.copy_(sinusoidal_positions(SIZE // PATCH, width))
    encoder.get_submodule(ENCODER_FAMILIES[family].load().final_norm).requires_grad_(False)
    return encoder


def sinusoidal_positions(grid: int, width: int) -> Tensor:
    """Return fixed position embeddings (1, 1 + grid * grid, width) float32: zeros for the global token, then patches.

    A quarter each is the sine and cosine of the column, and of the row.

    Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", appendix A.1.
    """
    rates = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [place.flatten()[:, None] * rates for place in (column, row)]
    patches = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return functional.pad(patches, (0, 0, 1, 0))[None]


def grow(encoder: Dinov2WithRegistersModel, folder: Path) -> str:
    """Initialize the lower layers from a shallower encoder, and the layers above as the identity.

    Layers with layer scales of 0 pass their input on, so training continues from the function of the shallower encoder.

    Returns:
        the SHA-256 of the shallower encoder's weights.

    Source: Chen, Goodfellow and Shlens 2016, "Net2Net".
    """
    base = Dinov2WithRegistersModel.from_pretrained(folder, dtype=torch.float32)
    if base.config.num_hidden_layers > encoder.config.num_hidden_layers:
        raise SystemExit(f"{folder} has {base.config.num_hidden_layers} layers; set --depth to at least that")
    encoder.load_state_dict(base.state_dict(), strict=False)
    with torch.no_grad():
        for layer in encoder.encoder.layer[base.config.num_hidden_layers :]:
            layer.layer_scale1.lambda1.zero_()
            layer.layer_scale2.lambda1.zero_()
    return file_digest(folder / "model.safetensors")


def normalise(pixels: Tensor) -> Tensor:
    """Turn grey values (B, 1, 32, 32) float32 in [0, 1] into the encoder's input (B, 3, 32, 32)."""
    return ((pixels - MEAN) / STD).expand(-1, 3, -1, -1)


def augment(pixels: Tensor, options: argparse.Namespace, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make a random view of each image: crop, aspect, rotation and flip in one resampling; tone; an erased rectangle.

    Aspect and rotation change only a little, because the outline of a garment determines its class.

    Args:
        pixels: (B, 1, 32, 32) float32 in [0, 1].

    Returns:
        the views with and without the erased rectangle, both (B, 1, 32, 32) float32 in [0, 1].
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(pixels), generator=generator)

    side, aspect = uniform(options.min_area, 1.0).sqrt(), uniform(-0.15, 0.15).exp()
    width, height = side * aspect, side / aspect
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    angle = uniform(-0.2, 0.2)
    shift_x, shift_y = (uniform(-1, 1) * (1.05 - extent).clamp(min=0) for extent in (width, height))
    row_x = torch.stack([width * angle.cos() * mirror, -height * angle.sin(), shift_x], 1)
    row_y = torch.stack([width * angle.sin() * mirror, height * angle.cos(), shift_y], 1)
    grid = functional.affine_grid(torch.stack([row_x, row_y], 1), list(pixels.shape), align_corners=False)
    view = functional.grid_sample(pixels, grid, align_corners=False)

    tone = options.tone
    gain, gamma = uniform(1 - tone, 1 + tone), uniform(-tone, tone).exp()
    view = (view.clamp(min=1e-6) ** gamma.view(-1, 1, 1, 1) * gain.view(-1, 1, 1, 1)).clamp(0, 1)

    erased_width = uniform(6, 16)
    erased_height = torch.where(uniform(0, 1) < options.erase, uniform(6, 16), 0.0)
    inside_x = _interval(uniform(0, 1) * (SIZE - erased_width), erased_width)
    inside_y = _interval(uniform(0, 1) * (SIZE - erased_height), erased_height)
    inside = (inside_y[:, :, None] & inside_x[:, None, :])[:, None]
    return torch.where(inside, uniform(0, 1).view(-1, 1, 1, 1), view), view


def _interval(start: Tensor, length: Tensor) -> Tensor:
    """Return which pixel positions lie in [start, start + length), (B, 32) bool."""
    position = torch.arange(SIZE)
    return (position >= start[:, None]) & (position < (start + length)[:, None])


class Objective(nn.Module):
    """The contrastive loss of the global token and the pixel loss of the patch tokens; its heads are discarded later.

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", equation 1.
    """

    def __init__(self, width: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.projection = nn.Sequential(
            nn.Linear(width, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Linear(256, 64), nn.BatchNorm1d(64, affine=False)
        )
        self.pixels = nn.Linear(width, PATCH * PATCH)

    def forward(self, patches: Tensor, whole: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the contrastive and the pixel loss.

        Args:
            patches: patch tokens (2B, N, C) float32, first all first views, then all second views.
            whole: global tokens (2B, C) float32.
            targets: (2B, 1, 32, 32) float32 in [0, 1], the views before erasing.
        """
        projected = functional.normalize(self.projection(whole), dim=1)
        count = len(projected)
        similarity = (projected @ projected.T / self.temperature).fill_diagonal_(-math.inf)
        other_view = (torch.arange(count) + count // 2) % count
        contrast = functional.cross_entropy(similarity, other_view)
        pixels = targets.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).reshape(count, -1, PATCH * PATCH)
        return contrast, functional.mse_loss(self.pixels(patches), (pixels - MEAN) / STD)


@torch.no_grad()
def encode(encoder: Tokens, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return global tokens (N, C) and patch tokens (N, 16, C), float32, of images (N, 3, 32, 32) uint8."""
    parts = [encoder(normalise(x[:, :1] / 255)) for x in images.split(500)]
    return torch.cat([whole for _, whole in parts]), torch.cat([patches for patches, _ in parts])


def evaluate(encoder: Tokens, train: Split, test: Split) -> dict[str, float]:
    """Measure nearest-neighbour accuracy and mixture purity of global tokens, and reconstruction from patch tokens.

    ``decoded`` is the share of the variance of test pixels explained by a least-squares map from patch tokens, fitted
    to 2,000 training images.
    """
    reference, labels = train.images[:5000], train.labels[:5000]
    (reference_global, reference_patches), (test_global, test_patches) = (
        encode(encoder, images) for images in (reference, test.images)
    )
    inputs, outputs = _with_constant(reference_patches[:2000]), _patch_pixels(reference[:2000])
    fitted = torch.linalg.lstsq(inputs, outputs, driver="gelsd").solution
    pixels = _patch_pixels(test.images)
    residual = pixels - _with_constant(test_patches) @ fitted
    return {
        "knn": nearest_neighbour_accuracy(reference_global, labels, test_global, test.labels),
        "purity": mixture_purity(test_global, test.labels),
        "decoded": 1 - (residual.square().mean() / pixels.var()).item(),
    }


def _with_constant(tokens: Tensor) -> Tensor:
    return functional.pad(tokens.flatten(0, 1), (0, 1), value=1.0)


def _patch_pixels(images: Tensor) -> Tensor:
    grey = images[:, 0].float() / 255
    return grey.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).reshape(-1, PATCH * PATCH)


def evaluate_pixels(train: Split, test: Split) -> dict[str, float]:
    """Measure the same on grey pixels, with Euclidean distances, which suit them better than cosine."""
    reference, queries = (split.images[:, 0].float().flatten(1) / 255 for split in (train, test))
    knn = nearest_neighbour_accuracy(reference[:5000], train.labels[:5000], queries, test.labels, metric="euclidean")
    return {"pixel_knn": knn, "pixel_purity": mixture_purity(queries, test.labels)}


def publish(encoder: PreTrainedModel, folder: Path, metadata: dict[str, object]) -> None:
    """Write an encoder in the Hugging Face layout, weights last, so that a folder with weights is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**encoder.config.to_diff_dict(), "architectures": [type(encoder).__name__], "dtype": "float16"}
    write_json(folder / "config.json", config)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    write_json(folder / "preprocessor_config.json", processor)
    save_weights(folder / "model.safetensors", encoder.state_dict(), metadata)


def parse_options() -> argparse.Namespace:
    """Parse the command line; the defaults are those of the committed weights."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=HelpFormatter)
    add_common_arguments(parser, steps=3600)
    parser.add_argument("--out", type=Path, default=DEMO / "encoder", help="output folder (weights and configurations)")
    parser.add_argument("--family", choices=("dinov2", "siglip2", "mae"), default="dinov2", help="architecture")
    parser.add_argument("--width", type=int, default=96, help="token width, a multiple of 32 (the width of a head)")
    parser.add_argument("--depth", type=int, default=6, help="transformer layers")
    parser.add_argument("--grow", type=Path, help="folder of a shallower DINOv2 to start from")
    parser.add_argument("--batch", type=int, default=128, help="images per step, two views each")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--temperature", type=float, default=0.2, help="of the contrastive loss")
    parser.add_argument("--pixel-weight", type=float, default=1.0, help="pixel loss relative to the contrastive loss")
    parser.add_argument("--min-area", type=float, default=0.6, help="smallest share of the image in a crop")
    parser.add_argument("--tone", type=float, default=0.28, help="strength of gain and gamma changes")
    parser.add_argument("--erase", type=float, default=0.25, help="share of views with an erased rectangle")
    options = parser.parse_args()
    if options.grow and options.family != "dinov2":
        parser.error(f"--grow needs layer scales, which {options.family} has not; leave it out")
    return options


def build_optimiser(modules: list[nn.Module], lr: float) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices only."""
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Return the learning rate: linear warm-up over the first 5 % of the steps, then cosine decay to zero."""
    warm = max(1, options.steps // 20)
    if step < warm:
        return options.lr * (step + 1) / warm
    return options.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (options.steps - warm)))


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    train, test = load_splits(options.data)
    run = describe_run(options, train.digest)
    encoder = build_encoder(options.family, options.width, options.depth)
    tokens_of = functools.partial(ENCODER_FAMILIES[options.family].load().run, encoder)
    if options.grow:
        assert isinstance(encoder, Dinov2WithRegistersModel)
        run["grown_from"] = grow(encoder, options.grow)
    objective = Objective(options.width, options.temperature)
    optimiser = build_optimiser([encoder, objective], options.lr)
    checkpoint = options.out / "checkpoint.pt"
    parts = {"encoder": encoder, "objective": objective, "optimiser": optimiser}
    start, seconds = load_checkpoint(checkpoint, run, **parts)
    progress = ProgressLine(options.steps, start, seconds)
    for step in range(start, options.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, options)
        generator = torch.Generator().manual_seed((options.seed + 1) * 1_000_000_007 + step)
        chosen = batch_indices(step, options.batch, len(train.images), options.seed)
        pixels = train.images[chosen, :1] / 255
        (first, first_target), (second, second_target) = (augment(pixels, options, generator) for _ in range(2))
        patches, whole = tokens_of(normalise(torch.cat([first, second])))
        contrast, drawn = objective(patches, whole, torch.cat([first_target, second_target]))
        optimiser.zero_grad()
        (contrast + options.pixel_weight * drawn).backward()
        nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
        optimiser.step()
        done = step + 1
        if done % 50 == 0:
            progress.print(done, contrast=contrast.item(), pixels=drawn.item())
        if done % options.evaluate_every == 0 and done < options.steps:
            print("  " + json.dumps(evaluate(tokens_of, train, test)), flush=True)
        if done % options.checkpoint_every == 0:
            save_checkpoint(checkpoint, run, done, progress.seconds(), **parts)

    minutes = round(progress.seconds() / 60, 1)
    # The weights are stored as float16, so evaluate them after rounding.
    encoder.half().float()
    measures = {**evaluate(tokens_of, train, test), **evaluate_pixels(train, test)}
    metadata = {"script": "tools/pretrain_encoder.py", **run, "measures": measures, "minutes": minutes}
    publish(encoder, options.out, metadata)
    checkpoint.unlink(missing_ok=True)
    parameters = sum(p.numel() for p in encoder.parameters())
    print(f"{parameters:,} parameters, {minutes} minutes\n{json.dumps(measures, indent=1)}")


if __name__ == "__main__":
    main()
