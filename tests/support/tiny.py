"""A tiny encoder, a few dozen images, and small values of all sections of the configuration."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmfm import data

SIZE, GRID, CHANNELS, MODES = 32, 4, 32, 4


SECTIONS = {
    "image": {"size": SIZE},
    "encoder": {"family": "dinov2", "weights": "unused", "input_size": SIZE},
    "model": {"hidden_size": [32, 32], "depth": [1, 1], "num_heads": [2, 2]},
    "train": {
        "model": "tiny", "seed": 0, "assignment": "soft", "flip": True, "global_batch": 8, "epochs": 3, "lr": 1e-3,
        "final_lr": 1e-4, "constant_epochs": 1, "decay_end_epoch": 3, "betas": [0.9, 0.95], "weight_decay": 0.0,
        "clip_norm": 1.0, "ema_decay": 0.9, "precision": "auto", "micro_batch": 0, "workers": 0,
        "checkpoint_every": 4, "keep_checkpoints": 2, "log_every": 2, "compile": False,
        "preview": {
            "every": 0, "n_images": 4, "time_points": 3, "fid_every": 0, "fid_images": 22, "fid_batch_size": 4,
        },
        "label_dropout": 0.1, "mode_dropout": 0.0,
        "schedule": "constant_then_linear",
        "checkpoint_activations": False, "sharding": "ddp", "gpus": "auto", "milestones": [], "logger": "none",
        "means_precision": "auto", "means_device": "device", "loss_weighting": {
            "rule": "none", "by": "mode", "decay": 0.9, "gamma": 1.0, "warmup_epochs": 1, "bounds": [0.5, 2.0],
        },
    },
    "latents": {"cache": "off", "folder": "latents"},
    "extract": {"shard_size": 8, "batch_size": 4, "workers": 0},
    "latent_stats": {"weights": "compute", "mean": True},
    "gmm": {
        "n_components": 4, "covariance_type": "diag", "init": "random_from_data", "reg_covar": 1e-6, "tol": 1e-3,
        "max_iter": 5, "seed": 0, "precision": "float32", "chunk_size": 64, "n_init": 1, "init_means": "",
        "e_step": "exact", "cache_gb": 1.0,
    },
    "spatial_gmm": {"batch_size": 4, "workers": 0, "covariance_type": "spherical"},
    "sample": {
        "n_images": 22, "time_points": 4, "solver": "euler", "precision": "auto", "shard_size": 5, "batch_size": 4,
        "guidance": {"scale": 1.0, "interval": [0.0, 1.0]}, "rtol": 1e-3, "atol": 1e-3, "mode_draw": "multinomial",
        "label_draw": "equal", "features": False, "means_device": "device",
    },
    "decoder": {
        "weights": "train", "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_layers": 1, "noise": 0.8,
        "global_batch": 8, "lr": 1e-3, "horizon": 12, "steps": 12, "seed": 0, "micro_batch": 0,
        "workers": 0, "checkpoint_every": 4,
    },
}  # fmt: skip
"""Small settings of the stages; pass a copy of the sections that a stage reads as JSON. In tests, there is a cache."""


def settings(stage_sections: tuple[str, ...], **changes: dict) -> str:
    """Return the JSON of sections of :data:`SECTIONS`, with keys of single sections changed."""
    return json.dumps({name: {**SECTIONS[name], **changes.get(name, {})} for name in stage_sections})


def write_images(folder: Path, n: int, classes: int = 2, size: int = SIZE, seed: int = 0) -> Path:
    """Write ``n`` PNGs of shapes and gradients as an ImageFolder; no two are alike, none is symmetric."""
    generator = np.random.default_rng(seed)
    row, column = np.mgrid[0:size, 0:size] / size
    for i in range(n):
        label = i % classes
        a, b, c = generator.uniform(0.2, 1, 3)
        x, y = generator.uniform(0.2, 0.8, 2)
        disc = (row - y) ** 2 + (column - x) ** 2 < 0.04 * (1 + label)
        pixels = np.stack([a * column, b * row, np.where(disc, c, 0.2 * label)], axis=-1)
        path = folder / f"class{label}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * pixels).astype(np.uint8)).save(path)
    return folder


def write_encoder(folder: Path, seed: int = 0) -> Path:
    """Write a random DINOv2 with registers (width 32, 2 layers, patch 8) in the Hugging Face layout."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        configuration = Dinov2WithRegistersConfig(
            hidden_size=CHANNELS, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=SIZE,
            patch_size=SIZE // GRID, num_register_tokens=2,
        )  # fmt: skip
        model = Dinov2WithRegistersModel(configuration)
        with torch.no_grad():  # the usual initialisation is so small that all images look alike
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5)
        model.save_pretrained(folder)
    processor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def write_listing(path: Path, images: Path) -> Path:
    """List all images of an ImageFolder as training images."""
    classes, paths, labels, sizes = data.scan(images)
    data.write_listing(path, images, "train", classes, paths, labels, sizes)
    return path


@dataclass(frozen=True)
class Pipeline:
    """Files of the stages before training, consistent with each other."""

    root: Path
    listing: Path
    encoder: Path
    stats: Path
    gmm: Path
    spatial_gmm: Path
    decoder: Path
    n_images: int

    @property
    def train_arguments(self) -> list[str]:
        """Arguments of ``train`` that name the files; add --setting, --out-dir and --settings."""
        names = {
            "--listing": self.listing, "--encoder-weights": self.encoder, "--stats": self.stats, "--gmm": self.gmm,
            "--spatial-gmm": self.spatial_gmm, "--decoder": self.decoder,
        }  # fmt: skip
        return [str(part) for pair in names.items() for part in pair]
