"""Images of the average during training: pictures, and the images whose distance is measured."""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor, nn

from mmfm.autoencoder import rae
from mmfm.flow.path import time_grid
from mmfm.generation import networks
from mmfm.generation.generator import Generator
from mmfm.infra.pictures import image_grid
from mmfm.training.objective import FlowMatching


def generator(
    task: FlowMatching, autoencoder: rae.RAE, latent_shape: tuple[int, int, int], device: torch.device, purpose: str
) -> Generator:
    """Return the generator for the model in training; every call starts from the same noise and modes.

    Args:
        purpose: ``preview`` or ``fid_curve``.
    """
    times = time_grid(task.config.preview.time_points, task.shift)
    return Generator(
        task.setting,
        task.source,
        task.num_labels,
        autoencoder,
        latent_shape,
        times,
        task.config.seed,
        device,
        purpose,
    )


def previewer(images: Generator, task: FlowMatching) -> Callable[[nn.Module], Image.Image]:
    """Return a function that draws a grid of a model's samples."""

    def draw(model: nn.Module) -> Image.Image:
        field = networks.plain(model, task.config.precision, images.device)
        # No check for finite latents: a flow that diverges should show in the preview, not end the run.
        latents, _ = images.latents(field, range(task.config.preview.n_images))
        return image_grid(images.decode(latents), columns=8)

    return draw


def measured_images(images: Generator, task: FlowMatching) -> Callable[[nn.Module, range], Tensor]:
    """Return a function from a model and image numbers to images (B, 3, S, S) uint8."""

    def generate(model: nn.Module, numbers: range) -> Tensor:
        return images.generate(networks.plain(model, task.config.precision, images.device), numbers)[0]

    return generate
