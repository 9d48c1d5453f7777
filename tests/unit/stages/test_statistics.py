"""Latent statistics that are given, or have no mean: from their file through training, sampling and decoding."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfm import config, data
from mmfm.autoencoder import rae
from mmfm.autoencoder.decoder import load_decoder
from mmfm.autoencoder.encoders import load_encoder
from mmfm.cli.__main__ import main
from mmfm.data.moments import Moments
from mmfm.generation.sampler import SampleFiles, Sampler
from mmfm.infra import rng, store
from mmfm.training.latents import BatchPlan
from support import sample_runs, train_runs
from support.tiny import CHANNELS, GRID, SECTIONS, SIZE, Pipeline

SHAPE = (CHANNELS, GRID, GRID)


def take(given: Path, out: Path, *more: str, **keys) -> int:
    """Run the stage on a given file and return its exit status."""
    section = json.dumps({"latent_stats": {**SECTIONS["latent_stats"], **keys}})
    line = ["latent_stats", "--settings", section, "--given", str(given), "--out", str(out / "stats.pt")]
    return main([*line, "--out-json", str(out / "stats.json"), *more])


@pytest.fixture(scope="module")
def published(tiny_pipeline: Pipeline, tmp_path_factory) -> Pipeline:
    """The tiny pipeline with statistics taken from a file of the published layout, which has no mean."""
    folder = tmp_path_factory.mktemp("published")
    var = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) * 3 + 0.1
    torch.save({"mean": None, "var": var}, folder / "stat.pt")
    encoder = ["--encoder-weights", str(tiny_pipeline.encoder), "--input-size", str(SIZE)]
    assert take(folder / "stat.pt", folder, *encoder) == 0
    return replace(tiny_pipeline, stats=folder / "stats.pt")


def test_the_outputs_are_those_of_computed_statistics(published):
    found = torch.load(published.stats, weights_only=True)
    given = torch.load(published.stats.with_name("stat.pt"), weights_only=True)
    assert found["mean"] is None and torch.equal(found["var"], given["var"])
    about = store.read_json(published.stats.with_name("stats.json"))
    assert about["digest"] == store.file_digest(published.stats) and about["latent_shape"] == list(SHAPE)
    assert about["given_digest"] == store.file_digest(published.stats.with_name("stat.pt"))
    assert about["mean_range"] is None and "listing_digest" not in about


def test_the_mean_of_a_file_is_left_out_on_request(tiny_pipeline, tmp_path):
    for mean, name in ((True, "with"), (False, "without")):
        (tmp_path / name).mkdir()
        assert take(tiny_pipeline.stats, tmp_path / name, mean=mean) == 0
    given = torch.load(tiny_pipeline.stats, weights_only=True)
    kept, left_out = (torch.load(tmp_path / n / "stats.pt", weights_only=True) for n in ("with", "without"))
    assert torch.equal(kept["mean"], given["mean"]) and left_out["mean"] is None
    assert torch.equal(kept["var"], given["var"]) and torch.equal(left_out["var"], given["var"])


def test_computed_statistics_may_leave_out_the_mean(tmp_path):
    moments, latents = Moments.zeros((2, 3, 3)), torch.rand(7, 2, 3, 3)
    moments.update(latents)
    about = {"digest": "m", "listing_digest": "l", "encoder_digest": "e"}
    store.write_arrays(tmp_path / "moments.safetensors", moments.to_arrays(), about)
    line = ["latent_stats", "--moments", str(tmp_path / "moments.safetensors"), "--out-json", str(tmp_path / "s.json")]
    for mean in (True, False):
        section = json.dumps({"latent_stats": {"mean": mean}})
        assert main([*line, "--settings", section, "--out", str(tmp_path / f"{mean}.pt")]) == 0
    whole, divided = (torch.load(tmp_path / f"{mean}.pt", weights_only=True) for mean in (True, False))
    torch.testing.assert_close(whole["mean"], latents.mean(0))
    torch.testing.assert_close(whole["var"], latents.var(0, correction=0))
    assert divided["mean"] is None and torch.equal(divided["var"], whole["var"])


def test_another_shape_than_the_encoders_is_one_line_with_both(tiny_pipeline, tmp_path, capsys):
    torch.save({"mean": None, "var": torch.ones(CHANNELS, 7, 7)}, tmp_path / "stat.pt")
    encoder = ["--encoder-weights", str(tiny_pipeline.encoder), "--input-size", str(SIZE)]
    assert take(tmp_path / "stat.pt", tmp_path, *encoder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"({CHANNELS}, 7, 7), expected ({CHANNELS}, {GRID}, {GRID}); use the statistics for this encoder" in line


def test_no_code_in_a_given_file_is_run(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"mean": Evil(), "var": torch.ones(SHAPE)}, tmp_path / "stat.pt")
    assert take(tmp_path / "stat.pt", tmp_path) == 2 and not (tmp_path / "touched").exists()


def literal(published: Pipeline, images: list[int]) -> torch.Tensor:
    """Return z / sqrt(var + 1e-5) of images, written out."""
    pixels = next(data.image_batches(published.listing, SIZE, [images]))[1]
    z = load_encoder("dinov2", published.encoder, SIZE)(pixels.float() / 255).latent
    return z / torch.sqrt(torch.load(published.stats, weights_only=True)["var"] + 1e-5)


def test_training_divides_latents_and_does_not_centre_them(published, tmp_path):
    """A new model predicts no velocity, so the first loss is that of the target: noise minus latents."""
    out = train_runs.run(published, tmp_path, "uncond", flip=False, epochs=1, log_every=1)
    plan = BatchPlan(0, published.n_images, 8)
    images, keys = plan.images(range(8)), torch.arange(8)
    target = rng.normal(0, "train/noise", keys, SHAPE) - literal(published, images.tolist())
    ((step, loss), *_) = train_runs.history(out, "step", "loss")
    assert step == 1 and loss == pytest.approx(target.square().mean().item(), rel=1e-5)


def test_decoding_multiplies_and_adds_nothing(published, tmp_path):
    """With one time point `sample` decodes the source itself."""
    ema = sample_runs.write_ema(tmp_path / "ema.safetensors", published, "uncond")
    images, _ = sample_runs.run(published, ema, tmp_path / "out", n_images=4, time_points=1, batch_size=4)
    std = torch.sqrt(torch.load(published.stats, weights_only=True)["var"] + 1e-5)
    z = rng.normal(3, "sample/noise", torch.arange(4), SHAPE) * std
    decoded = load_decoder(published.decoder)(z.flatten(2).transpose(1, 2)).detach()
    about = store.read_json(published.encoder / "preprocessor_config.json")
    mean, deviation = (torch.tensor(about[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    wanted = ((decoded * deviation + mean).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.abs(images.astype(int) - wanted).max() <= 1 and wanted.std() > 1


def test_sampling_ends_in_latents_that_are_multiplied(published, tmp_path):
    """Half the variance with the same flow: every pixel of the decoder's input is smaller by the square root of 2."""
    halved = tmp_path / "stats.pt"
    var = torch.load(published.stats, weights_only=True)["var"]
    torch.save({"mean": None, "var": (var + 1e-5) / 2 - 1e-5}, halved)
    seen = []
    for stats in (published.stats, halved):
        ema = sample_runs.write_ema(tmp_path / f"{len(seen)}.safetensors", published, "gmm")
        files = SampleFiles(ema, published.decoder, stats, published.encoder, published.spatial_gmm)
        section = config.build(config.Sample, SECTIONS["sample"], "sample")
        encoder = config.build(config.Encoder, SECTIONS["encoder"], "encoder")
        sampler = Sampler(files, section, encoder, SIZE, 0, "cpu")
        sampler.autoencoder.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        sampler.generate(range(3))
    torch.testing.assert_close(seen[1], seen[0] / 2**0.5)


def test_the_autoencoder_encodes_by_the_same_formula(published):
    images = list(range(5))
    autoencoder = rae.RAE(load_encoder("dinov2", published.encoder, SIZE), None, *rae.load_statistics(published.stats))
    pixels = next(data.image_batches(published.listing, SIZE, [images]))[1]
    assert torch.equal(autoencoder.encode(pixels.float() / 255).latent, literal(published, images))
