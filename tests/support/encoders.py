"""Tiny random encoders of transformers and timm, as folders in the layouts of the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

import mmfm.infra.torchvision_ops  # noqa: F401  # isort: skip  (before transformers and timm)

import timm
import torch
from safetensors.torch import save_file

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
PROCESSOR = {"image_mean": MEAN, "image_std": STD, "resample": 2}


def scramble(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Add noise to all parameters: initial ones are so small, or so regular, that mistakes do not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_hf(folder: Path, model: Any) -> Path:
    """Write a model of transformers and a processor."""
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def write_timm(folder: Path, architecture: str, size: int = 32, **arguments: Any) -> Path:
    """Write a model of timm as its hub has them: config.json with architecture and pretrained_cfg, and the weights."""
    model = scramble(timm.create_model(architecture, num_classes=0, img_size=size, **arguments))
    folder.mkdir(parents=True)
    about = {
        "architecture": architecture, "num_classes": 0, "num_features": model.num_features,
        "model_args": {"img_size": size, **arguments},
        "pretrained_cfg": {
            "input_size": [3, size, size], "fixed_input_size": True, "interpolation": "bilinear", "mean": MEAN,
            "std": STD, "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    return folder
