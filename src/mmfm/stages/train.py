"""``train``: train the flow-matching model of one setting in the latent space.

Reads: the listing with its classes, the images, the encoder and the latent statistics; both mixtures in settings with a
    mixture. Latents come from the latent cache, which it fills first, with mirror images for flips. The decoder, the
    detector and the reference are used for previews and distances only.
Writes: ``ema.safetensors``, ``history.jsonl`` and ``curve.png``; with a decoder ``preview.png``, and ``fid.jsonl`` if
    distances are measured.
Unit of work: an optimiser step; the state holds checkpoints ``step-00000500/``, the history, the curve and previews.
After a kill: training continues from the newest checkpoint. A larger budget (``train.epochs`` or
    ``train.steps``) continues a finished run.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from mmfm import config
from mmfm.autoencoder import rae
from mmfm.autoencoder.decoder import load_decoder
from mmfm.autoencoder.encoders import configured_encoder
from mmfm.config import StageConfig
from mmfm.config.choices import SETTINGS
from mmfm.data.listing import Listing
from mmfm.evaluation.detector import load_detector
from mmfm.generation.generator import Generator
from mmfm.infra import memory
from mmfm.infra.distributed import Ranks
from mmfm.infra.pictures import save_picture
from mmfm.infra.precision import use_deterministic_algorithms, uses_bf16
from mmfm.models.dit import DiT
from mmfm.models.flops import dit_flops
from mmfm.models.weights import save_ema
from mmfm.stages import provenance, runner
from mmfm.stages.cached_latents import open_cache
from mmfm.stages.runner import Context
from mmfm.training import latents, setup
from mmfm.training.fid_curve import FidCurve
from mmfm.training.history import DISTANCES, HISTORY, draw_curve_of, preview_file, publish_history, read_history
from mmfm.training.options import Run
from mmfm.training.previews import generator, measured_images, previewer
from mmfm.training.trainer import Trainer
from mmfm.training.usage import Stopwatch

log = logging.getLogger(__name__)

_WEIGHTS, _PREVIEW = "ema.safetensors", "preview.png"
_OUTPUTS = (_WEIGHTS, HISTORY, "curve.png", DISTANCES, _PREVIEW)

_MEMORY_REMEDY = (
    "The model, its average, the optimiser and the source's means do not fit: set train.means_device to host (which "
    "changes no result), train.means_precision to bf16, or train.sharding to fsdp with several GPUs"
)

Previewer = Callable[[nn.Module], Image.Image]
"""model -> picture of its samples."""


@dataclass(frozen=True)
class TrainFiles:
    """The files that ``train`` reads: the two mixtures in settings with a mixture, the decoder for previews."""

    listing: Path
    encoder_weights: Path
    stats: Path
    gmm: Path | None = None
    spatial_gmm: Path | None = None
    decoder: Path | None = None

    def inputs(self, setting: str) -> provenance.Inputs:
        """Return digests and paths of the files that determine the weights, after checking that they belong together.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a mixture is missing, or two files were made from different images, encoders or mixtures.
        """
        read = [
            provenance.listing(self.listing),
            provenance.encoder(self.encoder_weights),
            provenance.statistics(self.stats),
        ]
        if SETTINGS[setting].mixture:
            if self.gmm is None or self.spatial_gmm is None:
                option = "--gmm" if self.gmm is None else "--spatial-gmm"
                raise ValueError(f"setting '{setting}' draws its source from a mixture: give {option}")
            read += [provenance.mixture(self.gmm), provenance.spatial_mixture(self.spatial_gmm)]
        return provenance.belong_together(*read)


@dataclass(frozen=True)
class DistanceFiles:
    """Detector and reference for distances during training. They do not affect the weights, so no digest covers them.

    Attributes:
        kind: name of the detector; see :func:`mmfm.evaluation.detector.load_detector`.
        weights: weights of the detector.
        reference: reference from fid_reference; it may appear while training runs.
    """

    kind: str
    weights: Path
    reference: Path


def train(
    config: StageConfig, files: TrainFiles, out_dir: Path, ranks: Ranks, distance_files: DistanceFiles | None = None
) -> None:
    """Train the velocity model of a setting and publish its EMA weights.

    Args:
        distance_files: used if ``train.preview.fid_every`` is set and there is a decoder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there is no setting, the inputs do not belong together, or training meets NaN or Inf.
        KeyboardInterrupt: a signal stopped training; a checkpoint was written first.
    """
    setting = config.setting
    if setting is None:
        raise ValueError(f"train needs a setting: give --setting, one of {', '.join(SETTINGS)}")
    inputs = ranks.from_main(lambda: files.inputs(setting))
    if not config.train.preview.fid_every or files.decoder is None:
        distance_files = None
    outputs = {name: out_dir / name for name in _OUTPUTS}
    with Context.open(config, ranks, inputs, outputs, identity(config, setting, ranks.device)) as context:
        _Training(context, files, distance_files).run()


def identity(config: StageConfig, setting: str, device: torch.device) -> dict[str, Any]:
    """Return everything besides the files that determines the weights.

    With ``auto`` precision that includes the device: a run that began in float32 must not continue in bf16.
    """
    found = {"setting": setting, **config.identity()}
    if uses_bf16(config.train.precision, device):
        found["autocast"] = "bf16"
    if SETTINGS[setting].mixture and uses_bf16(config.train.means_precision, device):
        found["means"] = "bf16"
    return found


class _Training:
    """One run up to the configured budget."""

    def __init__(self, context: Context, files: TrainFiles, distance_files: DistanceFiles | None) -> None:
        self.context, self.files, self.distance_files = context, files, distance_files
        self.config, self.ranks, self.state = context.config, context.ranks, context.state
        self.section = section = self.config.train
        self.title = f"train {self.config.setting}"
        if section.deterministic:
            use_deterministic_algorithms()
        n_images, ranks = len(Listing.open(files.listing)), self.ranks
        self.plan = latents.BatchPlan(
            section.seed, n_images, section.global_batch, ranks.rank, ranks.world, section.micro_batch, section.flip
        )
        self.target = section.target_step(self.plan.steps_per_epoch)
        self.budget = {"step": self.target}
        self.encoding = Stopwatch(ranks.device)

    def run(self) -> None:
        """Train the missing steps and publish the weights."""
        beyond = sorted(step for step in self.section.kept_steps(self.plan.steps_per_epoch) if step > self.target)
        if beyond and self.ranks.is_main:
            log.warning("the milestones at steps %s are not reached: training ends at step %d", beyond, self.target)
        wanted = [_PREVIEW] if self.files.decoder else []
        if self.is_measured() and runner.restore(self.context, self.budget, wanted):
            return
        with memory.explained(_MEMORY_REMEDY):
            self.load()
            preview = previewer(self.generator("preview"), self.task) if self.files.decoder else None
            trainer = self.trainer(preview)
            finished = trainer.resume(self.target)
        if not finished:
            trainer.run(self.target, self.batches())
        elif trainer.owes(self.target):
            trainer.run(self.target, None)
        average = trainer.average()
        assert isinstance(average, DiT)  # the trainer averages any module; this one is of setup.model
        runner.finish(self.context, lambda finished: self.write(finished, average, trainer.step), self.budget)
        if preview is not None:
            self.ranks.from_main(lambda: self.add_preview(preview, average))

    def is_measured(self) -> bool:
        """Whether the published results include the distance of the last step, if one is wanted; a collective call."""
        if self.distance_files is None:
            return True
        published = self.state / "finished" / DISTANCES
        return self.ranks.from_main(lambda: any(line["step"] == self.target for line in read_history(published)))

    def load(self) -> None:
        """Load the autoencoder and build the loss, with its source, and the model."""
        device, decoder_path = self.ranks.device, self.files.decoder
        encoder = configured_encoder(self.config.encoder, self.files.encoder_weights, device)
        self.latent_shape = (encoder.hidden_size, *encoder.grid)
        decoder = load_decoder(decoder_path, device, latent_dim=encoder.hidden_size) if decoder_path else None
        self.autoencoder = rae.RAE(encoder, decoder, *rae.load_statistics(self.files.stats, self.latent_shape))
        if decoder_path:
            self.autoencoder.require_image_size(self.config.image.size, decoder_path)
        self.task = setup.flow_matching(
            self.config, self.files.listing, self.files.gmm, self.files.spatial_gmm, self.latent_shape,
            self.plan.steps_per_epoch, device,
        )  # fmt: skip
        self.model = setup.model(self.task, self.config.model, self.latent_shape).to(device)

    def generator(self, purpose: str) -> Generator:
        """Return the generator of images for previews or distances."""
        return generator(self.task, self.autoencoder, self.latent_shape, self.ranks.device, purpose)

    def fid_curve(self, files: DistanceFiles) -> FidCurve:
        """Return what measures distances during training."""
        size = self.config.image.size
        detector = load_detector(files.kind, files.weights, self.ranks.device)
        listing = self.context.inputs.digests["listing"]
        return FidCurve(
            detector,
            lambda: provenance.reference_for(files.reference, detector, size, "the decoder's images", listing),
            measured_images(self.generator("fid_curve"), self.task),
            self.section.preview,
            self.state,
            self.title,
            self.ranks,
        )

    def trainer(self, preview: Previewer | None) -> Trainer:
        """Return the optimiser's loop."""
        optimizer_options = setup.optimizer_options(self.section, self.plan.steps_per_epoch)
        options = setup.loop_options(self.section, self.plan.steps_per_epoch)
        draw_preview = functools.partial(self.draw_preview, preview) if preview else None
        distances = self.fid_curve(self.distance_files) if self.distance_files else None
        channels, height, width = self.latent_shape
        run = Run(
            "train", self.model, self.task.losses, self.plan, self.state, self.ranks, self.task.weighting,
            dit_flops(self.config.model, height * width, channels), self.encoding,
        )  # fmt: skip
        return Trainer(run, optimizer_options, options, draw_preview, distances)

    def draw_preview(self, preview: Previewer, average: nn.Module, step: int) -> None:
        """Draw the preview of a step and the learning curve into the state."""
        save_picture(preview(average), preview_file(self.state, step))
        draw_curve_of(self.state, step, self.state / "curve.png", self.title)

    def batches(self) -> latents.TrainingBatches:
        """Return the latents and tokens of every step; a collective call."""
        listing, autoencoder, workers = self.files.listing, self.autoencoder, self.section.workers
        cached = open_cache(
            self.context, listing, autoencoder.encoder, self.files.encoder_weights, autoencoder.normalise,
            views=self.plan.views, workers=workers,
        )  # fmt: skip
        encode = self.encoding.timed(autoencoder.encode)
        source = latents.TrainingImages(listing, self.config.image.size, encode, cached, workers)
        return latents.TrainingBatches(self.plan, source, self.ranks.device)

    def write(self, finished: Path, average: DiT, step: int) -> None:
        """Write weights, history and curve."""
        publish_history(self.state, step, finished, self.title)
        about = {
            "setting": self.config.setting,
            "encoder": config.keys_of_kind(self.config.encoder, "identity"),
            "latent_shape": list(self.latent_shape),
            "step": step,
            "epochs": latents.epochs_after(step, self.plan.steps_per_epoch),
            "seed": self.plan.seed,
            "images_seen": step * self.plan.global_batch,
            "settings": replace(self.config, setting=None).identity(),
            "digests": self.context.inputs.digests,
            **self.context.inputs.made_from(),
        }
        save_ema(finished / _WEIGHTS, average, about)

    def add_preview(self, preview: Previewer, average: nn.Module) -> None:
        """Publish the preview of the final weights. They are published already, in case it does not fit into memory."""
        try:
            with memory.explained("Lower train.preview.n_images"):
                picture = preview(average)
            runner.amend(self.context, lambda finished: save_picture(picture, finished / _PREVIEW))
        except (ValueError, OSError, RuntimeError) as error:
            log.warning("the weights are published, but without %s: %s", _PREVIEW, error)
