"""The precision ``reference``: sampling rounds as the published sampler does, in bf16 arithmetic written out here."""

import itertools

import pytest
import torch

from mmfm import config
from mmfm.flow.guidance import classifier_free_guidance
from mmfm.flow.path import time_grid, time_shift
from mmfm.flow.source import MixtureSource, source_for
from mmfm.generation.sampler import SampleFiles, Sampler
from mmfm.infra import rng
from mmfm.mixture.spatial import SpatialMixture
from support.sample_runs import files, weights, write_ema  # noqa: F401 (fixtures)
from support.tiny import CHANNELS, GRID, SECTIONS, SIZE

SHAPE, BF16 = (CHANNELS, GRID, GRID), torch.bfloat16
NUMBERS = range(3)


def load(files, ema, guide=None, **keys) -> Sampler:
    section = config.build(config.Sample, {**SECTIONS["sample"], "precision": "reference", **keys}, "sample")
    encoder = config.build(config.Encoder, SECTIONS["encoder"], "encoder")
    read = SampleFiles(ema, files.decoder, files.stats, files.encoder, files.spatial_gmm, guide)
    return Sampler(read, section, encoder, SIZE, 0, "cpu")


def literal_source(files, modes, noise) -> torch.Tensor:
    """Mean and deviation in bf16, their product and sum each rounded to bf16."""
    spatial = SpatialMixture.open(files.spatial_gmm)
    means = spatial.load_means(torch.device("cpu"), torch.float32)[modes].to(BF16)
    deviations = torch.as_tensor(spatial.load_variances())[modes].sqrt().to(BF16).view(-1, 1, 1, 1)
    product = (deviations.float() * noise.to(BF16).float()).to(BF16)
    return (means.float() + product.float()).to(BF16)


def literal_flow(velocity, x) -> torch.Tensor:
    """Euler steps in bf16; a step length is a difference of float32 times, rounded in the product."""
    times = time_grid(SECTIONS["sample"]["time_points"], time_shift(SHAPE))
    for now, after in itertools.pairwise(times):
        length = (after - now).to(BF16).float()
        step = (length * velocity(x, now.to(BF16).expand(len(x))).float()).to(BF16)
        x = (x.float() + step.float()).to(BF16)
    return x


def literal_images(sampler: Sampler, x: torch.Tensor) -> torch.Tensor:
    """Decode in bf16 autocast: statistics in float32, then the decoder, then clamp, scale and truncate."""
    rae = sampler.autoencoder
    latent = x.float() * rae.latent_std + rae.latent_mean
    with torch.autocast("cpu", BF16):
        decoded = rae.decoder(latent.flatten(2).transpose(1, 2))
    images = decoded * rae.encoder.image_std.view(3, 1, 1) + rae.encoder.image_mean.view(3, 1, 1)
    return (images.float().clamp(0, 1) * 255).to(torch.uint8)


def test_sampling_with_autoguidance_rounds_everything_to_bf16(files, weights):
    guidance = {"scale": 1.7, "interval": [0.0, 0.9]}
    sampler = load(files, weights["mode"], weights["guide"], guidance=guidance)
    modes = sampler.generator.draw(NUMBERS).modes
    noise = rng.normal(0, "sample/noise", torch.arange(3), SHAPE)
    x = literal_source(files, modes, noise)
    assert torch.equal(sampler.generator.draw_source(NUMBERS), x)

    def network(model, x, t):
        with torch.autocast("cpu", BF16), torch.no_grad():
            return model(x, t, modes).to(BF16)

    def guided(x, t):
        strong = network(sampler.model, x, t)
        if not 0.0 <= t[0] <= 0.9:
            return strong
        weak = network(sampler.guide, x, t)
        difference = (strong.float() - weak.float()).to(BF16)
        return (weak.float() + (1.7 * difference.float()).to(BF16).float()).to(BF16)

    end = literal_flow(guided, x)
    latents, evaluations = sampler.generator.latents(sampler.field, NUMBERS)
    assert torch.equal(latents, end.float()) and evaluations == 3
    images, _ = sampler.generate(NUMBERS)
    with torch.no_grad():
        assert torch.equal(images, literal_images(sampler, end))


def test_every_other_precision_computes_them_in_float32(files, weights):
    for precision in ("float32", "bf16"):
        sampler = load(files, weights["gmm"], precision=precision)
        drawn = sampler.generator.draw(NUMBERS)
        x = sampler.source.draw(drawn.modes, drawn.noise)
        assert drawn.noise.dtype == x.dtype == torch.float32
        assert not torch.equal(x, x.to(BF16).float()), "not rounded on the way"
        with torch.no_grad():
            whole = sampler.generator.decode(x)
            tokens = (x * sampler.autoencoder.latent_std + sampler.autoencoder.latent_mean).flatten(2).transpose(1, 2)
            decoded = sampler.autoencoder.decoder(tokens)
        std, mean = (
            v.view(3, 1, 1) for v in (sampler.autoencoder.encoder.image_std, sampler.autoencoder.encoder.image_mean)
        )
        assert torch.equal(whole, ((decoded * std + mean).clamp(0, 1) * 255).to(torch.uint8))


def test_classifier_free_guidance_has_the_dtype_it_is_given():
    def velocity(x, t, y):
        return (x + y.view(-1, 1)).to(BF16)

    x, t, labels = torch.rand(2, 5).to(BF16), torch.full((2,), 0.5), torch.tensor([1, 2])
    strong, weak = velocity(x, t, labels), velocity(x, t, torch.tensor([7, 7]))
    found = classifier_free_guidance(velocity, labels, 7, 1.7, dtype=BF16)(x, t)
    assert found.dtype == BF16 and torch.equal(found, weak + 1.7 * (strong - weak))
    assert classifier_free_guidance(velocity, labels, 7, 1.7)(x, t).dtype == torch.float32


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2, 2)])
def test_means_and_deviations_of_training_are_rounded_and_its_noise_is_not(shape):
    generator = torch.Generator().manual_seed(0)
    means, variances = torch.randn(3, 2, 2, 2, generator=generator), torch.rand(shape, generator=generator) + 0.1
    noise, modes = torch.randn(4, 2, 2, 2, generator=generator), torch.tensor([0, 2, 1, 2])
    source = MixtureSource(means.to(BF16), variances, torch.ones(3), rounded=True)
    deviations = variances.sqrt().to(BF16).float()[modes].view(4, *(shape[1:] or (1, 1, 1)))
    wanted = means.to(BF16).float()[modes] + deviations * noise
    found = source.draw(modes, noise)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    exact = MixtureSource(means.to(BF16), variances, torch.ones(3)).draw(modes, noise)
    assert (exact - found).abs().max() > 1e-4, "the deviations matter"


def test_sampling_takes_the_means_that_the_weights_record(files, tmp_path):
    section = config.build(config.Train, {**SECTIONS["train"], "means_precision": "reference"})
    recorded = {"settings": {"train": config.keys_of_kind(section, "identity")}}
    sampler = load(files, write_ema(tmp_path / "e.safetensors", files, "gmm", recorded=recorded), precision="float32")
    assert sampler.means_precision == "reference" and sampler.source.rounded and sampler.source.means.dtype == BF16
    drawn = sampler.generator.draw(NUMBERS)
    trained = source_for("gmm", files.spatial_gmm, "cpu", precision="reference")
    assert torch.equal(sampler.source.draw(drawn.modes, drawn.noise), trained.draw(drawn.modes, drawn.noise))


def test_interpolation_and_trajectories_work_in_bf16(files, weights):
    from mmfm.generation.between import between
    from mmfm.generation.trajectory import trajectory

    sampler = load(files, weights["class_gmm"])
    first, last = sampler.generator.draw(range(1)), sampler.generator.draw(range(1, 2))
    x, velocity = between(sampler.source, sampler.field, first, last, torch.linspace(0, 1, 3))
    assert x.dtype == BF16 and torch.equal(x[0], sampler.source.draw(first.modes, first.noise)[0])
    path = trajectory(sampler.generator, velocity, x)
    assert path.states.dtype == torch.float32
    assert torch.equal(path.states[-1], sampler.generator.follow(velocity, x)[0])
