"""``train_decoder``: train a decoder from the frozen encoder's latents to images.

Reads: the listing, the images, the encoder; latents from the latent cache, which it fills first.
Writes: ``decoder.safetensors``, ``history.jsonl``, ``curve.png`` and ``reconstruction.png``.
Unit of work: an optimiser step; the state holds checkpoints ``step-00000500/``.
After a kill: training continues from the newest checkpoint. A larger ``decoder.steps`` continues a finished run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfm import config, data
from mmfm.autoencoder import rae
from mmfm.autoencoder.decoder import Decoder, DecoderConfig, save_decoder
from mmfm.autoencoder.encoders import Encoder, configured_encoder
from mmfm.config import StageConfig
from mmfm.infra import rng
from mmfm.infra.distributed import Ranks
from mmfm.infra.pictures import paired_grid, save_picture
from mmfm.infra.precision import autocast
from mmfm.models.flops import decoder_flops
from mmfm.stages import provenance, runner
from mmfm.stages.cached_latents import open_cache
from mmfm.stages.runner import Context
from mmfm.training import latents
from mmfm.training.history import HISTORY, publish_history, read_history
from mmfm.training.options import LoopOptions, OptimizerOptions, Run
from mmfm.training.schedule import Cosine
from mmfm.training.trainer import Trainer
from mmfm.training.usage import Stopwatch

_LOG_EVERY = 20
_KEEP_CHECKPOINTS = 2
_SHOWN = 16  # images in reconstruction.png

_DECODER = "decoder.safetensors"
_OUTPUTS = (_DECODER, HISTORY, "curve.png", "reconstruction.png")


@dataclass(frozen=True)
class Reconstruction:
    """Mean absolute error of images decoded from noisy latents (Zheng et al. 2025, noise-augmented decoding).

    Attributes:
        noise: largest standard deviation of the noise; each image's is uniform in [0, noise].
        image_mean, image_std: (3,) the pixel normalisation of the encoder, which the decoder's output has.
    """

    seed: int
    noise: float
    image_mean: Tensor
    image_std: Tensor

    def losses(self, model: nn.Module, micro: latents.MicroBatch, inputs: latents.Inputs) -> Tensor:
        """Return the mean absolute error per image, (b,) float32, for pixels in [0, 1]."""
        latent, keys = inputs.latent, micro.key_tensor(inputs.latent.device)
        std = self.noise * rng.uniform(self.seed, "decoder/level", keys).float()
        noise = rng.normal(self.seed, "decoder/noise", keys, tuple(latent.shape[1:]))
        noisy = torch.addcmul(latent, std.view(-1, 1, 1, 1), noise)
        with autocast("auto", noisy.device):
            output = model(noisy.flatten(2).transpose(1, 2))
        images = output.float() * self.image_std[:, None, None] + self.image_mean[:, None, None]
        return (images - inputs.images).abs().flatten(1).mean(1)


def train_decoder(config: StageConfig, listing: Path, encoder_weights: Path, out_dir: Path, ranks: Ranks) -> None:
    """Train a decoder for the latents of an encoder and publish it.

    Raises:
        ValueError: ``image.size`` is not a multiple of the latent's rows, or training meets NaN or Inf.
        KeyboardInterrupt: a signal stopped training; a checkpoint was written first.
    """
    inputs = ranks.from_main(
        lambda: provenance.belong_together(provenance.listing(listing), provenance.encoder(encoder_weights))
    )
    with Context.open(config, ranks, inputs, {name: out_dir / name for name in _OUTPUTS}) as context:
        _train(context, listing, encoder_weights)


def _train(context: Context, listing: Path, encoder_weights: Path) -> None:
    config, ranks, inputs = context.config, context.ranks, context.inputs
    section, size, n_images = config.decoder, config.image.size, len(data.Listing.open(listing))
    budget = {"step": section.steps}
    if runner.restore(context, budget):
        return
    encoder = configured_encoder(config.encoder, encoder_weights, ranks.device)
    plan = latents.BatchPlan(section.seed, n_images, section.global_batch, ranks.rank, ranks.world, section.micro_batch)
    generator = torch.Generator().manual_seed(rng.derive_seed(section.seed, "decoder/init"))
    model = Decoder(_decoder_config(section, encoder, size), generator=generator).to(ranks.device)
    task = Reconstruction(section.seed, section.noise, encoder.image_mean, encoder.image_std)
    optimizer_options = OptimizerOptions(Cosine(section.lr, 0.0, 0, section.horizon), (0.9, 0.95), 0.0, 1.0, None)
    options = LoopOptions(
        section.checkpoint_every,
        _LOG_EVERY,
        _KEEP_CHECKPOINTS,
        remedy=f"Lower decoder.micro_batch (now {section.micro_batch or 'the whole share'}), which changes no result",
    )
    sizes = model.config
    encoding = Stopwatch(ranks.device)
    flops = decoder_flops(section, sizes.latent_dim, sizes.num_patches, sizes.patch_size)
    run = Run("train_decoder", model, task.losses, plan, context.state, ranks, flops=flops, encoding=encoding)
    trainer = Trainer(run, optimizer_options, options)
    if not trainer.resume(section.steps):
        cached = open_cache(context, listing, encoder, encoder_weights, workers=section.workers)
        source = latents.TrainingImages(listing, size, encoding.timed(encoder), cached, section.workers, wanted=True)
        trainer.run(section.steps, latents.TrainingBatches(plan, source, ranks.device))

    def write(finished: Path) -> None:
        """Write the finished decoder, its history and its pictures."""
        publish_history(context.state, trainer.step, finished, "train_decoder")
        save_picture(_reconstructions(listing, size, encoder, model), finished / "reconstruction.png")
        about = {
            "command": "mmfm train_decoder",
            "version": context.version,
            "settings": dict(context.identity),
            "seed": section.seed,
            "digests": inputs.digests,
            "n_images": n_images,
            "steps": trainer.step,
            "loss": read_history(finished / HISTORY)[-1]["loss"],
        }
        save_decoder(model, finished / _DECODER, about)

    runner.finish(context, write, budget)


def _decoder_config(section: config.Decoder, encoder: Encoder, size: int) -> DecoderConfig:
    """Return the sizes of a decoder that turns each position of the latent into one patch of the image."""
    height, width = encoder.grid
    if size % height:
        raise ValueError(
            f"image.size {size} is not a multiple of the latent's {height} rows; take {height * (size // height or 1)}"
        )
    return DecoderConfig(
        encoder.hidden_size, section.hidden_size, section.intermediate_size, section.num_heads, section.num_layers,
        patch_size=size // height, num_patches=height * width,
    )  # fmt: skip


@torch.no_grad()
def _reconstructions(listing: Path, size: int, encoder: Encoder, model: Decoder) -> Any:
    """Draw images spread over the listing, each with its reconstruction."""
    shown = data.evenly(len(data.Listing.open(listing)), _SHOWN).tolist()
    _, images = next(data.image_batches(listing, size, [shown]))
    latent, _ = encoder(data.to_float(images, encoder.image_mean.device))
    return paired_grid(images, rae.to_uint8(rae.RAE(encoder, model.eval()).decode(latent)))
