"""From configuration and files to what is trained: source, coupling, loss, model, optimiser."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mmfm.config import Model, StageConfig, Train
from mmfm.config.choices import SCHEDULES, SETTINGS
from mmfm.data.listing import Listing
from mmfm.flow.path import time_shift
from mmfm.flow.source import source_for
from mmfm.infra import rng
from mmfm.mixture.gaussian import Mixture
from mmfm.models.dit import DiT, DiTConfig
from mmfm.training.objective import FlowMatching
from mmfm.training.options import LoopOptions, OptimizerOptions
from mmfm.training.weighting import LossWeighting


def flow_matching(
    config: StageConfig, listing: Path, gmm: Path | None, spatial_gmm: Path | None,
    latent_shape: tuple[int, int, int], steps_per_epoch: int, device: torch.device,
) -> FlowMatching:  # fmt: skip
    """Return the loss of a setting, with its source, coupling and weights.

    Args:
        listing: whose classes are the labels, where any are used.
        gmm, spatial_gmm: the mixtures, in the settings with one.
        latent_shape: (C, H, W).

    Raises:
        ValueError: mixtures that do not fit each other, labels that are none, or weights by modes where there are none.
    """
    setting, settings = config.setting, config.train
    source = source_for(
        setting, spatial_gmm, device, means_device=settings.means_device, precision=settings.means_precision
    )
    mixture = Mixture.load(gmm, device) if SETTINGS[setting].mixture else None
    if mixture is not None:
        mixture.posterior(mixture.means[:1].float())  # makes its tables now: the steps must not wait for the device
        # Imported files carry no digests by which they could be told apart.
        found = (mixture.n_components, mixture.dimension, tuple(source.means.shape[1:]))
        wanted = (source.num_modes, latent_shape[0], latent_shape)
        if found != wanted:
            raise ValueError(
                f"{gmm} ({found[0]} modes, tokens of {found[1]}) and {spatial_gmm} ({wanted[0]} modes, latents "
                f"{found[2]}) do not fit each other or the encoder's latents {latent_shape}; make both for it"
            )
    weighted = settings.loss_weighting.rule != "none" and settings.loss_weighting.by == "class"
    needed = weighted or SETTINGS[setting].condition == "class"
    classes = image_classes(Listing.open(listing)) if needed else None
    task = FlowMatching(setting, source, mixture, settings, time_shift(latent_shape), classes)
    return replace(task, weighting=_weighting(task, steps_per_epoch, device))


def _weighting(task: FlowMatching, steps_per_epoch: int, device: torch.device) -> LossWeighting | None:
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


def image_classes(listing: Listing) -> tuple[Tensor, int]:
    """Return the class of every image, (N,) int64 on the CPU, and the number of classes.

    Raises:
        ValueError: labels that name no class of the listing, or one class only.
    """
    labels, count = torch.from_numpy(listing.labels.astype("int64")), len(listing.classes)
    if count < 2:
        raise ValueError(
            f"the images of '{listing.root}' are of one class; class labels need at least two class folders in "
            "data.root: sort the images into folders, or choose a setting without classes"
        )
    outside = ((labels < 0) | (labels >= count)).nonzero()
    if len(outside):
        image = int(outside[0])
        raise ValueError(
            f"image {image} of the listing has label {int(labels[image])}, but there are {count} classes (labels 0 to "
            f"{count - 1}); run list_images again"
        )
    return labels, count


def model(task: FlowMatching, sizes: Model, latent_shape: tuple[int, int, int]) -> DiT:
    """Return the initial model, whose weights come from the seed."""
    dit = DiTConfig(
        input_size=latent_shape[1], patch_size=1, in_channels=latent_shape[0], hidden_size=sizes.hidden_size,
        depth=sizes.depth, num_heads=sizes.num_heads, num_classes=task.num_labels, label_dropout=task.label_dropout,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(rng.derive_seed(task.settings.seed, "train/init"))
    return DiT(dit, checkpoint_activations=task.settings.checkpoint_activations, generator=generator)


def optimizer_options(settings: Train, steps_per_epoch: int) -> OptimizerOptions:
    """Return what the optimiser does."""
    constant, end = settings.constant_epochs * steps_per_epoch, settings.decay_end_epoch * steps_per_epoch
    lr: Callable[[int], float] = SCHEDULES[settings.schedule].load()(settings.lr, settings.final_lr, constant, end)
    return OptimizerOptions(lr, settings.betas, settings.weight_decay, settings.clip_norm, settings.ema_decay)


def loop_options(settings: Train, steps_per_epoch: int) -> LoopOptions:
    """Return how often the run does what changes no number."""
    remedy = f"Lower train.micro_batch (now {settings.micro_batch or 'the whole share'})"
    if not settings.checkpoint_activations:
        remedy += ", set train.checkpoint_activations"
    if settings.sharding != "fsdp":
        remedy += ", take train.sharding fsdp with several GPUs"
    return LoopOptions(
        settings.checkpoint_every, settings.log_every, settings.keep_checkpoints, settings.preview.every,
        settings.compile, settings.sharding, frozenset(epoch * steps_per_epoch for epoch in settings.milestones),
        settings.logger, f"{remedy}, or lower train.latent_cache_gb; none of them changes the results",
    )  # fmt: skip
