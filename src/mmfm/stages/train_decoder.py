"""``train_decoder``: a decoder from the frozen encoder's latents to images.

Reads the listing, the images, the encoder. Writes ``decoder.safetensors``, ``history.jsonl``, ``curve.png`` and
``reconstruction.png``.

The unit of work is an optimiser step. The state keeps checkpoints ``step-00000500/``: a kill loses the steps since the
newest one, and more steps go on from the last.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfm import config, data
from mmfm.autoencoder import rae
from mmfm.autoencoder.decoder import Decoder, DecoderConfig, save_decoder
from mmfm.autoencoder.encoders import Encoder, load_encoder
from mmfm.config import StageConfig
from mmfm.infra import rng
from mmfm.infra.distributed import Ranks
from mmfm.infra.pictures import paired_grid, save_picture
from mmfm.infra.precision import autocast
from mmfm.stages import provenance, runner
from mmfm.stages.runner import Context
from mmfm.training import latents
from mmfm.training.history import HISTORY, publish_history, read_history
from mmfm.training.options import LoopOptions, OptimizerOptions
from mmfm.training.schedule import Cosine
from mmfm.training.trainer import Trainer

_LOG_EVERY = 20
_KEEP_CHECKPOINTS = 2
_SHOWN = 16

_DECODER = "decoder.safetensors"
_OUTPUTS = (_DECODER, HISTORY, "curve.png", "reconstruction.png")


@dataclass(frozen=True)
class Reconstruction:
    """Mean absolute error of images decoded from noisy tokens (Zheng et al. 2025, noise-augmented decoding).

    Attributes:
        noise: a token gets noise of a standard deviation uniform in [0, noise], one for all tokens of an image.
        image_mean, image_std: (3,) the encoder processor's normalisation, in which the decoder answers.
    """

    seed: int
    noise: float
    image_mean: Tensor
    image_std: Tensor

    def losses(self, model: nn.Module, micro: latents.MicroBatch, inputs: latents.Inputs) -> Tensor:
        """L1 distance in [0, 1] per image, (b,) float32."""
        z, keys = inputs.latent, micro.key_tensor(inputs.latent.device)
        level = self.noise * rng.uniform(self.seed, "decoder/level", keys).float()
        z = torch.addcmul(z, level.view(-1, 1, 1, 1), rng.normal(self.seed, "decoder/noise", keys, tuple(z.shape[1:])))
        with autocast("auto", z.device):
            output = model(z.flatten(2).transpose(1, 2))
        images = output.float() * self.image_std[:, None, None] + self.image_mean[:, None, None]
        return (images - inputs.images).abs().flatten(1).mean(1)


def train_decoder(config: StageConfig, listing: Path, encoder_weights: Path, out_dir: Path, ranks: Ranks) -> None:
    """Train a decoder for an encoder's latents and publish it.

    Raises:
        ValueError: an image size that the latent's grid does not divide, or NaN or Inf in training.
        KeyboardInterrupt: stopped by a signal, after a checkpoint.
    """
    inputs = ranks.from_main(
        lambda: provenance.belong_together(provenance.listing(listing), provenance.encoder(encoder_weights))
    )
    with Context.open(config, ranks, inputs, {name: out_dir / name for name in _OUTPUTS}) as context:
        _train(context, listing, encoder_weights)


def _train(context: Context, listing: Path, encoder_weights: Path) -> None:
    config, ranks, inputs = context.config, context.ranks, context.inputs
    settings, size, n_images = config.decoder, config.image.size, len(data.Listing.open(listing))
    budget = {"step": settings.steps}
    if runner.restore(context, budget):
        return
    encoder = load_encoder(config.encoder.family, encoder_weights, config.encoder.input_size, ranks.device)
    plan = latents.BatchPlan(
        settings.seed, n_images, settings.global_batch, ranks.rank, ranks.world, settings.micro_batch
    )
    generator = torch.Generator().manual_seed(rng.derive_seed(settings.seed, "decoder/init"))
    model = Decoder(_sizes(settings, encoder, size), generator=generator).to(ranks.device)
    task = Reconstruction(settings.seed, settings.noise, encoder.image_mean, encoder.image_std)
    optimizer_options = OptimizerOptions(Cosine(settings.lr, 0.0, 0, settings.horizon), (0.9, 0.95), 0.0, 1.0, None)
    options = LoopOptions(
        settings.checkpoint_every, _LOG_EVERY, _KEEP_CHECKPOINTS,
        remedy=f"Lower decoder.micro_batch (now {settings.micro_batch or 'the whole share'})"
        " or decoder.latent_cache_gb; neither changes the results",
    )  # fmt: skip
    trainer = Trainer("train_decoder", model, task.losses, plan, optimizer_options, options, context.state, ranks)
    if not trainer.resume(settings.steps):
        shape = (encoder.hidden_size, *encoder.grid)
        batches = latents.open_batches(
            plan, listing, size, encoder, shape, ranks,
            stage="train_decoder", workers=settings.workers, cache_gb=settings.latent_cache_gb, keep_images=True,
        )  # fmt: skip
        trainer.run(settings.steps, batches)

    def write(finished: Path) -> None:
        publish_history(context.state, trainer.step, finished, "train_decoder")
        save_picture(_reconstructions(listing, size, encoder, model), finished / "reconstruction.png")
        about = {
            "command": "mmfm train_decoder",
            "version": context.version,
            "settings": dict(context.identity),
            "seed": settings.seed,
            "digests": inputs.digests,
            "n_images": n_images,
            "steps": trainer.step,
            "loss": read_history(finished / HISTORY)[-1]["loss"],
        }
        save_decoder(model, finished / _DECODER, about)

    runner.finish(context, write, budget)


def _sizes(settings: config.Decoder, encoder: Encoder, size: int) -> DecoderConfig:
    """The decoder whose patches are the image's shares of the latent's positions."""
    height, width = encoder.grid
    if size % height:
        raise ValueError(
            f"image.size {size} is no multiple of the latent's {height} rows; take {height * (size // height or 1)}"
        )
    return DecoderConfig(
        encoder.hidden_size, settings.hidden_size, settings.intermediate_size, settings.num_heads,
        settings.num_layers, size // height, height * width,
    )  # fmt: skip


@torch.no_grad()
def _reconstructions(listing: Path, size: int, encoder: Encoder, model: Decoder) -> Any:
    """Picture of images from all over the listing above what the decoder makes of their latents."""
    n = len(data.Listing.open(listing))
    shown = [math.floor(i * n / min(n, _SHOWN)) for i in range(min(n, _SHOWN))]
    _, images = next(data.image_batches(listing, size, [shown]))
    latent, _ = encoder(data.to_float(images, encoder.image_mean.device))
    return paired_grid(images, rae.to_uint8(rae.RAE(encoder, model.eval()).decode(latent)))
