"""``train``: flow matching in the latent space, in one setting.

Reads the listing with its classes, the images, encoder and latent statistics; in the settings with a mixture both
mixtures. Writes ``ema.safetensors``, ``history.jsonl``, ``curve.png``; with a decoder ``preview.png``, and where
distances are measured ``fid.jsonl``.

The unit of work is an optimiser step. The state keeps checkpoints ``step-00000500/``, the history and pictures as they
grow: a kill loses the steps since the newest checkpoint, and more epochs go on from the last one.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from mmfm import config
from mmfm.autoencoder import rae
from mmfm.autoencoder.decoder import load_decoder
from mmfm.autoencoder.encoders import load_encoder
from mmfm.config import StageConfig
from mmfm.config.choices import SETTINGS
from mmfm.data.listing import Listing
from mmfm.evaluation.detector import load_detector
from mmfm.generation.generator import Generator
from mmfm.infra import memory
from mmfm.infra.distributed import Ranks
from mmfm.infra.pictures import save_picture
from mmfm.models.weights import save_ema
from mmfm.stages import provenance, runner
from mmfm.stages.runner import Context
from mmfm.training import latents, setup
from mmfm.training.fid_curve import FidCurve
from mmfm.training.history import DISTANCES, HISTORY, draw_curve_of, preview_file, publish_history, read_history
from mmfm.training.previews import generator, measured_images, previewer
from mmfm.training.trainer import Trainer

log = logging.getLogger(__name__)

_WEIGHTS, _PREVIEW = "ema.safetensors", "preview.png"
_OUTPUTS = (_WEIGHTS, HISTORY, "curve.png", DISTANCES, _PREVIEW)

_ROOM = (
    "Model, average, optimiser and the source's means do not fit: set train.means_device to host (changes no result), "
    "train.means_precision to bf16, or take train.sharding fsdp with several GPUs"
)


@dataclass(frozen=True)
class TrainFiles:
    """Files that ``train`` reads; the two mixtures in the settings with a mixture, the decoder for previews."""

    listing: Path
    encoder_weights: Path
    stats: Path
    gmm: Path | None = None
    spatial_gmm: Path | None = None
    decoder: Path | None = None

    def inputs(self, setting: str) -> provenance.Inputs:
        """Return digests and places of what the weights depend on, after checking that it belongs together.

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
            for name, path in (("--gmm", self.gmm), ("--spatial-gmm", self.spatial_gmm)):
                if path is None:
                    raise ValueError(f"setting '{setting}' draws its source from a mixture: give {name}")
            read += [provenance.mixture(self.gmm), provenance.spatial_mixture(self.spatial_gmm)]
        return provenance.belong_together(*read)


@dataclass(frozen=True)
class DistanceFiles:
    """What distances are measured with. No input of the weights, so in no digest of them.

    Attributes:
        kind: of the detector, see :func:`mmfm.evaluation.detector.load_detector`.
        weights: the detector's file.
        reference: from fid_reference; it may come while training runs.
    """

    kind: str
    weights: Path
    reference: Path


def train(
    config: StageConfig, files: TrainFiles, out_dir: Path, ranks: Ranks, distance_files: DistanceFiles | None = None
) -> None:
    """Train the velocity model of a setting and publish its EMA weights.

    Args:
        distance_files: what distances are measured with, where ``train.preview.fid_every`` asks for them and there is
            a decoder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: inputs that do not belong together, an impossible setting, or NaN or Inf in training.
        KeyboardInterrupt: stopped by a signal, after a checkpoint.
    """
    inputs = ranks.from_main(lambda: files.inputs(config.setting))
    identity = provenance.training_identity(config, ranks.device)
    if not config.train.preview.fid_every or files.decoder is None:
        distance_files = None
    outputs = {name: out_dir / name for name in _OUTPUTS}
    with Context.open(config, ranks, inputs, outputs, identity) as context:
        _Training(context, files, distance_files).run()


class _Training:
    """One run to a number of epochs."""

    def __init__(self, context: Context, files: TrainFiles, distance_files: DistanceFiles | None) -> None:
        self.context, self.files, self.distance_files = context, files, distance_files
        self.config, self.ranks, self.state = context.config, context.ranks, context.state
        self.settings = self.config.train
        self.title = f"train {self.config.setting}"
        s, n_images = self.settings, len(Listing.open(files.listing))
        self.plan = latents.BatchPlan(
            s.seed, n_images, s.global_batch, self.ranks.rank, self.ranks.world, s.micro_batch, s.flip
        )
        self.target = s.epochs * self.plan.steps_per_epoch
        self.budget = {"step": self.target}

    def run(self) -> None:
        """Train what is missing, and publish."""
        beyond = [epoch for epoch in self.settings.milestones if epoch > self.settings.epochs]
        if beyond and self.ranks.is_main:
            log.warning("train.milestones %s are not reached: train.epochs is %d", beyond, self.settings.epochs)
        wanted = [_PREVIEW] if self.files.decoder else []
        if self.is_measured() and runner.restore(self.context, self.budget, wanted):
            return
        with memory.explained(_ROOM):
            self.load()
            trainer = self.trainer()
            finished = trainer.resume(self.target)
        if not finished:
            trainer.run(self.target, self.batches())
        elif trainer.owes(self.target):
            trainer.run(self.target, None)
        average = trainer.average()
        runner.finish(self.context, lambda finished: self.write(finished, average, trainer.step), self.budget)
        if self.preview is not None:
            self.ranks.from_main(lambda: self.add_preview(average))

    def is_measured(self) -> bool:
        """Whether no distance of the last step is missing from what is published; a collective call."""
        if self.distance_files is None:
            return True
        published = self.state / "finished" / DISTANCES
        return self.ranks.from_main(lambda: any(line["step"] == self.target for line in read_history(published)))

    def load(self) -> None:
        """Load the autoencoder, build source, loss and model."""
        self.autoencoder = self.load_autoencoder()
        encoder = self.autoencoder.encoder
        self.latent_shape = (encoder.hidden_size, *encoder.grid)
        if self.files.decoder:
            self.autoencoder.require_image_size(self.config.image.size, self.files.decoder)
        self.task = setup.flow_matching(
            self.config, self.files.listing, self.files.gmm, self.files.spatial_gmm, self.latent_shape,
            self.plan.steps_per_epoch, self.ranks.device,
        )  # fmt: skip
        self.model = setup.model(self.task, self.config.model, self.latent_shape).to(self.ranks.device)
        self.preview = self.distances = None
        if self.files.decoder:
            self.preview = previewer(self.generator("preview"), self.task)
        if self.distance_files is not None:
            self.distances = self.fid_curve(self.distance_files)

    def load_autoencoder(self) -> rae.RAE:
        """The frozen encoder, its statistics and, where there is one, the decoder."""
        about, device = self.config.encoder, self.ranks.device
        frozen = load_encoder(about.family, self.files.encoder_weights, about.input_size, device)
        latent_shape = (frozen.hidden_size, *frozen.grid)
        decoder = None
        if self.files.decoder:
            decoder = load_decoder(self.files.decoder, device, latent_dim=latent_shape[0])
        return rae.RAE(frozen, decoder, *rae.load_statistics(self.files.stats, latent_shape))

    def generator(self, purpose: str) -> Generator:
        """What previews and distances are generated with."""
        return generator(self.task, self.autoencoder, self.latent_shape, self.ranks.device, purpose)

    def fid_curve(self, files: DistanceFiles) -> FidCurve:
        """What measures distances as the run goes."""
        size = self.latent_shape[1] * self.autoencoder.decoder.config.patch_size
        detector = load_detector(files.kind, files.weights, self.ranks.device)
        listing = self.context.inputs.digests["listing"]
        return FidCurve(
            detector,
            lambda: provenance.reference_for(files.reference, detector, size, "the decoder's images", listing),
            measured_images(self.generator("fid_curve"), self.task),
            self.settings.preview,
            self.state,
            self.title,
            self.ranks,
        )

    def trainer(self) -> Trainer:
        """The optimiser's loop."""
        optimizer_options = setup.optimizer_options(self.settings, self.plan.steps_per_epoch)
        options = setup.loop_options(self.settings, self.plan.steps_per_epoch)
        return Trainer(
            "train", self.model, self.task.losses, self.plan, optimizer_options, options, self.state, self.ranks,
            self.draw_preview if self.preview else None, self.task.weighting, self.distances,
        )  # fmt: skip

    def draw_preview(self, average: nn.Module, step: int) -> None:
        """Draw picture and curve into the state."""
        save_picture(self.preview(average), preview_file(self.state, step))
        draw_curve_of(self.state, step, self.state / "curve.png", self.title)

    def batches(self) -> latents.CachedLatents | latents.EncodedImages:
        """The latents of every step."""
        return latents.open_batches(
            self.plan, self.files.listing, self.config.image.size, self.autoencoder.encode, self.latent_shape,
            self.ranks, stage="train", workers=self.settings.workers, cache_gb=self.settings.latent_cache_gb,
        )  # fmt: skip

    def write(self, finished: Path, average: nn.Module, step: int) -> None:
        """Write weights, history and curve."""
        publish_history(self.state, step, finished, self.title)
        digests = self.context.inputs.digests
        about = {
            "setting": self.config.setting,
            "encoder": config.keys_of_kind(self.config.encoder, "identity"),
            "latent_shape": list(self.latent_shape),
            "step": step,
            "epochs": step // self.plan.steps_per_epoch,
            "seed": self.plan.seed,
            "images_seen": step * self.plan.global_batch,
            "settings": replace(self.config, setting=None).identity(),
            "digests": digests,
            **self.context.inputs.made_from(),
        }
        save_ema(finished / _WEIGHTS, average, about)

    def add_preview(self, average: nn.Module) -> None:
        """Publish the last picture. The weights did not wait for it, as it may not fit into memory."""
        try:
            with memory.explained("Lower train.preview.n_images"):
                picture = self.preview(average)
            runner.amend(self.context, lambda finished: save_picture(picture, finished / _PREVIEW))
        except (ValueError, OSError, RuntimeError) as error:
            log.warning("the weights are published, but without %s: %s", _PREVIEW, error)
