"""What a training run shows of its average: pictures, and images whose distance is measured."""

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
    """Return what generates with the model in training: the same noise and modes whenever it is called.

    Args:
        purpose: ``preview`` or ``fid_curve``.
    """
    times = time_grid(task.settings.preview.time_points, task.shift)
    return Generator(
        task.setting,
        task.source,
        task.num_labels,
        autoencoder,
        latent_shape,
        times,
        task.settings.seed,
        device,
        purpose,
    )


def previewer(images: Generator, task: FlowMatching) -> Callable[[nn.Module], Image.Image]:
    """Return a function from a model to the picture of its samples."""

    def draw(model: nn.Module) -> Image.Image:
        field = networks.plain(model, task.settings.precision, images.device)
        # Of a flow that diverges the picture shows it; nothing ends by that.
        latents, _ = images.latents(field, range(task.settings.preview.n_images))
        return image_grid(images.decode(latents), columns=8)

    return draw


def measured_images(images: Generator, task: FlowMatching) -> Callable[[nn.Module, range], Tensor]:
    """Return a function from a model and numbers to its images (B, 3, S, S) uint8."""

    def generate(model: nn.Module, numbers: range) -> Tensor:
        return images.generate(networks.plain(model, task.settings.precision, images.device), numbers)[0]

    return generate
