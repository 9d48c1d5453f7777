"""Training the decoder: the stage ``train_decoder``."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfm import config, data, rae
from mmfm.decoder import Decoder, DecoderConfig, save_decoder
from mmfm.encoders import Encoder, load_encoder
from mmfm.infra import rng, stage_state, store
from mmfm.infra.distributed import Ranks
from mmfm.infra.precision import autocast
from mmfm.pictures import paired_grid, save_picture
from mmfm.training import latents
from mmfm.training.history import publish_history, read_history
from mmfm.training.recipe import Recipe, Routine
from mmfm.training.schedule import Cosine
from mmfm.training.trainer import Trainer

_LOG_EVERY = 20
_KEEP_CHECKPOINTS = 2
_SHOWN = 16


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


def train_decoder(
    listing: Path,
    encoder_weights: Path,
    sections: dict[str, Any],
    version: int,
    out_dir: Path,
    ranks: Ranks,
) -> None:
    """Train a decoder for an encoder's latents and publish it; contract in docs/stages.md.

    Args:
        sections: built sections ``image``, ``encoder``, ``decoder``.
        version: of the stage.
        out_dir: gets ``decoder.safetensors``, ``history.jsonl``, ``curve.png`` and ``reconstruction.png``.

    Raises:
        ValueError: an image size that the latent's grid does not divide, or NaN or Inf in training.
        KeyboardInterrupt: stopped by a signal, after a checkpoint.
    """
    settings: config.Decoder = sections["decoder"]
    n_images, size = len(data.Listing.open(listing)), sections["image"].size
    digests = {"listing": data.Listing.open(listing).digest, "encoder": store.folder_digest(encoder_weights)}
    identity = config.identity(sections)
    state = ranks.from_main(
        lambda: stage_state.state_directory(
            out_dir / "decoder.safetensors",
            "train_decoder",
            version,
            identity,
            digests,
            {"listing": listing, "encoder": encoder_weights},
        )
    )
    encoder = load_encoder(sections["encoder"].family, encoder_weights, sections["encoder"].input_size, ranks.device)
    plan = latents.Plan(settings.seed, n_images, settings.global_batch, ranks.rank, ranks.world, settings.micro_batch)
    generator = torch.Generator().manual_seed(rng.derive_seed(settings.seed, "decoder/init"))
    model = Decoder(_sizes(settings, encoder, size), generator=generator).to(ranks.device)
    task = Reconstruction(settings.seed, settings.noise, encoder.image_mean, encoder.image_std)
    recipe = Recipe(Cosine(settings.lr, settings.horizon), (0.9, 0.95), 0.0, 1.0, None)
    routine = Routine(
        settings.checkpoint_every, _LOG_EVERY, _KEEP_CHECKPOINTS,
        remedy=f"Lower decoder.micro_batch (now {settings.micro_batch or 'the whole share'})"
        " or decoder.latent_cache_gb; neither changes the results",
    )  # fmt: skip
    trainer = Trainer("train_decoder", model, task.losses, plan, recipe, routine, state, ranks)
    if not trainer.resume(settings.steps):
        shape = (encoder.hidden_size, *encoder.grid)
        feed = latents.feed(
            plan, listing, size, encoder, shape, ranks,
            stage="train_decoder", workers=settings.workers, cache_gb=settings.latent_cache_gb, keep_images=True,
        )  # fmt: skip
        trainer.run(settings.steps, feed)

    def publish() -> None:
        publish_history(state, trainer.step, out_dir, "train_decoder")
        save_picture(_reconstructions(listing, size, encoder, model), out_dir / "reconstruction.png")
        last = read_history(out_dir / "history.jsonl")[-1]
        provenance = {
            "command": "mmfm train_decoder",
            "version": version,
            "settings": identity,
            "seed": settings.seed,
            "digests": digests,
            "n_images": n_images,
            "steps": trainer.step,
            "loss": last["loss"],
        }
        save_decoder(model, out_dir / "decoder.safetensors", provenance)

    ranks.from_main(publish)


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
