"""The needs of every stage of a configuration, from the arithmetic in :mod:`mmfm.workflow.costs`."""

import math

from mmfm.config import STAGES, Config
from mmfm.config.choices import DETECTORS, ENCODER_FAMILIES, SOLVERS, STARTS
from mmfm.workflow import costs
from mmfm.workflow.costs import DOUBLE, FLOAT, Need

SEEDING_ITERATIONS, START_PASSES = 10, 32
CANDIDATES, GROUP_ROWS = 16, 64
"""Those of mmfm.mixture.initial and mmfm.mixture.kmeans, which import torch: too slow for a workflow's start."""


class Estimator:
    """Needs of the stages of one configuration.

    Args:
        config: the configuration.
        encoder: name of the encoder.
        processes: of every stage.
        on_gpu: whether each process has a GPU.
        n_images: training images; by default ImageNet's number, or the demo's.
    """

    def __init__(self, config: Config, encoder: str, processes: int, on_gpu: bool, n_images: int | None = None) -> None:
        self.config, self.processes, self.on_gpu = config, max(1, processes), on_gpu
        entry = config.encoders[encoder]
        self.encoder = costs.encoder_size(entry.weights, entry.input_size, ENCODER_FAMILIES[entry.family].patch)
        demo = config.data.root == "demo"
        self.n = n_images or (costs.DEMO_IMAGES if demo else costs.IMAGENET_IMAGES) - config.data.holdout
        self.image_bytes = costs.DEMO_BYTES if demo else costs.IMAGENET_BYTES
        self.rates = costs.GPU if on_gpu else costs.CPU
        self.tokens = self.encoder.grid**2
        self.model = config.models[config.train.model]
        self.means = config.gmm.n_components * self.encoder.latent * FLOAT

    def stages(self) -> dict[str, Need]:
        """Return the needs of all stages in the order of the workflow."""
        return {name: getattr(self, name)() for name, stage in STAGES.items() if stage.estimated}

    def _need(
        self, reads: float, writes: float, disk: float, device: float, *, host: float = 0.0, main: float = 0.0,
        single: float = 0.0, half: float = 0.0, images: float = 0.0, workers: int = 0,
    ) -> Need:  # fmt: skip
        arithmetic = (single / self.rates.single + half / self.rates.half) / self.processes
        decoding = images / (self.rates.decode * max(1, workers) * self.processes)
        seconds = max(arithmetic, decoding, (reads + writes) / self.rates.disk)
        host += costs.PROCESS_BYTES + workers * costs.WORKER_BYTES
        return Need(reads, writes, disk, host, main, device, single + half, seconds)

    def _encoding(self, batch: int) -> float:
        """Memory of encoding a batch: weights, activations, latents in float32 and their deviations in float64."""
        e = self.encoder
        activations = batch * e.tokens * e.width * FLOAT * costs.INFERENCE_COPIES
        return e.parameters * FLOAT + activations + batch * e.latent * (FLOAT + 2 * DOUBLE)

    def extract(self) -> Need:
        """One pass over the images: a token each, and two moments per shard."""
        settings, e = self.config.extract, self.encoder
        shards = -(-self.n // settings.shard_size)
        written = self.n * e.width * FLOAT + (shards + 1) * 2 * e.latent * DOUBLE
        return self._need(
            self.n * self.image_bytes, written, written, self._encoding(settings.batch_size),
            host=settings.shard_size * e.width * FLOAT, single=self.n * e.flops, images=self.n,
            workers=settings.workers,
        )  # fmt: skip

    def latent_stats(self) -> Need:
        """Moments in, statistics out."""
        latent = self.encoder.latent
        return self._need(2 * latent * DOUBLE, 2 * latent * FLOAT, 2 * latent * FLOAT, 0, host=4 * latent * DOUBLE)

    def fit_gmm(self) -> Need:
        """k-means, then two products of tokens and modes per iteration; tokens read once if they fit."""
        s, width = self.config.gmm, self.encoder.width
        share = self.n * width * FLOAT / self.processes
        cached = share <= s.cache_gb * 1e9
        sample = min(self.n, STARTS[s.init].rows * s.n_components)
        parameters = s.n_components * (2 * width + 1) * DOUBLE
        product = 2 * self.n * width * s.n_components
        # Seeds come from one process alone; the passes after them are shared, and all but one meet a few centres a row.
        kmeans = SEEDING_ITERATIONS * 2 * sample * width * s.n_components * self.processes
        passes = START_PASSES if s.init == "kmeans" else 0
        kmeans += product * (1 + passes * CANDIDATES / s.n_components) if passes else 0
        number = FLOAT if s.precision == "float32" else DOUBLE
        # Log-joints, which of them matter, and where many do their responsibilities in float64.
        chunk = s.chunk_size * (s.n_components * (number + 1 + DOUBLE) + 3 * width * DOUBLE)
        # Rows that grouped passes look at together; kept ones lie in the cache.
        stretch = min(share, GROUP_ROWS * s.n_components * width * FLOAT) if passes or s.e_step == "truncated" else 0
        return self._need(
            self.n * width * FLOAT * (1 if cached else passes + s.max_iter + 3) + sample * width * FLOAT,
            parameters * s.max_iter + self.n * FLOAT, 5 * parameters + self.n * FLOAT,
            (share if cached else stretch) + 10 * parameters + chunk, host=2 * sample * width * FLOAT,
            single=(2 * s.max_iter + 1) * product + kmeans,
        )  # fmt: skip

    def spatial_gmm(self) -> Need:
        """One pass over the images, a mean per mode."""
        settings, e = self.config.spatial_gmm, self.encoder
        stored = self.means * (2 if settings.covariance_type == "diag" else 1)
        return self._need(
            self.n * self.image_bytes, stored, stored, self._encoding(settings.batch_size),
            host=self.n * 40, single=self.n * e.flops, images=self.n, workers=settings.workers,
        )  # fmt: skip

    def train_decoder(self) -> Need:
        """Encoder forward, decoder forward and backward; checkpoints of weights and two moments."""
        s, parameters = self.config.decoder, costs.decoder_parameters(self.config.decoder)
        images = s.steps * s.global_batch
        micro = s.micro_batch or -(-s.global_batch // self.processes)
        activations = micro * self.tokens * s.hidden_size * s.num_layers * costs.ACTIVATION_BYTES
        checkpoint = parameters * (costs.TRAINED_BYTES - FLOAT)
        encoding = self._encoding(micro) + s.latent_cache_gb * 1e9
        return self._need(
            images * self.image_bytes, checkpoint * s.steps / s.checkpoint_every, 4 * checkpoint,
            parameters * costs.TRAINED_BYTES + activations + encoding,
            main=self._saving(parameters, checkpoint, "ddp"),
            single=images * self.encoder.flops, half=3 * images * costs.decoder_flops(s, self.tokens + 1),
            images=images, workers=s.workers,
        )  # fmt: skip

    def train(self) -> Need:
        """Encoder and posterior forward, model forward and backward; checkpoints with the EMA."""
        s, k = self.config.train, self.config.gmm.n_components
        steps = s.epochs * (self.n // s.global_batch)
        images = steps * s.global_batch
        micro = s.micro_batch or -(-s.global_batch // self.processes)
        parameters = costs.dit_parameters(self.model, self.encoder.width, k)
        depth = zip(self.model.hidden_size, self.model.depth, strict=True)
        activations = micro * self.tokens * sum(w * d for w, d in depth) * costs.ACTIVATION_BYTES
        checkpoint = parameters * (costs.TRAINED_BYTES - FLOAT + costs.EMA_BYTES)
        model = parameters * (costs.TRAINED_BYTES + costs.EMA_BYTES)
        posterior = 4 * self.encoder.width * k
        measured, (memory, half, single) = s.preview.fid_images, self._measuring()
        rounds = -(-steps // s.preview.fid_every) if s.preview.fid_every else 0
        # Nothing of a step's activations is left while images are generated.
        activations = max(activations, memory if rounds else 0)
        means, pinned = self._means(s.means_device)
        return self._need(
            images * self.image_bytes, checkpoint * steps / s.checkpoint_every, (s.keep_checkpoints + 2) * checkpoint,
            model + activations + means + self._encoding(micro) + s.latent_cache_gb * 1e9,
            host=pinned, main=self._saving(parameters, checkpoint, s.sharding),
            single=images * (self.encoder.flops + posterior) + rounds * measured * single,
            half=3 * images * costs.dit_flops(self.model, self.tokens) + rounds * measured * half,
            images=images, workers=s.workers,
        )  # fmt: skip

    def _saving(self, parameters: float, checkpoint: float, sharding: str) -> float:
        """Host memory of the main process while a checkpoint is written, beyond what it trains with.

        Shards are gathered there, all of them before the first file is written. What is whole on a GPU is copied one
        file at a time, the optimiser's even a tensor at a time; what is whole on the host is written from where it is.
        """
        if sharding == "fsdp" and self.processes > 1:
            return checkpoint
        return parameters * FLOAT if self.on_gpu else 0

    def _means(self, where: str) -> tuple[float, float]:
        """Memory of the source's means on the device and, pinned there, on the host."""
        precision = self.config.train.means_precision
        halved = precision == "bf16" or (precision == "auto" and self.on_gpu)
        size = self.means / 2 if halved else self.means
        if self.on_gpu and where == "host":
            return 0, 2 ** math.ceil(math.log2(size))  # PyTorch rounds pinned memory up
        return size, 0

    def _measuring(self) -> tuple[float, float, float]:
        """Memory of a measurement during training, and operations of one of its images, in bf16 and in float32."""
        s, decoder = self.config.train, self.config.decoder
        batch, parameters = s.preview.fid_batch_size, costs.dit_parameters(self.model, self.encoder.width)
        widest = max(*self.model.hidden_size, decoder.hidden_size)
        memory = batch * self.tokens * widest * FLOAT * costs.INFERENCE_COPIES + self._detecting(batch)
        whole = parameters * FLOAT if s.sharding == "fsdp" else 0  # every process then has one
        half = (s.preview.time_points - 1) * costs.dit_flops(self.model, self.tokens)
        single = costs.decoder_flops(decoder, self.tokens + 1) + DETECTORS[self.config.fid.detector].flops
        return memory + whole, half, single

    def sample(self) -> Need:
        """The model at every step, the decoder once; images as shards and as one file."""
        s, decoder = self.config.sample, self.config.decoder
        evaluations = (s.time_points - 1) * (SOLVERS[s.solver].evaluations or 1)
        pixels = self.config.image.size**2 * 3
        weights = costs.dit_parameters(self.model, self.encoder.width, self.config.gmm.n_components)
        weights += costs.decoder_parameters(decoder)
        widest = max(*self.model.hidden_size, decoder.hidden_size)
        activations = s.batch_size * self.tokens * widest * FLOAT * costs.INFERENCE_COPIES
        half = s.n_images * evaluations * costs.dit_flops(self.model, self.tokens)
        means, pinned = self._means(s.means_device)
        return self._need(
            weights * FLOAT + self.means, 2 * s.n_images * pixels, 2 * s.n_images * pixels,
            weights * FLOAT + means + activations, host=s.shard_size * pixels + pinned,
            half=half, single=s.n_images * costs.decoder_flops(decoder, self.tokens + 1),
        )  # fmt: skip

    def fid_reference(self) -> Need:
        """One pass over the images, features' moments per shard; or an .npz read."""
        s, detector = self.config.fid, DETECTORS[self.config.fid.detector]
        features, flops, weights = detector.features, detector.flops, detector.weight_bytes
        moments = features * (features + 1) * DOUBLE
        if s.reference != "train":
            return self._need(moments + weights, moments, moments, 0, host=8 * moments, single=60 * features**3)
        shards = min(128, -(-self.n // 1000))
        return self._need(
            self.n * self.image_bytes, (shards + 1) * moments, (shards + 1) * moments, self._detecting(s.batch_size),
            host=8 * moments, single=self.n * flops + 60 * features**3, images=self.n, workers=s.workers,
        )  # fmt: skip

    def fid(self) -> Need:
        """The detector on generated images; a distance."""
        s, detector = self.config.fid, DETECTORS[self.config.fid.detector]
        features, flops = detector.features, detector.flops
        n, pixels = self.config.sample.n_images, self.config.image.size**2 * 3
        moments = features * (features + 1) * DOUBLE
        return self._need(
            2 * n * pixels, 1e4, 1e4, self._detecting(s.batch_size), host=8 * moments,
            single=n * flops + 60 * features**3,
        )  # fmt: skip

    def _detecting(self, batch: int) -> float:
        detector, pixels = DETECTORS[self.config.fid.detector], batch * self.config.image.size**2 * 3
        return detector.weight_bytes + 40 * pixels * FLOAT + 3 * detector.features**2 * DOUBLE


def table(config: Config, encoder: str, gpus: int, n_images: int | None = None) -> str:
    """Return the needs of all stages as a Markdown table; 0 GPUs is one process on a CPU core."""
    rows = ["| stage | reads | writes | disk | host / rank | GPU / rank | FLOPs | time |", "|---|" + "--:|" * 7]
    for name, need in Estimator(config, encoder, gpus or 1, gpus > 0, n_images).stages().items():
        sizes = (need.reads, need.writes, need.disk, need.host + need.main, need.device)
        cells = [f"`{name}`", *map(_bytes, sizes), f"{need.flops:.1e}", _time(need.seconds)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _bytes(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.0f} kB"


def _time(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"
