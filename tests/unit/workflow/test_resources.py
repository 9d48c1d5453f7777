"""The estimated resources against what they describe, and the document against what the code prints."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch

from mmfm import config
from mmfm.autoencoder import latent_cache
from mmfm.autoencoder.decoder import Decoder, DecoderConfig
from mmfm.cli.__main__ import main
from mmfm.config.choices import CARDS
from mmfm.flow.path import time_shift
from mmfm.mixture import groups, initial, kmeans, split_merge
from mmfm.models.dit import DiT, DiTConfig
from mmfm.models.flops import dit_flops
from mmfm.stages import train_decoder
from mmfm.training.options import LoopOptions
from mmfm.training.setup import loop_options
from mmfm.training.trainer import Trainer
from mmfm.workflow import costs, resources
from mmfm.workflow.facts import Facts
from mmfm.workflow.outlook import duration
from mmfm.workflow.resources import Estimator
from support.places import ROOT

DOCUMENT = ROOT / "docs" / "scale.md"
FULL = config.load([ROOT / "config" / "config.yaml", ROOT / "config" / "imagenet256.yaml"])


def test_the_document_shows_what_is_printed(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    parts = re.findall(r"<!-- printed by: mmfm (.*?) -->\n(.*?)\n<!-- end", DOCUMENT.read_text(), re.DOTALL)
    assert len(parts) == 2
    for command, shown in parts:
        assert main(command.split()) == 0
        assert shown == capsys.readouterr().out.strip()


def test_the_document_says_what_fits_each_card():
    for card in CARDS.keys() - {"auto"}:

        def estimate(card=card, **train):
            section = dataclasses.replace(FULL.train, **train)
            return Estimator(dataclasses.replace(FULL, card=card, train=section), "dinov2", 8, True)

        fits = [
            estimate(**more).largest_micro_batch() for more in ({}, {"checkpoint_activations": True}, {"model": "S"})
        ]
        need = estimate(micro_batch=fits[0]).train()
        taken = [f"{need.device / 1e9:.1f} GB", duration(need.seconds)] if fits[0] else ["-", "-"]
        first, *rest = (f"{images or '-'}" for images in fits)
        row = f"| {card} | {CARDS[card].memory / 1e9:.1f} GB | {first} | {' | '.join(taken)} | {' | '.join(rest)} |"
        assert row in DOCUMENT.read_text().splitlines(), row


@pytest.mark.parametrize(("name", "published"), [("XL", 839e6), ("S", 196e6)])
def test_parameters_of_the_models(name, published):
    sizes = FULL.models[name]
    with torch.device("meta"):
        model = DiT(DiTConfig(16, 1, 768, sizes.hidden_size, sizes.depth, sizes.num_heads, 1000, 0.1))
    real = sum(p.numel() for p in model.parameters())
    assert costs.dit_parameters(sizes, 768, 1001) == pytest.approx(real, rel=0.01)
    assert real == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("width", "depth", "channels", "tokens", "patch"),
    [(1152, 28, 768, 256, 16), (192, 4, 384, 16, 8), (1152, 28, 768, 256, 256)],
)
def test_parameters_of_the_decoder(width, depth, channels, tokens, patch):
    """Of the published one, of one for a CPU, and of one with more weights in its output layer than in all blocks."""
    d = dataclasses.replace(FULL.decoder, hidden_size=width, num_layers=depth)
    with torch.device("meta"):
        sizes = DecoderConfig(channels, width, d.intermediate_size, d.num_heads, depth, patch, tokens)
        real = sum(p.numel() for p in Decoder(sizes).parameters())
    assert costs.decoder_parameters(d, channels, tokens, patch) == real


def test_large_images_cost_a_decoder_memory_disk_and_time():
    """Their patches grow, not their number."""
    small, large = (
        Estimator(dataclasses.replace(FULL, image=dataclasses.replace(FULL.image, size=size)), "dinov2", 1, True)
        for size in (256, 4096)
    )
    weights = 3 * (256**2 - 16**2) * 1153
    trained, used = (
        getattr(large, stage)().device - getattr(small, stage)().device for stage in ("train_decoder", "sample")
    )
    assert trained > 16 * weights and used > 4 * weights
    assert large.train_decoder().disk - small.train_decoder().disk > 12 * weights
    for stage in ("train_decoder", "sample", "reconstruction", "mode_quality"):
        assert getattr(large, stage)().flops > getattr(small, stage)().flops, stage


@pytest.mark.parametrize("stage", ["train", "train_decoder"])
def test_the_trainer_demands_the_disk_space_of_the_estimate(stage, tmp_path, monkeypatch):
    """For all of ImageNet's checkpoints, milestones included, without a model: a job gets what its rule asks for."""
    asked, estimate = [], getattr(Estimator(FULL, "dinov2", 8, True), stage)()
    monkeypatch.setattr("mmfm.infra.disk.require", lambda state, name, total, written: asked.append(total))
    d, train, steps = FULL.decoder, FULL.train, 1251
    with torch.device("meta"):
        if stage == "train":
            sizes, average, options = FULL.models[train.model], object(), loop_options(train, steps)
            model = DiT(DiTConfig(16, 1, 768, sizes.hidden_size, sizes.depth, sizes.num_heads, 8192, 0.0))
        else:
            average, options = None, LoopOptions(1, 1, train_decoder._KEEP_CHECKPOINTS)
            model = Decoder(DecoderConfig(768, d.hidden_size, d.intermediate_size, d.num_heads, d.num_layers, 16, 256))
    trainer = SimpleNamespace(model=model, ema=average, options=options, state=tmp_path, stage=stage)
    Trainer._require_disk(trainer, 0, train.epochs * steps)
    assert estimate.disk == pytest.approx(asked[0], rel=0.02)
    assert 1e6 * estimate.disk_mb > asked[0], "the rule asks for enough"


def test_no_rule_asks_for_more_time_than_schedulers_give():
    """A job that is cut off resumes in the next one."""
    estimate = Estimator(FULL, "dinov2", 1, True).train()
    assert estimate.seconds > 86400 and estimate.minutes == 24 * 60
    longer = dataclasses.replace(FULL, max_runtime_hours=1e4)
    assert Estimator(longer, "dinov2", 1, True).train().minutes > 24 * 60


def test_micro_batches_that_fit():
    def largest(card, processes=8, **train):
        section = dataclasses.replace(FULL.train, **train)
        configuration = dataclasses.replace(FULL, card=card, train=section)
        return Estimator(configuration, "dinov2", processes, True).largest_micro_batch()

    fits = {"A100-40GB": 16, "L40S": 32, "A100-80GB": 64, "H100": 64, "H200": 128, "RTX4090": 0}
    assert {card: largest(card) for card in fits} == fits
    assert largest("RTX4090", means_device="host", sharding="fsdp") >= 16
    assert largest("A100-40GB", checkpoint_activations=True) == 128
    preset = Estimator(dataclasses.replace(FULL, card="A100-40GB"), "dinov2", 8, True)
    assert preset.train().device < costs.USABLE * 40 * 2**30, "the preset's micro-batch fits the smallest card it names"


def test_recomputed_activations_cost_a_forward_pass_and_compiled_blocks_save_time():
    def need(**train):
        section = dataclasses.replace(FULL.train, **train)
        return Estimator(dataclasses.replace(FULL, train=section), "dinov2", 8, True).train()

    usual, recomputed = need(compile=False), need(compile=False, checkpoint_activations=True)
    assert recomputed.work.half == pytest.approx(usual.work.half * 4 / 3) and recomputed.device < usual.device
    compiled = need(compile=True)
    assert compiled.flops == usual.flops and compiled.seconds < usual.seconds


@pytest.mark.parametrize(
    ("listed", "card"),
    [
        ("NVIDIA A100-SXM4-40GB\n", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB\nNVIDIA A100-SXM4-80GB\n", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe\n", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3\n", "H100"),
        ("NVIDIA H200\n", "H200"),
        ("NVIDIA GH200 480GB\n", costs.DEFAULT_CARD),
        ("NVIDIA L40S\n", "L40S"),
        ("NVIDIA GeForce RTX 4090\n", "RTX4090"),
        ("Tesla T4\n", costs.DEFAULT_CARD),
        ("", costs.DEFAULT_CARD),
    ],
)
def test_the_card_is_the_visible_one(listed, card, monkeypatch):
    monkeypatch.setattr(costs.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(costs.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=listed))
    assert costs.card_of("auto") == (card, CARDS[card]) and costs.card_of("L40S")[0] == "L40S"


def test_a_broken_driver_leaves_the_default(monkeypatch):
    def broken(*_, **__):
        raise costs.subprocess.CalledProcessError(9, "nvidia-smi")

    monkeypatch.setattr(costs.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(costs.subprocess, "run", broken)
    assert costs.card_of("auto")[0] == costs.DEFAULT_CARD


def test_measured_steps_are_those_of_the_formulas():
    """One H200, one process, bf16, eager, micro-batches of 32, without encoder and means: docs/performance.md."""
    for name, seconds, peak in (("XL", 0.153, 32.7e9), ("S", 0.058, 9.1e9)):
        model = FULL.models[name]
        flops = 3 * 32 * dit_flops(model, 256, 768)
        memory = 32 * costs.dit_activations(model, 256, 768)
        memory += costs.dit_parameters(model, 768) * (costs.TRAINED_BYTES + costs.EMA_BYTES + costs.COPY_BYTES)
        assert memory == pytest.approx(peak, rel=0.1)
        assert 0.7 * CARDS["H200"].half < flops / seconds < 1.1 * CARDS["H200"].half


@pytest.mark.parametrize(("precision", "measured"), [("float32", 932), ("tf32", 2906), ("bf16", 7010)])
def test_an_encoder_takes_the_time_of_its_precision(precision, measured):
    """DINOv2-base on one H100: docs/performance.md. Less than 1.05 times as fast, and at least half."""
    entry = dataclasses.replace(FULL.encoders["dinov2"], precision=precision)
    section = dataclasses.replace(FULL.extract, workers=1000)
    read = dataclasses.replace(FULL, card="H100", encoders={"dinov2": entry}, extract=section)
    found = Estimator(read, "dinov2", 1, True).extract()
    assert 0.5 * measured < costs.IMAGENET_IMAGES / found.seconds < 1.05 * measured
    assert found.flops == Estimator(FULL, "dinov2", 1, True).extract().flops


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
    for name in ("extract", "fit_gmm", "spatial_gmm", "train", "train_decoder", "sample", "fid", "mode_quality"):
        assert eight[name].seconds < one[name].seconds and eight[name].device <= two[name].device
    parameters = costs.dit_parameters(FULL.models["XL"], 768, 8192)
    assert two["train"].device - one["train"].device == pytest.approx(costs.FLOAT * parameters), "DDP's gradients"
    assert one["train"].mem_mb(2, False) > 2 * one["train"].mem_mb(1, True)


def test_constants_are_those_of_the_code():
    assert resources.SEEDING_ITERATIONS == initial.KMEANS_ITERATIONS
    redistribution = split_merge._HALVINGS + 2
    assert 2 + (kmeans.ROUNDS + 1) * kmeans.ITERATIONS + kmeans.ROUNDS * redistribution == resources.START_PASSES
    assert resources.KEPT_DECODERS == train_decoder._KEEP_CHECKPOINTS
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


@pytest.mark.parametrize(
    ("about", "size", "expected"),
    [
        ({"model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12, "patch_size": 14}, 224, (384, 12, 16)),
        ({"vision_config": {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14}}, 196, (1024, 24, 14)),
        ({"architecture": "vit_giant_patch14_dinov2", "num_features": 1536}, 448, (1536, 40, 32)),
        ({"architecture": "vit_large_patch16_dinov3", "num_features": 1024}, 512, (1024, 24, 32)),
        (
            {"architecture": "vit_base_patch16_224", "num_features": 768, "model_args": {"patch_size": 8, "depth": 3}},
            224,
            (768, 3, 28),
        ),
    ],
)
def test_sizes_are_those_of_the_encoders_folder(about, size, expected, tmp_path):
    """Given, or fetched by an earlier run; of an id that is not fetched yet, those of a base model."""
    folder = tmp_path / "fetched" / "models" / "some" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(about))
    for weights in (str(folder), "hf:some/model"):
        found = costs.encoder_size(weights, size, 16, str(tmp_path / "fetched"))
        assert (found.width, found.depth, found.grid) == expected
    assert costs.encoder_size("hf:other/model", 256, 16, str(tmp_path / "fetched")).width == 768


@pytest.mark.parametrize("shape", [(384, 16, 16), (1024, 14, 14), (1536, 32, 32)])
def test_latents_of_every_size_have_models_decoders_and_memory(shape, tmp_path):
    channels, side, _ = shape
    assert time_shift(shape) == pytest.approx((channels * side**2 / 4096) ** 0.5)
    with torch.device("meta"):
        sizes = DecoderConfig(channels, 32, 64, 2, 1, patch_size=8, num_patches=side**2)
        assert Decoder(sizes)(torch.empty(1, side**2, channels)).shape == (1, 3, 8 * side, 8 * side)
        model = DiT(DiTConfig(side, 1, channels, (64, 64), (1, 1), (2, 2), 0, 0.0))
        assert model(torch.empty(1, *shape), torch.empty(1)).shape == (1, *shape)
    about = {"model_type": "dinov2", "hidden_size": channels, "num_hidden_layers": 12, "patch_size": 14}
    (tmp_path / "config.json").write_text(json.dumps(about))
    entry = dataclasses.replace(FULL.encoders["dinov2"], weights=str(tmp_path), input_size=14 * side)
    found, usual = (
        Estimator(dataclasses.replace(FULL, encoders={"dinov2": each}), "dinov2", 1, True)
        for each in (entry, FULL.encoders["dinov2"])
    )
    ratio = channels * side**2 / (768 * 16**2)
    assert found.means == pytest.approx(ratio * usual.means)
    assert found.spatial_gmm().disk == pytest.approx(ratio * usual.spatial_gmm().disk, rel=0.01)
    assert (found.train().device > usual.train().device) == (side > 16)
