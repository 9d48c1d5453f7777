"""Flow matching in the latent space: the stage ``train``."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmfm import config, rae
from mmfm.data import Listing
from mmfm.decoder import load_decoder
from mmfm.encoders import load_encoder
from mmfm.flow import path as flow
from mmfm.flow.source import source_for
from mmfm.infra import memory, rng, stage_state
from mmfm.infra.distributed import Ranks
from mmfm.infra.precision import uses_bf16
from mmfm.mixture.gaussian import Mixture
from mmfm.models.dit import DiT, DiTConfig
from mmfm.pictures import save_picture
from mmfm.settings import SETTINGS, effective
from mmfm.training import latents, outputs
from mmfm.training.fid_curve import DistanceFiles
from mmfm.training.history import draw_curve_of, preview_file
from mmfm.training.inputs import TrainFiles, image_classes
from mmfm.training.looks import fid_curve, previewer
from mmfm.training.objective import FlowMatching
from mmfm.training.recipe import Recipe, Routine
from mmfm.training.schedule import ConstantThenLinear, Cosine
from mmfm.training.trainer import Trainer
from mmfm.training.weighting import LossWeighting

log = logging.getLogger(__name__)

_ROOM = (
    "Model, average, optimiser and the source's means do not fit: set train.means_device to host (changes no result), "
    "train.means_precision to bf16, or take train.sharding fsdp with several GPUs"
)


def train(
    setting: str, files: TrainFiles, sections: dict[str, Any], version: int, out_dir: Path, ranks: Ranks,
    distance_files: DistanceFiles | None = None,
) -> None:  # fmt: skip
    """Train the velocity model of one setting and publish its EMA weights; contract in docs/stages.md.

    Args:
        setting: name in :data:`mmfm.settings.SETTINGS`.
        sections: built sections ``image``, ``encoder``, ``model``, ``train``.
        version: of the stage.
        out_dir: gets ``ema.safetensors``, ``history.jsonl``, ``curve.png`` and, with a decoder, ``preview.png``; with
            distances ``fid.jsonl``.
        distance_files: what these are measured with, where ``train.preview.fid_every`` asks for them and there is a
            decoder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: inputs that do not belong together, an impossible setting, or NaN or Inf in training.
        KeyboardInterrupt: stopped by a signal, after a checkpoint.
    """
    settings: config.Train = sections["train"]
    digests = ranks.from_main(lambda: files.digests(setting))
    identity = {"setting": setting, **effective(setting, config.identity(sections))}
    if uses_bf16(settings.precision, ranks.device):  # `auto` must not continue a float32 run in bf16
        identity["autocast"] = "bf16"
    if SETTINGS[setting].mixture and uses_bf16(settings.means_precision, ranks.device):
        identity["means"] = "bf16"
    state = ranks.from_main(
        lambda: stage_state.state_directory(
            out_dir / "ema.safetensors", "train", version, identity, digests, files.paths
        )
    )
    beyond = [epoch for epoch in settings.milestones if epoch > settings.epochs]
    if beyond and ranks.is_main:
        log.warning("train.milestones %s are not reached: train.epochs is %d", beyond, settings.epochs)
    n_images = len(Listing.open(files.listing))
    plan = latents.Plan(
        settings.seed, n_images, settings.global_batch, ranks.rank, ranks.world, settings.micro_batch, settings.flip
    )
    target = settings.epochs * plan.steps_per_epoch
    measures = bool(settings.preview.fid_every and distance_files is not None and files.decoder is not None)
    if ranks.from_main(lambda: outputs.in_place(out_dir, state, target, bool(files.decoder), measures)):
        return
    with memory.explained(_ROOM):
        autoencoder = _load_autoencoder(files, sections["encoder"], ranks.device)
        latent_shape = (autoencoder.encoder.hidden_size, *autoencoder.encoder.grid)
        if files.decoder:
            autoencoder.require_image_size(sections["image"].size, files.decoder)
        task = _build_task(setting, files, settings, latent_shape, ranks.device)
        task = replace(task, weighting=_build_weighting(task, plan.steps_per_epoch, ranks.device))
        model = _build_model(task, sections["model"], latent_shape).to(ranks.device)
    preview = previewer(task, autoencoder, latent_shape, settings.preview)
    distances = None
    if measures:
        distances = fid_curve(task, autoencoder, latent_shape, distance_files, digests["listing"], state, ranks)

    def draw_preview(average: nn.Module, step: int) -> None:
        save_picture(preview(average), preview_file(state, step))
        draw_curve_of(state, step, state / "curve.png", f"train {setting}")

    with memory.explained(_ROOM):
        trainer = Trainer(
            "train", model, task.losses, plan, _recipe(settings, plan.steps_per_epoch),
            _routine(settings, plan.steps_per_epoch), state, ranks, draw_preview if files.decoder else None,
            task.weighting, distances,
        )  # fmt: skip
        finished = trainer.resume(target)
    if not finished:
        feed = latents.feed(
            plan, files.listing, sections["image"].size, autoencoder.encode, latent_shape, ranks,
            stage="train", workers=settings.workers, cache_gb=settings.latent_cache_gb,
        )  # fmt: skip
        trainer.run(target, feed)
    elif trainer.owes(target):
        trainer.run(target, None)
    provenance = _provenance(setting, sections, latent_shape, digests, plan, trainer.step)
    average = trainer.average()
    ranks.from_main(lambda: outputs.publish(out_dir, state, average, provenance, preview if files.decoder else None))


def _load_autoencoder(files: TrainFiles, encoder: config.Encoder, device: torch.device) -> rae.RAE:
    frozen = load_encoder(encoder.family, files.encoder_weights, encoder.input_size, device)
    latent_shape = (frozen.hidden_size, *frozen.grid)
    decoder = load_decoder(files.decoder, device, latent_dim=latent_shape[0]) if files.decoder else None
    return rae.RAE(frozen, decoder, *rae.load_statistics(files.stats, latent_shape))


def _build_task(
    setting: str, files: TrainFiles, settings: config.Train, latent_shape: tuple[int, int, int], device: torch.device
) -> FlowMatching:
    source = source_for(
        setting,
        files.spatial_gmm,
        device,
        means_device="cpu" if settings.means_device == "host" else device,
        dtype=torch.bfloat16 if uses_bf16(settings.means_precision, device) else torch.float32,
    )
    mixture = Mixture.load(files.gmm, device) if SETTINGS[setting].mixture else None
    if mixture is not None:
        mixture.posterior(mixture.means[:1].float())  # makes its tables now: the steps are not to wait for the device
        # Imported files carry no digests by which they could be told apart.
        found = (mixture.n_components, mixture.dimension, tuple(source.means.shape[1:]))
        wanted = (source.num_modes, latent_shape[0], latent_shape)
        if found != wanted:
            raise ValueError(
                f"{files.gmm} ({found[0]} modes, tokens of {found[1]}) and {files.spatial_gmm} ({wanted[0]} modes, "
                f"latents {found[2]}) do not fit each other or the encoder's latents {latent_shape}; make both for it"
            )
    weighted = settings.loss_weighting.rule != "none" and settings.loss_weighting.by == "class"
    needed = weighted or SETTINGS[setting].condition == "class"
    classes = image_classes(Listing.open(files.listing)) if needed else None
    return FlowMatching(setting, source, mixture, settings, flow.time_shift(latent_shape), classes)


def _build_weighting(task: FlowMatching, steps_per_epoch: int, device: torch.device) -> LossWeighting | None:
    settings = task.settings.loss_weighting
    if settings.rule == "none":
        return None
    labels = task.classes[1] if settings.by == "class" else task.source.num_modes
    if not labels:
        raise ValueError(
            f"train.loss_weighting.by is mode, but the setting '{task.setting}' has no modes; set it to class, or "
            "train.loss_weighting.rule to none"
        )
    return LossWeighting(settings, labels, settings.warmup_epochs * steps_per_epoch, device)


def _build_model(task: FlowMatching, sizes: config.Model, latent_shape: tuple[int, int, int]) -> DiT:
    """The initial model: the same for every process, as its weights come from the seed."""
    dit = DiTConfig(
        input_size=latent_shape[1], patch_size=1, in_channels=latent_shape[0], hidden_size=sizes.hidden_size,
        depth=sizes.depth, num_heads=sizes.num_heads, num_classes=task.num_labels, label_dropout=task.label_dropout,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(rng.derive_seed(task.settings.seed, "train/init"))
    return DiT(dit, checkpoint_activations=task.settings.checkpoint_activations, generator=generator)


def _recipe(settings: config.Train, steps_per_epoch: int) -> Recipe:
    constant, end = settings.constant_epochs * steps_per_epoch, settings.decay_end_epoch * steps_per_epoch
    if settings.schedule == "cosine":
        lr: Callable[[int], float] = Cosine(settings.lr, end, settings.final_lr, constant)
    else:
        lr = ConstantThenLinear(settings.lr, settings.final_lr, constant, end)
    return Recipe(lr, settings.betas, settings.weight_decay, settings.clip_norm, settings.ema_decay)


def _routine(settings: config.Train, steps_per_epoch: int) -> Routine:
    remedy = f"Lower train.micro_batch (now {settings.micro_batch or 'the whole share'})"
    if not settings.checkpoint_activations:
        remedy += ", set train.checkpoint_activations"
    if settings.sharding != "fsdp":
        remedy += ", take train.sharding fsdp with several GPUs"
    return Routine(
        settings.checkpoint_every, settings.log_every, settings.keep_checkpoints, settings.preview.every,
        settings.compile, settings.sharding, frozenset(epoch * steps_per_epoch for epoch in settings.milestones),
        settings.logger, f"{remedy}, or lower train.latent_cache_gb; none of them changes the results",
    )  # fmt: skip


def _provenance(
    setting: str, sections: dict[str, Any], latent_shape: tuple[int, int, int], digests: dict[str, str],
    plan: latents.Plan, step: int,
) -> dict[str, Any]:  # fmt: skip
    return {
        "setting": setting,
        "encoder": config.keys_of_kind(sections["encoder"], "identity"),
        "latent_shape": list(latent_shape),
        "step": step,
        "epochs": step // plan.steps_per_epoch,
        "seed": plan.seed,
        "images_seen": step * plan.global_batch,
        "settings": config.identity(sections),
        "digests": digests,
        **{f"{name}_digest": digest for name, digest in digests.items()},
    }
