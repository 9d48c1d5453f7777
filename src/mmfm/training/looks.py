"""What a training run shows of its average: pictures, and images whose distance is measured."""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from mmfm import config, rae
from mmfm.infra.distributed import Ranks
from mmfm.pictures import image_grid
from mmfm.training.fid_curve import DistanceFiles, FidCurve
from mmfm.training.objective import FlowMatching


def previewer(
    task: FlowMatching, autoencoder: rae.RAE, latent_shape: tuple[int, int, int], settings: config.Preview
) -> Callable[[nn.Module], Image.Image]:
    """Return a function from a model to the picture of its samples."""

    @torch.no_grad()
    def draw(model: nn.Module) -> Image.Image:
        numbers = range(settings.n_images)
        x = task.sample(model, latent_shape, numbers, settings.time_points, "preview")
        return image_grid(rae.to_uint8(autoencoder.decode(x)), columns=8)

    return draw


def fid_curve(
    task: FlowMatching, autoencoder: rae.RAE, latent_shape: tuple[int, int, int], files: DistanceFiles,
    listing_digest: str, state: Path, ranks: Ranks,
) -> FidCurve:  # fmt: skip
    """Return what measures the distance of a model's images.

    Raises:
        FileNotFoundError: no detector.
        ValueError: the detector's file is damaged or of another network.
    """
    settings = task.settings.preview

    def images(model: nn.Module, numbers: range) -> Tensor:
        x = task.sample(model, latent_shape, numbers, settings.time_points, "fid_curve")
        if not x.isfinite().all():
            raise ValueError("the flow ends in NaN or Inf; lower train.lr if that stays so")
        return rae.to_uint8(autoencoder.decode(x))

    size = latent_shape[1] * autoencoder.decoder.config.patch_size
    return FidCurve(files, images, settings, size, listing_digest, state, f"train {task.setting}", ranks)
