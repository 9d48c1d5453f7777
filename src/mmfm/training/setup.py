"""Builds loss, model and options of a training run from the configuration and files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mmfm.config import Model, StageConfig, Train
from mmfm.config.choices import SCHEDULES, SETTINGS
from mmfm.data.listing import Listing
from mmfm.flow.path import time_shift
from mmfm.flow.source import MixtureSource, source_for
from mmfm.infra import rng
from mmfm.mixture.gaussian import Mixture
from mmfm.models.dit import DiT, DiTConfig
from mmfm.training.objective import FlowMatching
from mmfm.training.options import LoopOptions, OptimizerOptions
from mmfm.training.schedule import Phased
from mmfm.training.weighting import LossWeighting


def flow_matching(
    config: StageConfig,
    listing: Path,
    gmm: Path | None,
    spatial_gmm: Path | None,
    latent_shape: tuple[int, int, int],
    steps_per_epoch: int,
    device: torch.device,
) -> FlowMatching:
    """Return the loss of a setting with its source, mixture and loss weights.

    Args:
        listing: provides the images' classes, if they are used.
        gmm, spatial_gmm: the mixtures, in the settings with a mixture.
        latent_shape: (C, H, W).

    Raises:
        ValueError: the mixtures do not match, class labels are invalid, or losses are to be weighted by mode in a
            setting without modes.
    """
    setting, train = config.setting, config.train
    if setting is None:
        raise ValueError(f"no setting to train in; give one of {', '.join(SETTINGS)}")
    source = source_for(setting, spatial_gmm, device, means_device=train.means_device, precision=train.means_precision)
    mixture = None
    if isinstance(source, MixtureSource):
        if gmm is None:
            raise ValueError(f"setting '{setting}' draws its source from a mixture: give --gmm")
        mixture = Mixture.load(gmm, device)
        mixture.posterior(mixture.means[:1].float())  # builds its tables now: training steps must not wait for them
        # Imported files have no digests to compare.
        found = (mixture.n_components, mixture.dimension, tuple(source.means.shape[1:]))
        expected = (source.num_modes, latent_shape[0], latent_shape)
        if found != expected:
            raise ValueError(
                f"{gmm} ({found[0]} modes, tokens of {found[1]}) and {spatial_gmm} ({expected[0]} modes, latents "
                f"{found[2]}) do not fit each other or the encoder's latents {latent_shape}; make both for this encoder"
            )
    weighted = train.loss_weighting.rule != "none" and train.loss_weighting.by == "class"
    needed = weighted or SETTINGS[setting].condition == "class"
    classes = image_classes(Listing.open(listing)) if needed else None
    task = FlowMatching(setting, source, mixture, train, time_shift(latent_shape), classes)
    return replace(task, weighting=_weighting(task, steps_per_epoch, device))


def _weighting(task: FlowMatching, steps_per_epoch: int, device: torch.device) -> LossWeighting | None:
    weighting = task.config.loss_weighting
    if weighting.rule == "none":
        return None
    num_labels = task.count(weighting.by)
    if not num_labels:
        raise ValueError(
            f"train.loss_weighting.by is mode, but the setting '{task.setting}' has no modes; set it to class, or "
            "train.loss_weighting.rule to none"
        )
    warmup_steps = weighting.warmup_steps or weighting.warmup_epochs * steps_per_epoch
    return LossWeighting(weighting, num_labels, warmup_steps, device)


def image_classes(listing: Listing) -> tuple[Tensor, int]:
    """Return the class of every image, (N,) int64 on the CPU, and the number of classes.

    Raises:
        ValueError: a label is not a class of the listing, or there is only one class.
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
    """Return the model with its initial weights, which depend on the seed."""
    dit = DiTConfig(
        input_size=latent_shape[1],
        patch_size=1,
        in_channels=latent_shape[0],
        hidden_size=sizes.hidden_size,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        num_classes=task.num_labels,
        label_dropout=task.label_dropout,
    )
    generator = torch.Generator().manual_seed(rng.derive_seed(task.config.seed, "train/init"))
    return DiT(
        dit, checkpoint_activations=task.config.checkpoint_activations, init=task.config.init, generator=generator
    )


def optimizer_options(train: Train, steps_per_epoch: int) -> OptimizerOptions:
    """Return the options of the optimiser."""
    phase = train.initial_phase
    initial, end = phase.epochs * steps_per_epoch, train.decay_end_epoch * steps_per_epoch
    constant = max(train.constant_epochs * steps_per_epoch, initial)
    falling: Callable[[int], float] = SCHEDULES[train.schedule].load()(train.lr, train.final_lr, constant, end)
    lr, decay = Phased(phase.lr, initial, falling), Phased(phase.ema_decay, initial, lambda step: train.ema_decay)
    return OptimizerOptions(lr, train.betas, train.weight_decay, train.clip_norm, decay)


def loop_options(train: Train, steps_per_epoch: int) -> LoopOptions:
    """Return the options of the training loop."""
    remedy = f"Lower train.micro_batch (now {train.micro_batch or 'the whole share'})"
    if not train.checkpoint_activations:
        remedy += ", set train.checkpoint_activations"
    if train.sharding != "fsdp":
        remedy += ", or set train.sharding to fsdp with several GPUs"
    return LoopOptions(
        train.checkpoint_every,
        train.log_every,
        train.keep_checkpoints,
        train.preview.every,
        train.compile,
        train.sharding,
        train.kept_steps(steps_per_epoch),
        train.logger,
        train.profile,
        f"{remedy}; that changes no result",
    )
