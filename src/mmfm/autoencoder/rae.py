"""Representation autoencoder: frozen encoder, latent statistics and decoder in one place (Zheng et al. 2025).

Every stage encodes and decodes through this module, so that all of them see the same latents.
"""

import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmfm.autoencoder.decoder import Decoder
from mmfm.autoencoder.encoders import Encoder

STATISTICS_EPS = 1e-5


class Encoded(NamedTuple):
    """latent (B, C, H, W), normalised by the latent statistics, and global_token (B, C); float32."""

    latent: Tensor
    global_token: Tensor


class RAE(nn.Module):
    """Encoder and decoder around latents normalised per position.

    Args:
        encoder: the frozen encoder.
        decoder: its decoder; None where only `encode` is used.
        mean, var: latent statistics (C, H, W); a missing mean counts as 0 and a missing variance as 1; with neither,
            latents are left as they are.
        eps: added to the variance.

    Raises:
        ValueError: statistics or a decoder that do not fit the encoder's latents.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder | None = None,
        mean: Tensor | None = None,
        var: Tensor | None = None,
        eps: float = STATISTICS_EPS,
    ) -> None:
        super().__init__()
        latent_shape = (encoder.hidden_size, *encoder.grid)
        for name, value in (("mean", mean), ("variance", var)):
            if value is not None and tuple(value.shape) != latent_shape:
                raise ValueError(
                    f"the latent {name} is {tuple(value.shape)}, but the {encoder.family} encoder's latents are "
                    f"{latent_shape}; use the statistics of this encoder and input size"
                )
        if decoder is not None:
            _check_decoder(decoder, latent_shape)
        self.encoder = encoder
        self.decoder = decoder
        self.normalised = mean is not None or var is not None
        device = encoder.image_mean.device
        mean = torch.zeros(latent_shape) if mean is None else mean
        var = torch.ones(latent_shape) if var is None else var
        self.register_buffer("latent_mean", mean.detach().to(device, torch.float32))
        self.register_buffer("latent_std", (var.detach().to(device, torch.float32) + eps).sqrt())

    def encode(self, images: Tensor) -> Encoded:
        """Images (B, 3, h, w) float in [0, 1] -> normalised latent (z - mean) / sqrt(var + eps) and global token."""
        latent, global_token = self.encoder(images)
        if self.normalised:
            latent = (latent - self.latent_mean) / self.latent_std
        return Encoded(latent, global_token)

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latents (B, C, H, W) -> images (B, 3, H', W'), nominally in [0, 1] but not clamped.

        Raises:
            ValueError: the module has no decoder.
        """
        if self.decoder is None:
            raise ValueError("this RAE was built without a decoder; give one to decode")
        if self.normalised:
            latent = latent * self.latent_std + self.latent_mean
        images = self.decoder(latent.flatten(2).transpose(1, 2))
        return images * self.encoder.image_std[:, None, None] + self.encoder.image_mean[:, None, None]

    def require_image_size(self, expected: int, file: str | Path) -> int:
        """Return the pixels a side of the images that the decoder makes.

        Args:
            expected: ``image.size``.
            file: the decoder's, for the message.

        Raises:
            ValueError: the size is another one.
        """
        size = self.encoder.grid[0] * self.decoder.config.patch_size
        if size != expected:
            raise ValueError(
                f"the decoder {file} makes images of {size} pixels, but image.size is {expected}; "
                "set image.size or give the decoder for it"
            )
        return size


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] -> uint8 of the same shape: clamp, times 255, truncate (the reference's rounding)."""
    return (images.float().clamp(0, 1) * 255).to(torch.uint8)


def load_statistics(path: str | Path, latent_shape: tuple[int, int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Read per-position latent statistics, a `.pt` file with a dictionary of "mean" and "var".

    Args:
        path: the file.
        latent_shape: (C, H, W) that they must have; None accepts any.

    Returns:
        mean and variance, each (C, H, W) float32 on the CPU; an absent mean is 0, an absent variance 1.

    Raises:
        FileNotFoundError: no file at `path`.
        ValueError: an unreadable file, one with neither entry, wrong shapes, or negative or non-finite values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no latent statistics at {path}; run latent_stats or fetch the published ones")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a readable PyTorch file ({error}); make or fetch it again") from error
    content = content if isinstance(content, dict) else {}
    mean, var = content.get("mean"), content.get("var")
    present = mean if mean is not None else var
    if present is None:
        raise ValueError(f'{path} has neither "mean" nor "var"; latent statistics are a dictionary of the two')
    mean = torch.zeros_like(present) if mean is None else mean
    var = torch.ones_like(present) if var is None else var
    expected = tuple(mean.shape) if latent_shape is None else tuple(latent_shape)
    for name, value in (("mean", mean), ("var", var)):
        if value.ndim != 3 or tuple(value.shape) != expected:
            wanted = expected if len(expected) == 3 else "(C, H, W)"
            raise ValueError(
                f"{name} in {path} is {tuple(value.shape)}, expected {wanted}; "
                "the statistics belong to another encoder or input size"
            )
        if not value.isfinite().all() or (name == "var" and (value < 0).any()):
            raise ValueError(f"{name} in {path} has negative or non-finite values; run latent_stats again")
    return mean.float(), var.float()


def _check_decoder(decoder: Decoder, latent_shape: tuple[int, int, int]) -> None:
    channels, height, width = latent_shape
    if (decoder.config.latent_dim, decoder.config.num_patches) != (channels, height * width):
        raise ValueError(
            f"the decoder takes {decoder.config.num_patches} tokens of {decoder.config.latent_dim} channels, but the "
            f"encoder gives {height * width} of {channels}; use the decoder trained for this encoder and input size"
        )
