"""Representation autoencoder: frozen encoder, latent statistics and decoder (Zheng et al. 2025).

All stages encode and decode through this module, so they all use the same latents.
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
    """Encoder and decoder for latents that are normalised per position.

    Args:
        encoder: the frozen encoder.
        decoder: its decoder; None if only `encode` is used.
        mean, var: latent statistics (C, H, W); mean 0 and variance 1 by default. Without either, latents are not
            normalised.
        eps: added to the variance.

    Raises:
        ValueError: the statistics or the decoder don't match the encoder's latents.
    """

    latent_mean: Tensor
    latent_std: Tensor

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
                    f"{latent_shape}; use the statistics for this encoder and input size"
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
        """Encode images (B, 3, h, w) float in [0, 1] as latents (z - mean) / sqrt(var + eps) and global tokens."""
        return self.normalise(*self.encoder(images))

    def normalise(self, latent: Tensor, global_token: Tensor) -> Encoded:
        """Normalise latents (B, C, H, W) from the encoder; global tokens stay as they are."""
        if self.normalised:
            latent = (latent - self.latent_mean) / self.latent_std
        return Encoded(latent, global_token)

    def decode(self, latent: Tensor) -> Tensor:
        """Decode normalised latents (B, C, H, W) into images (B, 3, H', W'), nominally in [0, 1] but not clamped.

        Raises:
            ValueError: the module has no decoder.
        """
        decoder = self._require_decoder()
        if self.normalised:
            latent = latent * self.latent_std + self.latent_mean
        images = decoder(latent.flatten(2).transpose(1, 2))
        return images * self.encoder.image_std[:, None, None] + self.encoder.image_mean[:, None, None]

    def require_image_size(self, expected: int, file: str | Path) -> int:
        """Check and return the side in pixels of decoded images.

        Args:
            expected: ``image.size``.
            file: of the decoder, for the error message.

        Raises:
            ValueError: images have another size, or the module has no decoder.
        """
        size = self.encoder.grid[0] * self._require_decoder().config.patch_size
        if size != expected:
            raise ValueError(
                f"the decoder {file} makes images of {size} pixels, but image.size is {expected}; "
                "change image.size, or use a decoder for that size"
            )
        return size

    def _require_decoder(self) -> Decoder:
        if self.decoder is None:
            raise ValueError("this RAE was built without a decoder; build it with one to decode")
        return self.decoder


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [0, 1] to uint8: clamp, multiply by 255, truncate, as in the reference implementation."""
    return (images.float().clamp(0, 1) * 255).to(torch.uint8)


def load_statistics(path: str | Path, latent_shape: tuple[int, int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Read latent statistics from a `.pt` file that holds a dictionary with "mean", "var" or both; one may be None.

    Args:
        path: the file.
        latent_shape: required shape (C, H, W); None accepts any.

    Returns:
        mean and variance, each (C, H, W) float32 on the CPU; by default 0 and 1.

    Raises:
        FileNotFoundError: no file at `path`.
        ValueError: the file can't be read or has neither entry, a shape is wrong, a value is not finite, or a variance
            is negative.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no latent statistics at {path}; run latent_stats, or fetch the published ones")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a readable PyTorch file ({error}); make or fetch it again") from error
    content = content if isinstance(content, dict) else {}
    mean, var = content.get("mean"), content.get("var")
    present = {name: value for name, value in (("mean", mean), ("var", var)) if value is not None}
    if not present:
        raise ValueError(f'{path} has neither "mean" nor "var"; run latent_stats, or fetch the published statistics')
    first = next(iter(present.values()))
    expected = tuple(first.shape) if latent_shape is None else tuple(latent_shape)
    for name, value in present.items():
        if value.ndim != 3 or tuple(value.shape) != expected:
            wanted = expected if len(expected) == 3 else "(C, H, W)"
            raise ValueError(
                f"{name} in {path} is {tuple(value.shape)}, expected {wanted}; "
                "use the statistics for this encoder and input size"
            )
        if not value.isfinite().all() or (name == "var" and (value < 0).any()):
            raise ValueError(f"{name} in {path} has negative or non-finite values; run latent_stats again")
    mean = torch.zeros_like(first) if mean is None else mean
    var = torch.ones_like(first) if var is None else var
    return mean.float(), var.float()


def _check_decoder(decoder: Decoder, latent_shape: tuple[int, int, int]) -> None:
    channels, height, width = latent_shape
    if (decoder.config.latent_dim, decoder.config.num_patches) != (channels, height * width):
        raise ValueError(
            f"the decoder takes {decoder.config.num_patches} tokens of {decoder.config.latent_dim} channels, but the "
            f"encoder gives {height * width} of {channels}; use a decoder trained for this encoder and input size"
        )
