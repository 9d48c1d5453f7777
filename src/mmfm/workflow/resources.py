"""The resources that each stage of a configuration takes, from the arithmetic in :mod:`mmfm.workflow.costs`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mmfm.config import SETTINGS, STAGES, Config
from mmfm.config.choices import DETECTORS, ENCODER_FAMILIES, METRICS, SOLVERS, STARTS, DetectorKind, feature_patches
from mmfm.infra.disk import of_checkpoints
from mmfm.models.flops import decoder_flops, dit_flops
from mmfm.workflow import costs
from mmfm.workflow.costs import DOUBLE, FLOAT, Resources, Work
from mmfm.workflow.facts import Facts, assumed
from mmfm.workflow.targets import Target

CACHE_LIMIT, CACHE_BATCH = 20 * 10**9, 64
SEEDING_ITERATIONS, START_PASSES = 10, 32
CANDIDATES, GROUP_ROWS = 16, 64
KEPT_DECODERS = 2
PAIRS = 50_000
"""Copied from mmfm.autoencoder.latent_cache, mmfm.mixture.initial, mmfm.mixture.kmeans, mmfm.stages.train_decoder and
mmfm.evaluation.scores: importing torch would slow down every workflow start."""


class Estimator:
    """Estimates the resources of the stages of one configuration; each stage has a method of its name.

    Args:
        config: the configuration.
        encoder: name of the encoder.
        processes: number of processes of every stage.
        on_gpu: whether each process has a GPU.
        facts: the images, and encoder and machine as far as they are known; None: the demo's images or ImageNet's.
    """

    def __init__(self, config: Config, encoder: str, processes: int, on_gpu: bool, facts: Facts | None = None) -> None:
        facts = facts or assumed(config)
        self.name, self.facts = encoder, facts
        self.config, self.processes, self.on_gpu = config, max(1, processes), on_gpu
        entry = config.encoders[encoder]
        patch = ENCODER_FAMILIES[entry.family].patch
        self.encoder = facts.encoder or costs.encoder_size(
            entry.weights, entry.input_size, patch, config.published.folder
        )
        self.n, self.image_bytes = facts.n_images, facts.image_bytes
        self.card = costs.card_of(config.card)[1] if on_gpu else None
        usual = costs.CPU if self.card is None else costs.gpu_rates(self.card, entry.precision)
        self.rates = facts.rates or replace(usual, decode=min(usual.decode, costs.DECODED_BYTES / self.image_bytes))
        self.tokens = self.encoder.grid**2
        self.decoder = (config.decoder, self.encoder.width, self.tokens, config.image.size // max(1, self.encoder.grid))
        self.model = config.models[config.train.model]
        self.detector = self._detector(config, encoder)
        self.means = config.gmm.n_components * self.encoder.latent * FLOAT

    def _detector(self, config: Config, encoder: str) -> DetectorKind:
        """Return the detector; with the sizes of the encoder whose tokens are the features."""
        kind = DETECTORS[config.fid.detector]
        if config.fid.detector != "encoder":
            return kind
        entry = config.encoders[config.fid.encoder or encoder]
        patch = ENCODER_FAMILIES[entry.family].patch
        # Images are resized to about their own size, between 8 and 16 patches per side.
        side = patch * feature_patches(config.image.size, patch)
        size = costs.encoder_size(entry.weights, side, patch, config.published.folder)
        return replace(kind, features=size.width, flops=size.flops, weight_bytes=size.parameters * FLOAT)

    def stages(self) -> dict[str, Resources]:
        """Return the resources of all stages, in workflow order."""
        return {name: getattr(self, name)() for name, stage in STAGES.items() if stage.estimated}

    def _resources(
        self,
        work: Work,
        *,
        disk: float,
        device: float,
        host: float = 0.0,
        main: float = 0.0,
        speed: float = 1.0,
        cached: float = 0.0,
    ) -> Resources:
        """Add time, and the memory that every process takes, to what is peculiar to a stage.

        Args:
            speed: of operations in bf16, as a multiple of the usual one.
            cached: part of ``disk``, see :class:`~mmfm.workflow.costs.Resources`.
        """
        host += costs.PROCESS_BYTES + work.workers * costs.WORKER_BYTES
        device += costs.CONTEXT_BYTES if device and self.on_gpu else 0
        seconds = work.seconds(replace(self.rates, half=speed * self.rates.half), self.processes)
        return Resources(work, seconds, disk, host, main, device, 60 * self.config.max_runtime_hours, cached)

    def _encoding(self, batch: int) -> float:
        """Memory for encoding a batch: weights, activations, latents in float32 and their deviations in float64."""
        e, batch = self.encoder, max(batch, CACHE_BATCH if self.cached() else 0)
        activations = batch * e.tokens * e.width * FLOAT * costs.INFERENCE_COPIES
        return e.parameters * FLOAT + activations + batch * e.latent * (FLOAT + 2 * DOUBLE)

    def cached(self, views: int = 1) -> float:
        """Bytes of the latent cache with the images in that many views; 0 if there is none."""
        latents, size = self.config.latents, self.n * views * (self.encoder.latent + self.encoder.width) * FLOAT
        return size if latents.cache == "on" or (latents.cache == "auto" and size <= CACHE_LIMIT) else 0

    def _encoded(self, images: float, views: int = 1) -> float:
        """How often an image is encoded by a stage that needs so many latents and finds none in the cache."""
        return min(images, views * self.n) if self.cached(views) else images

    def extract(self) -> Resources:
        """One pass over the images; a token per image, two moments per shard."""
        extract, e = self.config.extract, self.encoder
        shards = -(-self.n // extract.shard_size)
        written = self.n * e.width * FLOAT + (shards + 1) * 2 * e.latent * DOUBLE + self.cached()
        work = Work(
            self.n * self.image_bytes, written, encoder=self.n * e.flops, images=self.n, workers=extract.workers
        )
        host = extract.shard_size * e.width * FLOAT
        return self._resources(
            work, disk=written, device=self._encoding(extract.batch_size), host=host, cached=self.cached()
        )

    def latent_stats(self) -> Resources:
        """Moments in, statistics out."""
        latent = self.encoder.latent
        work = Work(2 * latent * DOUBLE, 2 * latent * FLOAT)
        return self._resources(work, disk=work.writes, device=0, host=4 * latent * DOUBLE)

    def fit_gmm(self) -> Resources:
        """k-means, then two products of tokens and modes per iteration; tokens are read once if they fit in memory."""
        gmm, width = self.config.gmm, self.encoder.width
        share = self.n * width * FLOAT / self.processes
        cached = share <= gmm.cache_gb * 1e9
        sample = min(self.n, STARTS[gmm.init].rows * gmm.n_components)
        parameters = gmm.n_components * (2 * width + 1) * DOUBLE
        product = 2 * self.n * width * gmm.n_components
        passes = START_PASSES if gmm.init == "kmeans" else 0
        # One process computes the seeds alone. The passes after that are shared, and all but one of them compare a row
        # with few centres.
        kmeans: float = SEEDING_ITERATIONS * 2 * sample * width * gmm.n_components * self.processes
        kmeans += product * (1 + passes * CANDIDATES / gmm.n_components) if passes else 0
        number = FLOAT if gmm.precision == "float32" else DOUBLE
        # Log-joints, a mask of those that matter, and, if many do, their responsibilities in float64.
        chunk = gmm.chunk_size * (gmm.n_components * (number + 1 + DOUBLE) + 3 * width * DOUBLE)
        # Grouped passes read this many rows at a time; cached rows are in memory already.
        stretch = (
            min(share, GROUP_ROWS * gmm.n_components * width * FLOAT) if passes or gmm.e_step == "truncated" else 0
        )
        reads = self.n * width * FLOAT * (1 if cached else passes + gmm.max_iter + 3) + sample * width * FLOAT
        writes = parameters * gmm.max_iter + self.n * FLOAT
        return self._resources(
            Work(reads, writes, (2 * gmm.max_iter + 1) * product + kmeans),
            disk=5 * parameters + self.n * FLOAT,
            device=(share if cached else stretch) + 10 * parameters + chunk,
            host=2 * sample * width * FLOAT,
        )

    def spatial_gmm(self) -> Resources:
        """One pass over the images, one mean per mode; the main process reads and hashes all of them at the end."""
        spatial = self.config.spatial_gmm
        stored = self.means * (2 if spatial.covariance_type == "diag" else 1)
        flops, written = self.n * self.encoder.flops, stored + self.cached()
        work = Work(
            self.n * self.image_bytes, written, encoder=flops, images=self.n, workers=spatial.workers, alone=stored
        )
        memory = {"device": self._encoding(spatial.batch_size), "host": self.n * 40}
        return self._resources(work, disk=written, cached=self.cached(), **memory)

    def train_decoder(self) -> Resources:
        """Encoder forward, decoder forward and backward; checkpoints of weights and two moments."""
        decoder, parameters = self.config.decoder, costs.decoder_parameters(*self.decoder)
        images = decoder.steps * decoder.global_batch
        micro = decoder.micro_batch or -(-decoder.global_batch // self.processes)
        kept = costs.decoder_activations(*self.decoder)
        kept *= 1 if self.on_gpu else costs.FLOAT32_ACTIVATIONS
        activations = micro * (kept + self._pixels())
        total, checkpoint = self._checkpoints(parameters, average=False, keep=KEPT_DECODERS, milestones=1)
        saved = checkpoint * decoder.steps / decoder.checkpoint_every
        work = Work(
            images * self.image_bytes,
            saved + self.cached(),
            encoder=self._encoded(images) * self.encoder.flops,
            half=3 * images * decoder_flops(*self.decoder),
            images=images,
            workers=decoder.workers,
            alone=saved,
        )
        return self._resources(
            work,
            disk=total + self.cached(),
            cached=self.cached(),
            device=self._trained(parameters, costs.TRAINED_BYTES, self.on_gpu) + activations + self._encoding(micro),
            main=self._saving(parameters, checkpoint, "ddp"),
        )

    def train(self) -> Resources:
        """Encoder and posterior forward, model forward and backward; checkpoints with the EMA."""
        train, k = self.config.train, self.config.gmm.n_components
        epoch = self.n // train.global_batch
        steps = train.target_step(epoch)
        images = steps * train.global_batch
        micro = train.micro_batch or -(-train.global_batch // self.processes)
        parameters = costs.dit_parameters(self.model, self.encoder.width, k)
        kept = {steps, *(step for step in train.kept_steps(epoch) if step < steps)}
        total, checkpoint = self._checkpoints(
            parameters, average=True, keep=train.keep_checkpoints, milestones=len(kept)
        )
        saved, activations = checkpoint * steps / train.checkpoint_every, micro * self._activations()
        posterior = 4 * self.encoder.width * k
        rounds = -(-steps // train.preview.fid_every) if train.preview.fid_every else 0
        measured, (memory, half, single) = rounds * train.preview.fid_images, self._measuring()
        passes = 4 if train.checkpoint_activations else 3  # forward, backward, and forward again
        # A step's activations are freed before images are generated.
        activations = max(activations, memory if rounds else 0)
        means, pinned = self._means(train.means_device)
        each, sharded = costs.TRAINED_BYTES + costs.EMA_BYTES, train.sharding == "fsdp"
        trained = self._trained(parameters, each, self._in_bf16(), sharded)
        views = 2 if train.flip else 1
        cached, encoded = self.cached(views), self._encoded(images, views)
        # Latents are read instead of images, of which each is read once.
        read = images * cached / (views * self.n) if cached else images * self.image_bytes
        work = Work(
            read,
            saved + cached,
            encoder=encoded * self.encoder.flops,
            single=images * posterior + measured * single,
            half=passes * images * dit_flops(self.model, self.tokens, self.encoder.width) + measured * half,
            images=self.n if cached else images,
            workers=train.workers,
            alone=saved,
        )
        return self._resources(
            work,
            disk=total + cached,
            cached=cached,
            device=trained + activations + means + self._encoding(micro),
            host=pinned,
            main=self._saving(parameters, checkpoint, train.sharding),
            speed=costs.COMPILED if train.compile and self.on_gpu else 1,
        )

    def _activations(self) -> float:
        """Bytes per image that a step keeps for the backward pass, with the latents that the loss needs."""
        recomputed, sizes = self.config.train.checkpoint_activations, (self.model, self.tokens)
        kept = costs.dit_activations(*sizes, self.encoder.width, recomputed)
        kept += costs.block_activations(*sizes) if recomputed else 0
        return kept * (1 if self._in_bf16() else costs.FLOAT32_ACTIVATIONS) + 5 * self.encoder.latent * FLOAT

    def _in_bf16(self) -> bool:
        return self.config.train.precision == "bf16" or (self.config.train.precision == "auto" and self.on_gpu)

    def _trained(self, parameters: float, each: int, bf16: bool, sharded: bool = False) -> float:
        """Memory of weights, gradients, moments and average, of the weights' copies in bf16, and of DDP's buckets.

        Gradients of earlier micro-batches lie beside the buckets in which DDP exchanges them. Autocast keeps a copy of
        every weight until the backward pass, with FSDP of whole weights.

        Args:
            each: bytes per parameter, without copies and buckets.
        """
        buckets = FLOAT if self.processes > 1 and not sharded else 0
        copies = costs.COPY_BYTES if bf16 else 0
        return parameters * ((each + buckets) / (self.processes if sharded else 1) + copies)

    def _checkpoints(self, parameters: float, *, average: bool, keep: int, milestones: int) -> tuple[int, int]:
        """Return the disk space that checkpoints need, as the trainer demands it, and the bytes of one."""
        weights = int(parameters * FLOAT)
        return of_checkpoints(weights, weights, average=average, keep=keep, milestones=milestones)

    def largest_micro_batch(self) -> int:
        """Return the largest part of a process's share, halved repeatedly, that the card's memory takes; 0 for none."""
        share = -(-self.config.train.global_batch // self.processes)
        while share and self.card is not None:
            train = replace(self.config.train, micro_batch=share)
            at_this = Estimator(replace(self.config, train=train), self.name, self.processes, self.on_gpu, self.facts)
            if at_this.train().device <= costs.USABLE * self.card.memory:
                break
            share //= 2
        return share

    def _saving(self, parameters: float, checkpoint: float, sharding: str) -> float:
        """Host memory that the main process takes in addition while it writes a checkpoint.

        Shards are all gathered there before the first file is written. A whole model on a GPU is copied one file at a
        time (the optimiser's state one tensor at a time); on the host it is written in place.
        """
        if sharding == "fsdp" and self.processes > 1:
            return checkpoint
        return parameters * FLOAT if self.on_gpu else 0

    def _means(self, where: str) -> tuple[float, float]:
        """Memory of the source's means on the device and, pinned, on the host."""
        precision = self.config.train.means_precision
        halved = precision in ("bf16", "reference") or (precision == "auto" and self.on_gpu)
        size = self.means / 2 if halved else self.means
        if self.on_gpu and where == "host":
            return 0, 2 ** math.ceil(math.log2(size))  # PyTorch rounds pinned memory up
        return size, 0

    def _measuring(self) -> tuple[float, float, float]:
        """Memory of a Frechet distance during training, and its operations per image in bf16 and in float32."""
        train = self.config.train
        batch, parameters = train.preview.fid_batch_size, costs.dit_parameters(self.model, self.encoder.width)
        memory = self._generating(batch) + self._detecting(batch)
        whole = parameters * FLOAT if train.sharding == "fsdp" else 0  # every process gathers the whole model
        half = (train.preview.time_points - 1) * dit_flops(self.model, self.tokens, self.encoder.width)
        single = decoder_flops(*self.decoder) + self.detector.flops
        return memory + whole, half, single

    def _generating(self, batch: int) -> float:
        """Memory of the activations while a batch is generated."""
        widest = max(*self.model.hidden_size, self.config.decoder.hidden_size)
        return batch * (self.tokens * widest * FLOAT * costs.INFERENCE_COPIES + self._pixels())

    def _pixels(self) -> float:
        """Bytes per image of the pixels while a decoder's patches become one: float32, as often as they are there."""
        return costs.PIXEL_COPIES * 3 * self.config.image.size**2 * FLOAT

    def sample(self) -> Resources:
        """The model at every step, the decoder once; images are written as shards and as one file."""
        sample = self.config.sample
        evaluations = (sample.time_points - 1) * (SOLVERS[sample.solver].evaluations or 1)
        pixels = self.config.image.size**2 * 3
        weights = costs.dit_parameters(self.model, self.encoder.width, self.config.gmm.n_components)
        weights += costs.decoder_parameters(*self.decoder)
        means, pinned = self._means(sample.means_device)
        images = sample.n_images * pixels
        work = Work(
            weights * FLOAT + self.means,
            2 * images,
            single=sample.n_images * decoder_flops(*self.decoder),
            half=sample.n_images * evaluations * dit_flops(self.model, self.tokens, self.encoder.width),
            alone=images,
        )
        device = weights * FLOAT + means + self._generating(sample.batch_size)
        return self._resources(work, disk=work.writes, device=device, host=sample.shard_size * pixels + pinned)

    def fid_reference(self) -> Resources:
        """One pass over the images, moments of their features per shard; or an .npz file that is imported."""
        fid, detector = self.config.fid, self.detector
        moments = detector.features * (detector.features + 1) * DOUBLE
        root = 60 * detector.features**3  # matrix square root
        bank = self._bank(fid.reference_images)
        if fid.reference != "train":
            seen = fid.reference_images if bank else 0
            pixels = seen * self.config.image.size**2 * 3
            work = Work(moments + detector.weight_bytes + pixels, moments + bank, root + seen * detector.flops)
            device = self._detecting(fid.batch_size) if bank else 0
            return self._resources(work, disk=moments + bank, device=device, host=8 * moments + 2 * bank)
        if any(METRICS[name].needs == "spatial" for name in fid.metrics):
            moments *= 2  # spatial features are about as many
        bank = min(bank, self._bank(self.n))
        written = (min(128, -(-self.n // 1000)) + 1) * moments + 2 * bank
        flops = self.n * detector.flops + root
        work = Work(self.n * self.image_bytes, written, flops, images=self.n, workers=fid.workers)
        return self._resources(work, disk=written, device=self._detecting(fid.batch_size), host=8 * moments + bank)

    def fid(self) -> Resources:
        """The detector on the generated images, and their metrics; processes' features are joined in memory."""
        detector, n = self.detector, self.config.sample.n_images
        moments = detector.features * (detector.features + 1) * DOUBLE
        bank, others = self._bank(n), min(self.config.fid.reference_images, self.n)
        pairs = (n + others) ** 2 if bank else 0
        flops = n * detector.flops + 60 * detector.features**3 + 2 * pairs * detector.features
        work = Work(2 * n * self.config.image.size**2 * 3, 1e4, flops)
        host = 8 * moments + 2 * bank + self._bank(others)
        return self._resources(work, disk=1e4, device=self._detecting(self.config.fid.batch_size), host=host)

    def reconstruction(self) -> Resources:
        """Encoder, decoder and twice the detector on at most 50,000 held-out images, or training images without any."""
        fid, detector, about = self.config.fid, self.detector, self.config.data
        n = PAIRS if about.heldout_root else min(about.holdout or self.n, PAIRS)  # a folder of unknown size
        moments = 2 * detector.features * (detector.features + 1) * DOUBLE
        flops = n * (decoder_flops(*self.decoder) + 2 * detector.flops)
        written = min(32, -(-n // 500)) * moments
        flops += 60 * detector.features**3
        work = Work(n * self.image_bytes, written, flops, encoder=n * self.encoder.flops, images=n, workers=fid.workers)
        device = self._encoding(fid.batch_size) + costs.decoder_parameters(*self.decoder) * FLOAT
        device += self._generating(fid.batch_size) + self._detecting(fid.batch_size)
        return self._resources(work, disk=written, device=device, host=4 * moments)

    def mode_quality(self) -> Resources:
        """The encoder on the generated images, encoder, decoder and encoder on real ones; posteriors in float64."""
        n, k, e, extract = self.config.sample.n_images, self.config.gmm.n_components, self.encoder, self.config.extract
        real = min(n, self.n)
        encoded = n + 2 * real
        flops = real * decoder_flops(*self.decoder) + encoded * 4 * e.width * k * DOUBLE / FLOAT
        reads, written = 2 * n * self.config.image.size**2 * 3 + real * self.image_bytes, 200 * k + 2e6
        work = Work(reads, written, flops, encoder=encoded * e.flops, images=real, workers=extract.workers)
        decoding = costs.decoder_parameters(*self.decoder) * FLOAT
        activations = self.tokens * self.config.decoder.hidden_size * FLOAT * costs.INFERENCE_COPIES
        decoding += extract.batch_size * (activations + self._pixels())
        mixture, joint = 6 * k * e.width * DOUBLE, 4 * extract.batch_size * k * DOUBLE
        device = self._encoding(extract.batch_size) + decoding + mixture + joint
        return self._resources(work, disk=written, device=device, host=2 * 64 * n)

    def _bank(self, n: int) -> int:
        """Bytes of the features of images; 0 if no metric needs them one by one."""
        needed = any(METRICS[name].needs == "bank" for name in self.config.fid.metrics)
        return n * self.detector.features * FLOAT if needed else 0

    def _detecting(self, batch: int) -> float:
        """Memory of the detector on a batch."""
        detector, pixels = self.detector, batch * self.config.image.size**2 * 3
        return detector.weight_bytes + 40 * pixels * FLOAT + 3 * detector.features**2 * DOUBLE


_OF_A_SETTING = ("train", "sample", "fid")
"""Stages that settings do not share."""


def together(config: Config, found: Sequence[tuple[Target, Mapping[str, Resources]]]) -> dict[str, Resources]:
    """Join what several results of a comparison need, in workflow order; what they share is there once.

    Stages of one setting, or of one of several encoders, are named as in ``train (mode)``.
    """
    joined, encoders = {}, {target.encoder for target, _ in found}
    # With the encoder's own features, every encoder has a reference.
    shared = () if config.fid.detector == "encoder" and not config.fid.encoder else ("fid_reference",)
    for target, needs in found:
        for name, taken in needs.items():
            several = len(encoders) > 1 and name not in shared
            parts = [target.encoder] * several + [target.setting] * (name in _OF_A_SETTING)
            joined[f"{name} ({'_'.join(parts)})" if len(found) > 1 and parts else name] = taken
    order = list(STAGES)
    return dict(sorted(joined.items(), key=lambda item: order.index(item[0].partition(" ")[0])))


def for_target(config: Config, target: Target, processes: int, on_gpu: bool, facts: Facts) -> dict[str, Resources]:
    """Return the resources of the stages that a result needs, in workflow order.

    While sampling, the second network of guidance is not counted.
    """
    variant, given = target.variant, config
    config = replace(
        config,
        train=config.train_of(target.setting, variant.model),
        gmm=replace(config.gmm, n_components=variant.k or 1),
        sample=replace(config.sample, time_points=variant.t or config.sample.time_points),
    )
    found = Estimator(config, target.encoder, processes, on_gpu, facts).stages()
    del found["reconstruction"]  # a target of its own
    del found["mode_quality"]  # a target of its own
    if not SETTINGS[target.setting].mixture or config.gmm.weights != "fit":
        del found["fit_gmm"], found["spatial_gmm"]
    if config.decoder.weights != "train":
        del found["train_decoder"]
    if config.train.weights != "train":
        del found["train"]
    if config.latent_stats.weights != "compute":
        del found["latent_stats"]
        if "fit_gmm" not in found:
            del found["extract"]
    if target.guided and config.guide.weights == "train":
        guide = given.train_of(target.setting, config.guide.model, guide=True)
        smaller = Estimator(replace(config, train=guide), target.encoder, processes, on_gpu, facts)
        found["train (guide)"] = smaller.train()
    return found
