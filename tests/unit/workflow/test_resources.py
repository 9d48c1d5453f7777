"""The estimated resources against what they describe, and the document against what the code prints."""

import dataclasses

import pytest
import torch

from mmfm import config
from mmfm.autoencoder import latent_cache
from mmfm.autoencoder.decoder import Decoder, DecoderConfig
from mmfm.cli.__main__ import main
from mmfm.mixture import groups, initial, kmeans, split_merge
from mmfm.models.dit import DiT, DiTConfig
from mmfm.workflow import costs, resources
from mmfm.workflow.facts import Facts
from mmfm.workflow.resources import Estimator
from support.places import ROOT

FULL = config.load([ROOT / "config" / "config.yaml", ROOT / "config" / "imagenet256.yaml"])


def test_the_document_shows_what_is_printed(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["scale", "--config", "config/imagenet256.yaml"]) == 0
    shown = (ROOT / "docs" / "scale.md").read_text().split("imagenet256.yaml -->\n")[1].split("\n<!-- end")[0]
    assert shown == capsys.readouterr().out.strip()


@pytest.mark.parametrize(("name", "published"), [("XL", 839e6), ("S", 196e6)])
def test_parameters_of_the_models(name, published):
    sizes = FULL.models[name]
    with torch.device("meta"):
        model = DiT(DiTConfig(16, 1, 768, sizes.hidden_size, sizes.depth, sizes.num_heads, 1000, 0.1))
    real = sum(p.numel() for p in model.parameters())
    assert costs.dit_parameters(sizes, 768, 1001) == pytest.approx(real, rel=0.01)
    assert real == pytest.approx(published, rel=0.01)


def test_parameters_of_the_decoder():
    d = FULL.decoder
    with torch.device("meta"):
        sizes = DecoderConfig(768, d.hidden_size, d.intermediate_size, d.num_heads, d.num_layers, 16, 256)
        real = sum(p.numel() for p in Decoder(sizes).parameters())
    assert costs.decoder_parameters(d) == pytest.approx(real, rel=0.02)


def test_files_of_a_fixed_layout_are_exact():
    full = Estimator(FULL, "dinov2", 8, True)
    assert full.spatial_gmm().disk == 8192 * 768 * 16 * 16 * 4
    assert full.extract().disk == pytest.approx(1_281_167 * 768 * 4, rel=0.2)


def test_the_latent_cache_is_counted_where_there_is_one():
    def estimator(cache, n_images):
        latents = dataclasses.replace(FULL.latents, cache=cache)
        return Estimator(dataclasses.replace(FULL, latents=latents), "dinov2", 1, True, Facts(n_images, 110_000, ""))

    row = 4 * 768 * (16 * 16 + 1)
    few, many, off = estimator("auto", 10_000), estimator("auto", 100_000), estimator("off", 10_000)
    assert few.cached(2) == 10_000 * 2 * row and many.cached() == off.cached() == 0
    assert estimator("on", 100_000).cached() == 100_000 * row
    for name, views in {"extract": 1, "spatial_gmm": 1, "train_decoder": 1, "train": 2, "sample": 0}.items():
        with_cache, without = few.stages()[name], off.stages()[name]
        assert with_cache.disk - without.disk == pytest.approx(10_000 * views * row)
    assert few.train().flops < off.train().flops, "an image is encoded twice, not once an epoch"
    assert few.train().device == pytest.approx(off.train().device, rel=0.2)


def test_scale_tells_what_the_latent_cache_takes(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    call = ["scale", "--config", "config/imagenet256.yaml", "--gpus", "1", "--images"]
    said = [main([*call, n]) == 0 and capsys.readouterr().out.splitlines()[-1] for n in ("1000", "100000")]
    assert said[0] == "The latent cache in latents/ takes 1.6 GB, which the stages' disk includes."
    assert "more than 20.0 GB" in said[1]


def test_more_processes_take_less_time_and_no_more_memory_each():
    one, two, eight = (Estimator(FULL, "dinov2", n, True).stages() for n in (1, 2, 8))
    for name in ("extract", "fit_gmm", "spatial_gmm", "train", "train_decoder", "sample", "fid"):
        assert eight[name].seconds < one[name].seconds and eight[name].device <= two[name].device
    parameters = costs.dit_parameters(FULL.models["XL"], 768, 8192)
    assert two["train"].device - one["train"].device == pytest.approx(costs.FLOAT * parameters), "DDP's gradients"
    assert one["train"].mem_mb(2, False) > 2 * one["train"].mem_mb(1, True)


def test_constants_are_those_of_the_code():
    assert resources.SEEDING_ITERATIONS == initial.KMEANS_ITERATIONS
    redistribution = split_merge._HALVINGS + 2
    assert 2 + (kmeans.ROUNDS + 1) * kmeans.ITERATIONS + kmeans.ROUNDS * redistribution == resources.START_PASSES
    assert (latent_cache.AUTO_LIMIT, latent_cache.BATCH) == (resources.CACHE_LIMIT, resources.CACHE_BATCH)
    assert (resources.CANDIDATES, resources.GROUP_ROWS) == (kmeans.CANDIDATES, groups.GROUP_ROWS)


def test_distances_during_training_cost_what_sampling_them_costs():
    def estimate(every):
        preview = dataclasses.replace(FULL.train.preview, fid_every=every, fid_images=50_000)
        train = dataclasses.replace(FULL.train, preview=preview)
        return Estimator(dataclasses.replace(FULL, train=train), "dinov2", 8, True)

    steps = 80 * (1_281_167 // 1024)
    off, twice = estimate(0), estimate(steps // 2)
    more = (twice.train().flops - off.train().flops) / 2
    assert more == pytest.approx(off.sample().flops + off.fid().flops, rel=0.02)
    assert off.train().device == twice.train().device  # a step's activations take more


def test_a_checkpoint_passes_through_the_memory_of_the_main_process():
    """All of it where it is gathered from shards, the largest file where it comes from a GPU."""

    def memory(sharding, processes, on_gpu):
        configuration = dataclasses.replace(FULL, train=dataclasses.replace(FULL.train, sharding=sharding))
        need = Estimator(configuration, "dinov2", processes, on_gpu).train()
        return need.mem_mb(processes, on_gpu) - int(processes * (need.host + (0 if on_gpu else need.device)) / 1e6)

    weights = 4 * 847e6 / 1e6
    assert memory("fsdp", 8, True) == pytest.approx(4 * weights, rel=0.01)
    assert memory("ddp", 8, True) == memory("fsdp", 1, True) == pytest.approx(weights, rel=0.01)
    assert memory("fsdp", 2, False) == pytest.approx(4 * weights, rel=0.01) and memory("ddp", 2, False) == 0


@pytest.mark.parametrize("stage", ["train", "sample"])
@pytest.mark.parametrize(("precision", "size"), [("auto", 2), ("float32", 4)])
def test_means_in_pinned_memory_are_counted_on_the_host(stage, precision, size):
    """A scheduler would end the job otherwise. Pinned memory is rounded up to a power of two."""

    def need(where, on_gpu):
        config = dataclasses.replace(FULL, train=dataclasses.replace(FULL.train, means_precision=precision))
        section = dataclasses.replace(getattr(config, stage), means_device=where)
        return getattr(Estimator(dataclasses.replace(config, **{stage: section}), "dinov2", 8, on_gpu), stage)()

    device, host = need("device", True), need("host", True)
    assert host.host - device.host == size * 2**31 and device.device - host.device == 8192 * 768 * 256 * size
    assert need("host", False).mem_mb(8, False) == need("device", False).mem_mb(8, False)
