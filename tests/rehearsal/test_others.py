"""Sampling, the autoencoder, EM, the spatial moments and the detector at full size.

The lists say where the host waits for the device, and why that is harmless.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfm.autoencoder.encoders import Encoder
from mmfm.autoencoder.family import Backbone
from mmfm.config import Guidance
from mmfm.data.moments import CovarianceMoments
from mmfm.evaluation.detector import Detector
from mmfm.evaluation.detectors import encoder, inception
from mmfm.flow.path import time_grid
from mmfm.flow.source import couple_modes
from mmfm.generation import networks
from mmfm.generation.generator import Generator
from mmfm.infra import rng
from mmfm.infra.distributed import Ranks
from mmfm.mixture.em import EMState, em_iterations
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.images_by_mode import ImagesByMode
from mmfm.mixture.spatial import position_variances, union_with_flips
from mmfm.mixture.streaming import Rows
from mmfm.mixture.truncated import Truncation
from mmfm.stages.spatial_gmm import _Accumulator
from support.rehearsal import META, SHAPE, Rehearsal, Wait, network

BATCH, POINTS = 128, 3

CHECKED = {"generation.generator.require_finite": Wait("once a batch, after the flow", 1)}


def sampling(task, full, autoencoder, setting, guide="", scale=1.0, interval=(0.0, 1.0)):
    """Return a generator of a setting and its velocity field."""
    loss = task(setting)
    model = network(loss, full.models["XL"]).eval()
    weaker = network(loss, full.models[guide]).eval() if guide else None
    field = networks.guided(model, weaker, Guidance(scale, interval), "float32", META)
    times = time_grid(POINTS, loss.shift)
    return Generator(setting, loss.source, loss.num_labels, autoencoder, SHAPE, times, 0, META), field


@pytest.mark.parametrize(
    ("setting", "guide", "scale"), [("uncond", "", 1.0), ("mode", "S", 1.5), ("class", "", 2.0), ("class_gmm", "", 1.0)]
)
def test_images_are_generated(task, full, autoencoder, setting, guide, scale):
    generator, field = sampling(task, full, autoencoder, setting, guide, scale)
    with Rehearsal(CHECKED) as rehearsal:
        images, evaluations = generator.generate(field, range(BATCH))
    assert images.shape == (BATCH, 3, 256, 256) and images.dtype == torch.uint8 and evaluations == POINTS - 1
    assert rehearsal.seen == dict.fromkeys(CHECKED, 1)


def test_variances_on_disk_cost_no_wait(task, full, autoencoder, diagonal_source):
    """The host knows the modes of generated images, and what it reads for them reaches the device without it."""
    generator, field = sampling(task, full, autoencoder, "mode")
    with Rehearsal(CHECKED):
        images, _ = replace(generator, source=diagonal_source).generate(field, range(16))
    assert images.shape == (16, 3, 256, 256)


def test_guidance_in_an_interval(task, full, autoencoder):
    generator, field = sampling(task, full, autoencoder, "class", scale=2.0, interval=(0.1, 0.9))
    with Rehearsal(CHECKED):
        assert generator.generate(field, range(BATCH))[0].shape == (BATCH, 3, 256, 256)


def test_images_are_encoded_and_coupled(autoencoder, mixture):
    with Rehearsal():
        latent, token = autoencoder.encode(torch.empty(BATCH, 3, 256, 256, device=META))
        uniforms = rng.uniform(0, "train/mode", torch.arange(BATCH, device=META))
        modes = couple_modes(mixture, token, uniforms, "soft")
    assert latent.shape == (BATCH, *SHAPE) and latent.dtype == torch.float32 and modes.shape == (BATCH,)
    assert couple_modes(mixture, token, uniforms, "hard").dtype == modes.dtype == torch.int64


CHUNK, CHUNKS, K = 16384, 4, 8192

PER_ITERATION = {
    "mixture.streaming.Rows._load": Wait("rows come from the disk, once if they fit into memory"),
    "mixture.gaussian.Mixture._check": Wait(
        "once an iteration: are the parameters valid, do the weights sum to 1?", (0, 1, 1)
    ),
    "mixture.moments.m_step": Wait("once an iteration: what regularisation may cost"),
    "mixture.reseeding.reseed": Wait("once an iteration: which components are empty?"),
    "mixture.em.em_iterations": Wait("once an iteration: the lower bound"),
    "mixture.em.rounding_error": Wait("once an iteration: how far the bound may fall"),
}
EXACT = {"mixture.moments.SufficientStatistics.__init__": Wait("once an iteration: are there narrow components?")}
DENSE = {"mixture.em.posteriors": Wait("once a chunk of 16384 rows: do many responsibilities matter?", 10**9)}
SPARSE = {
    "mixture.em.posteriors": Wait("twice a chunk: how many responsibilities matter, and which?", (0, 4 * CHUNK)),
    "mixture.em._row_sums": Wait("once a chunk: sums in a fixed order", CHUNK),
    "mixture.moments.SufficientStatistics._add_segments": Wait("once 16 million elements: sums in a fixed order", K),
}
TRUNCATED = {
    "mixture.groups._batches": Wait("thrice a block: the groups' sizes are the batches' shapes", (K, K, 8)),
    "mixture.groups._process": Wait("once a batch of groups: which sums matter?", K),
    "mixture.moments.row_adder": Wait("once a batch of sums: sums in a fixed order", K),
}


def iterate(mixture: Mixture, allowed: dict[str, Wait], **options: object) -> dict[str, int]:
    """Run one iteration of EM on rows without values; return how often the host waited at each place."""
    nothing, ranks = np.zeros((1, SHAPE[0]), np.float32), Ranks(0, 1, META)
    rows = Rows(lambda start, stop: nothing.repeat(stop - start, 0), CHUNK * CHUNKS, CHUNK, ranks)
    state = EMState(mixture, winners=options.pop("winners", None))
    with Rehearsal(PER_ITERATION | allowed, double=True) as rehearsal:
        (state,) = em_iterations(rows, state, max_iter=1, tol=1e-3, reg_covar=1e-6, dtype=torch.float32, **options)
    assert state.mixture.means.shape == (K, SHAPE[0]) and state.mixture.means.device == META
    return rehearsal.seen


@pytest.mark.parametrize("allowed", [DENSE, SPARSE], ids=["many_modes_matter", "few_modes_matter"])
def test_an_iteration_of_em_with_exact_posteriors(mixture, allowed):
    seen = iterate(mixture, EXACT | allowed)
    assert seen["mixture.em.posteriors"] <= 2 * CHUNKS and seen["mixture.em.em_iterations"] == 2


def test_an_iteration_of_em_with_truncated_posteriors(mixture):
    winners = torch.zeros(CHUNK * CHUNKS, dtype=torch.int32, device=META)
    iterate(mixture, TRUNCATED, truncation=Truncation(), winners=winners)


def test_the_moments_of_modes(full):
    finished = {}
    images = ImagesByMode.make(np.arange(1000) % 4, 4, full.spatial_gmm.batch_size)

    def finish(mode, moments):
        finished[mode] = union_with_flips(moments)[0].shape, position_variances(moments)[0].dtype

    accumulator = _Accumulator(images, set(), finish)
    asked = {
        "mixture.spatial.union_with_flips": Wait("once a mode: its variance"),
        "mixture.spatial.position_variances": Wait("twice a mode: the smallest variance, and how often it is used"),
    }
    with Rehearsal(asked):
        for batch in images.batches(range(4), set()):
            accumulator.add(batch, torch.empty(len(batch), *SHAPE, device=META))
    assert finished == dict.fromkeys(range(4), (SHAPE, torch.float64))


DETECTED = {"evaluation.detector.Detector._checked": Wait("once a batch: are the features finite?", 1)}


def test_the_inception_network(full, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: {})
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
    with META:
        detector = inception.load(Path("weights.pth"), "0", META)
    moments = CovarianceMoments.zeros(detector.dimension, META)
    with Rehearsal(DETECTED, double=True) as rehearsal:
        images = torch.empty(full.fid.batch_size, 3, 256, 256, dtype=torch.uint8, device=META)
        moments.update(detector.features(images))
        found = detector.outputs(images)
    assert moments.m2.shape == (2048, 2048) and rehearsal.seen == dict.fromkeys(DETECTED, 2)
    assert found.spatial.shape == (len(images), 2023) and found.logits.shape == (len(images), 1008)


def test_the_encoder_as_a_detector(autoencoder):
    made = autoencoder.encoder

    def at(size):
        with META:
            mean, std = [0.5] * 3, [0.5] * 3
            return Encoder("dinov2", Backbone(made.model, made._run, made.hidden_size, 14, mean, std), size)

    detector = Detector("tokens", "0", made.hidden_size, False, encoder._Tokens(made, at), META)
    for side in (256, 32, 32):  # the encoder is loaded again for another size of images
        with Rehearsal(DETECTED) as rehearsal:
            features = detector.features(torch.empty(BATCH, 3, side, side, dtype=torch.uint8, device=META))
        assert features.shape == (BATCH, SHAPE[0]) and features.dtype == torch.float32
        assert sum(rehearsal.seen.values()) == 1, side
