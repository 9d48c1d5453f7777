"""Try encoders of transformers and timm, and compare `extract` with the bare encoder.

python benchmarks/encoders.py [--table] [--rounds 3] [--images 64]

Encoders have random weights and their usual sizes, so nothing is downloaded. With --table, every encoder in TRIED is
loaded from a folder in its library's layout and compared with the library's own forward pass, last norm included.
Without it, `mmfm extract` (ViT-S with patches of 14, 224 pixels, no latent cache) alternates with a loop that reads the
same images in the same batches and runs the library's model. On a CPU process time is measured, to exclude other
programs. Writes benchmarks/results/encoders.json.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import mmfm.infra.torchvision_ops  # noqa: F401  # isort: skip  (before transformers and timm)

import numpy as np
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mmfm import config, data
from mmfm.autoencoder.encoders import load_encoder
from mmfm.infra.distributed import Ranks
from mmfm.stages import extract as module

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OUT = Path(__file__).parent / "results"
SIZE, BATCH = 224, 16
PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
SMALL_16 = {**SMALL, "intermediate_size": 1536, "patch_size": 16}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}

TRIED: dict[str, tuple[str, str, dict[str, Any], int]] = {
    # name: library, class or architecture, sizes, input size
    "DINOv2-S with registers": ("hf", "Dinov2WithRegisters", {**SMALL, "patch_size": 14, "image_size": 518}, 224),
    "DINOv3-S": (
        "hf",
        "DINOv3ViT",
        {**SMALL_16, "num_register_tokens": 4},
        256,
    ),
    "CLIP-B/16": ("hf", "CLIPVision", {**BASE, "patch_size": 16}, 224),
    "SigLIP-B/16": (
        "hf",
        "SiglipVision",
        {**BASE, "patch_size": 16, "image_size": 224},
        256,
    ),
    "DeiT-S": ("hf", "DeiT", SMALL_16, 224),
    "DINOv2-S": ("timm", "vit_small_patch14_dinov2", {}, 224),
    "DINOv3-B": ("timm", "vit_base_patch16_dinov3", {}, 512),
    "DINOv2-L": ("timm", "vit_large_patch14_dinov2", {}, 196),
    "EVA-02-S": ("timm", "eva02_small_patch14_224", {}, 224),
    "CLIP-B/16 ": ("timm", "vit_base_patch16_clip_224", {}, 256),
    "SigLIP-B/16 ": ("timm", "vit_base_patch16_siglip_224", {}, 224),
    "PE-core-S": ("timm", "vit_pe_core_small_patch16_384", {}, 256),
}


def now() -> float:
    """Return process time in seconds on a CPU, or wall-clock time after synchronizing a GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def write(folder: Path, library: str, kind: str, sizes: dict[str, Any]) -> str:
    """Write a model with random weights, and return what its global token is."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    if library == "hf":
        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes))
        model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
        return "pooler" if kind == "SiglipVision" else "class token"
    model = timm.create_model(kind, num_classes=0)
    settings = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": list(model.pretrained_cfg["input_size"])}
    about = {"architecture": kind, "num_features": model.num_features, "num_classes": 0, "pretrained_cfg": settings}
    (folder / "config.json").write_text(json.dumps(about))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    return {"token": "class token", "avg": "mean", "map": "attention pool"}[model.global_pool]


def own_forward(folder: Path, library: str, kind: str, size: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return the library's forward pass: normalised pixels to all tokens and the global one."""
    if library == "timm":
        model = (
            timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, img_size=size).eval().to(DEVICE)
        )

        def features(pixels: Tensor) -> tuple[Tensor, Tensor]:
            tokens = model.forward_features(pixels)
            return tokens, model.forward_head(tokens, pre_logits=True)

        return features
    network = getattr(transformers, f"{kind}Model").from_pretrained(folder).eval().to(DEVICE)
    interpolate = {} if kind.startswith("DINO") or kind.startswith("Dino") else {"interpolate_pos_encoding": True}

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor]:
        output = network(pixel_values=pixels, **interpolate)
        tokens = output.last_hidden_state
        return tokens, output.pooler_output if kind == "SiglipVision" else tokens[:, 0]

    return forward


@torch.no_grad()
def tried(name: str, folder: Path) -> dict[str, Any]:
    """Load one encoder and compare it with its library on one batch."""
    library, kind, sizes, size = TRIED[name]
    token = write(folder, library, kind, sizes)
    encoder = load_encoder(library, folder, size, DEVICE, norm_affine=True)
    images = torch.rand(8, 3, size, size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    encoder(images[:2])
    start = now()
    latent, found = encoder(images)
    seconds = now() - start
    tokens, whole = own_forward(folder, library, kind, size)((images - 0.5) / 0.5)
    patches = latent.flatten(2).transpose(1, 2)
    pairs = ((patches, tokens[:, -patches.shape[1] :]), (found, whole))
    parity = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    about = {"library": library, "model": kind, "input": size, "latent": list(latent.shape[1:]), "token": token}
    return {"name": name.strip(), **about, "parity": parity, "seconds_1000": seconds * 1000 / len(images)}


def write_images(folder: Path, n: int) -> Path:
    """Write JPEG files of noise over gradients, 256 pixels, and their listing."""
    generator = np.random.default_rng(0)
    for i in range(n):
        path = folder / "images" / "one" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.linspace(0, 200, 256)[:, None, None] + generator.uniform(0, 50, (256, 256, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)
    classes, paths, labels, sizes = data.scan(folder / "images")
    data.write_listing(folder / "listing", folder / "images", "train", classes, paths, labels, sizes)
    return folder / "listing"


def extracted_and_bare(folder: Path, n: int, rounds: int) -> dict[str, Any]:
    """Alternate between `extract` and the bare encoder; return images per second of each, all rounds together."""
    listing, encoder = write_images(folder, n), folder / "encoder"
    write(encoder, "hf", "Dinov2", {**SMALL, "patch_size": 14, "image_size": 518})
    bare = own_forward(encoder, "hf", "Dinov2", SIZE)
    stage = config.StageConfig(
        "extract",
        image=config.Image(SIZE),
        encoder=config.Encoder("dinov2", "unused", SIZE, "float32", norm_affine=False),
        latents=config.Latents("off", str(folder)),
        extract=config.Extract(shard_size=n, batch_size=BATCH, workers=0, crop="image"),
    )

    def run_extract(number: int) -> float:
        out, start = folder / f"out{number}", now()
        with loading_timed() as loaded:
            module.extract(
                stage, listing, encoder, out / "tokens.zarr", out / "moments.safetensors", Ranks(0, 1, DEVICE)
            )
            return now() - start - loaded[0]

    @torch.no_grad()
    def run_bare() -> float:
        start = now()
        for _, images in data.image_batches(listing, SIZE, data.ranges(0, n, BATCH)):
            bare((data.to_float(images, DEVICE) - 0.5) / 0.5)
        return now() - start

    bare(torch.zeros(2, 3, SIZE, SIZE, device=DEVICE))
    times = [(run_extract(i), run_bare()) for i in range(rounds)]
    ours, theirs = (n * rounds / sum(each) for each in zip(*times, strict=True))
    ratios = [bare_time / own for own, bare_time in times]
    return {"extract": ours, "bare": theirs, "ratio": ours / theirs, "ratios": ratios, "images": n}


@contextmanager
def loading_timed() -> Iterator[list[float]]:
    """Count the seconds that `extract` spends on loading the encoder in the block."""
    seconds, load = [0.0], module.load_encoder

    def timed(*arguments: Any) -> Any:
        start = now()
        try:
            return load(*arguments)
        finally:
            seconds[0] += now() - start

    with mock.patch.object(module, "load_encoder", timed):
        yield seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="try all encoders")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1 if DEVICE.type == "cpu" else torch.get_num_threads())
    with tempfile.TemporaryDirectory() as name:
        if options.table:
            found: Any = []
            print("| encoder | library | model | input | latent | global token | parity | s for 1,000 images |")
            print("|---|---|---|---|---|---|---|---|")
            for i, each in enumerate(TRIED):
                row = tried(each, Path(name) / str(i))
                found.append(row)
                latent = " x ".join(map(str, row["latent"]))
                words = (row["name"], row["library"], f"`{row['model']}`", row["input"], latent, row["token"])
                numbers = f"{row['parity']:.0e}", f"{row['seconds_1000']:.0f}"
                print("| " + " | ".join(map(str, (*words, *numbers))) + " |", flush=True)
        else:
            found = extracted_and_bare(Path(name), options.images, options.rounds)
            print(json.dumps(found, indent=1))
    OUT.mkdir(exist_ok=True)
    (OUT / ("encoders_table.json" if options.table else "encoders.json")).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
