"""Measure the stages' inner loops at ImageNet-256's sizes on one GPU, beside the estimates of `mmfm scale`.

python benchmarks/gpu.py [--parts train couple em encode sample] [--compile off on] [--micro-batches 16 32 64]

All weights, latents and tokens are random: only speed and memory are measured. A training step is a whole step of the
trainer (one micro-batch, clipping, AdamW, EMA) without encoder. Times are medians of synchronised repetitions after
warm-up. `--tiny` takes toy sizes, to try the benchmark itself on a CPU. Writes benchmarks/results/gpu.json and .md.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import runs
from mmfm import config
from mmfm.autoencoder.decoder import Decoder, DecoderConfig
from mmfm.config import Guidance
from mmfm.config.choices import CARDS, known_card
from mmfm.flow.path import time_grid, time_shift
from mmfm.flow.source import MixtureSource, couple_modes
from mmfm.generation import networks
from mmfm.infra import rng
from mmfm.infra.distributed import Ranks, driver_version
from mmfm.infra.precision import autocast
from mmfm.mixture.em import e_step
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.groups import GROUP_ROWS
from mmfm.mixture.moments import m_step
from mmfm.mixture.streaming import Rows
from mmfm.mixture.truncated import Truncation, exact_winners, truncated_e_step
from mmfm.models.flops import decoder_flops, dit_flops
from mmfm.models.layers import compile_blocks
from mmfm.training import setup, trial
from mmfm.workflow import costs

CARD, _card = costs.card_of("auto")
RATES = costs.gpu_rates(_card)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PARTS = ("train", "couple", "em", "encode", "sample")
POINTS = 50


class Sizes:
    """ImageNet-256's sizes, or toy ones.

    Attributes:
        read: the configuration whose sections are measured.
        shape: of a latent, (C, H, W).
        k: number of modes.
        tokens: tokens for EM.
        batch: images per encoder, decoder and sampling call.
        input_size: of the encoder.
    """

    def __init__(self, tiny: bool) -> None:
        files = ["config.yaml"] if tiny else ["config.yaml", "imagenet256.yaml"]
        self.tiny = tiny
        self.read = config.load([runs.ROOT / "config" / name for name in files])
        self.shape = (64, 4, 4) if tiny else (768, 16, 16)
        self.k, self.tokens, self.batch = (64, 2048, 8) if tiny else (8192, 1 << 18, 128)
        self.input_size = 28 if tiny else 224


def seconds(run: Callable[[], Any], repetitions: int, warm_up: int = 2) -> float:
    """Return the median time of a call in seconds."""
    found = []
    for turn in range(warm_up + repetitions):
        _synchronize()
        start = time.perf_counter()
        run()
        _synchronize()
        if turn >= warm_up:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def _synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _fresh() -> None:
    """Forget garbage and the peak of memory."""
    gc.collect()
    torch.compiler.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else float("nan")


def train(sizes: Sizes, name: str, micro_batches: list[int], compiled: bool, steps: int) -> list[dict[str, Any]]:
    """Measure training steps; a micro-batch that does not fit ends the list."""
    found: list[dict[str, Any]] = []
    sections = sizes.read.models[name]
    grid = sizes.shape[1] * sizes.shape[2]
    task = trial.labelled(replace(sizes.read.train, precision="bf16", compile=compiled), sizes.k, sizes.shape)
    model = setup.model(task, sections, sizes.shape).to(DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        for micro in micro_batches:
            trainer = trial.trainer(task, model, sizes.shape, micro, Path(folder), Ranks(0, 1, DEVICE))
            row: dict[str, Any] = {"model": name, "micro_batch": micro, "compile": compiled}
            row["flops"] = 3 * micro * dit_flops(sections, grid, sizes.shape[0])
            row["estimated_seconds"] = row["flops"] / RATES.half
            row["estimated_gb"] = _estimated_gb(sizes, name, micro)
            _fresh()
            try:
                forward = trainer.division.wrapped(compiled)
                batches = trial.RandomLatents(trainer.plan, DEVICE, sizes.shape).batches(0, 1 << 30)
                start = time.perf_counter()
                trainer._train_step(forward, batches)
                _synchronize()
                row["first_step_seconds"] = time.perf_counter() - start
                row["seconds"] = seconds(lambda t=trainer, f=forward, b=batches: t._train_step(f, b), steps)
                row["peak_gb"], row["loss"] = _peak_gb(), float(trainer.loss_sum) / trainer.step
            except torch.OutOfMemoryError:
                row["seconds"] = None
            found.append(row)
            print(f"train {row}", file=sys.stderr, flush=True)
            del trainer
            if row["seconds"] is None:
                break
    _fresh()
    return found


def _estimated_gb(sizes: Sizes, name: str, micro: int) -> float:
    """Return the estimate of a step's GPU memory, without encoder and source, from :mod:`mmfm.workflow.costs`."""
    model, grid = sizes.read.models[name], sizes.shape[1] * sizes.shape[2]
    kept = costs.dit_parameters(model, sizes.shape[0], sizes.k) * (
        costs.TRAINED_BYTES + costs.EMA_BYTES + costs.COPY_BYTES
    )
    return (kept + micro * costs.dit_activations(model, grid, sizes.shape[0])) / 1e9


def couple(sizes: Sizes) -> dict[str, Any]:
    """Measure posterior, mode and source of a micro-batch."""
    _fresh()
    k, (c, h, w) = sizes.k, sizes.shape
    means = torch.randn(k, c, device=DEVICE)
    mixture = Mixture(torch.full((k,), 1 / k), means.double(), torch.ones(k, c, dtype=torch.float64)).to(DEVICE)
    source = MixtureSource(
        torch.zeros(k, c, h, w, dtype=torch.bfloat16, device=DEVICE), torch.ones(k, device=DEVICE), torch.ones(k)
    )
    x, keys = torch.randn(sizes.batch, c, device=DEVICE), torch.arange(sizes.batch, device=DEVICE)

    def run() -> None:
        modes = couple_modes(mixture, x, rng.uniform(0, "benchmark/mode", keys), "soft")
        source.draw(modes, rng.normal(0, "benchmark/noise", keys, sizes.shape))

    return {"batch": sizes.batch, "seconds": seconds(run, 10), "peak_gb": _peak_gb()}


def em(sizes: Sizes) -> dict[str, Any]:
    """Measure an EM iteration, exact and truncated, on clustered tokens, and scale it to ImageNet."""
    _fresh()
    n, k, c = sizes.tokens, sizes.k, sizes.shape[0]
    generator = torch.Generator(DEVICE).manual_seed(0)
    centres = torch.randn(k // 2, c, generator=generator, device=DEVICE)
    labels = torch.randint(len(centres), (n,), generator=generator, device=DEVICE)
    tokens = (centres[labels] + torch.randn(n, c, generator=generator, device=DEVICE)).cpu().numpy()
    gmm = sizes.read.gmm
    rows = Rows(lambda a, b: tokens[a:b], n, gmm.chunk_size, Ranks(0, 1, DEVICE), 1e11, GROUP_ROWS * k)
    first = torch.from_numpy(tokens[:k]).double()
    mixture = Mixture(torch.full((k,), 1 / k), first, torch.full((k, c), 2.0, dtype=torch.float64)).to(DEVICE)
    found: dict[str, Any] = {"tokens": n, "k": k, "c": c, "scale": costs.IMAGENET_IMAGES / n}
    found["estimated_seconds"] = 2 * 2 * n * c * k / RATES.single
    found["exact_seconds"] = seconds(
        lambda: m_step(e_step(rows, mixture, torch.float32), "diag", gmm.reg_covar), 2, warm_up=1
    )
    winners = exact_winners(rows, mixture, torch.float32)
    truncation = Truncation()
    found["truncated_seconds"] = seconds(
        lambda: m_step(
            truncated_e_step(rows, mixture, winners, torch.float32, truncation)[0], "diag", gmm.reg_covar
        ), 2, warm_up=1,
    )  # fmt: skip
    found["peak_gb"] = _peak_gb()
    return found


def encode(sizes: Sizes) -> list[dict[str, Any]]:
    """Measure DINOv2-base with registers in every precision."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    from mmfm.autoencoder.encoders import load_encoder
    from mmfm.infra import store

    _fresh()
    found = []
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2} if sizes.tiny else {}
    with tempfile.TemporaryDirectory() as folder:
        options = {"image_size": 28 if sizes.tiny else 518, "patch_size": 14, **small}
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**options)).save_pretrained(folder)
        store.write_json(Path(folder) / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
        encoder = load_encoder("dinov2", folder, sizes.input_size, DEVICE)
    images = torch.rand(sizes.batch, 3, sizes.input_size, sizes.input_size, device=DEVICE)
    size = costs.EncoderSize(encoder.hidden_size, len(encoder.model.encoder.layer), encoder.grid[0] ** 2 + 5,
                             encoder.grid[0])  # fmt: skip
    for precision in ("float32", "tf32", "bf16"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        model = encoder.model.to(torch.bfloat16) if precision == "bf16" else encoder.model
        pixels = images.to(next(model.parameters()).dtype)
        with torch.no_grad():
            spent = seconds(lambda m=model, p=pixels: m(p), 5)
        rate = costs.gpu_rates(_card, precision).encoder
        found.append({"precision": precision, "batch": sizes.batch, "seconds": spent,
                      "estimated_seconds": sizes.batch * size.flops / rate})  # fmt: skip
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return found


def sample(sizes: Sizes, name: str, guide: str, compiled: bool) -> list[dict[str, Any]]:
    """Measure evaluations of the velocity, guided and not, and the decoder; a batch takes 49 and one."""
    read, found = sizes.read, []
    labels = torch.arange(sizes.batch, device=DEVICE)
    task = trial.labelled(read.train, sizes.k, sizes.shape)
    models = [setup.model(task, read.models[n], sizes.shape).to(DEVICE).requires_grad_(False) for n in (name, guide)]
    x, t = torch.randn(sizes.batch, *sizes.shape, device=DEVICE), torch.full((sizes.batch,), 0.5, device=DEVICE)
    if compiled:
        for model in models:
            compile_blocks(model)
    grid = sizes.shape[1] * sizes.shape[2]
    flops = [dit_flops(read.models[n], grid, sizes.shape[0]) for n in (name, guide)]
    decoder_section = read.decoder
    decoder = Decoder(
        DecoderConfig(sizes.shape[0], decoder_section.hidden_size, decoder_section.intermediate_size,
                      decoder_section.num_heads, decoder_section.num_layers, 16, grid)
    ).to(DEVICE).requires_grad_(False)  # fmt: skip
    tokens = torch.randn(sizes.batch, grid, sizes.shape[0], device=DEVICE)
    evaluations = len(time_grid(POINTS, time_shift(sizes.shape))) - 1
    with torch.no_grad():
        for other in (None, models[1]):
            _fresh()
            field = networks.guided(models[0], other, Guidance(1.5 if other else 1.0, (0.0, 1.0)), "bf16", DEVICE)
            spent = seconds(lambda f=field: f(labels)(x, t), 5)
            work = evaluations * sizes.batch * (flops[0] + (flops[1] if other else 0))
            found.append({"what": f"{name}, guided by {guide}" if other else name, "compile": compiled,
                          "seconds": evaluations * spent, "estimated_seconds": work / RATES.half,
                          "peak_gb": _peak_gb()})  # fmt: skip
        for precision in () if compiled else ("float32", "bf16"):
            with autocast(precision, DEVICE):
                spent = seconds(lambda: decoder(tokens), 5)
            work = sizes.batch * decoder_flops(decoder_section, sizes.shape[0], grid, 16)
            found.append({"what": f"decoder, {precision}", "compile": False, "seconds": spent,
                          "estimated_seconds": work / RATES.single, "peak_gb": _peak_gb()})  # fmt: skip
    del models
    _fresh()
    return [{"batch": sizes.batch, **row} for row in found]


def card() -> str:
    """Return the name of the GPU."""
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"


def report(found: dict[str, Any]) -> str:
    """Return the Markdown tables."""
    peak = CARDS[known_card(found["card"]) or CARD].peak
    lines = [f"# ImageNet-256's sizes on one {found['card']}", ""]
    lines += [
        f"torch {found['torch']}, driver {found['driver']}. Estimates are those of `mmfm scale` for the card {CARD}.",
        "",
    ]

    def table(head: str, body: list[str]) -> None:
        lines.extend([head, "|" + "--|" * (head.count("|") - 1), *body, ""])

    if "train" in found:
        body = []
        for row in found["train"]:
            start = f"| DiTDH-{row['model']} | {row['micro_batch']} | {'on' if row['compile'] else 'off'} "
            if row["seconds"] is None:
                body.append(f"{start}| out of memory | | | | {row['estimated_gb']:.1f} GB | |")
                continue
            body.append(
                f"{start}| {row['seconds'] * 1e3:.0f} ms | {row['estimated_seconds'] * 1e3:.0f} ms "
                f"| {row['flops'] / row['seconds'] / peak:.1%} | {row['peak_gb']:.1f} GB "
                f"| {row['estimated_gb']:.1f} GB | {row['micro_batch'] / row['seconds']:.0f} |"
            )
        table("| model | micro-batch | compile | step | estimate | MFU | peak | estimate | images/s |", body)
    if "sample" in found:
        body = [
            f"| {row['what']} | {'on' if row['compile'] else 'off'} | {row['seconds']:.2f} s "
            f"| {row['estimated_seconds']:.2f} s | {row['batch'] / row['seconds']:.1f} | {row['peak_gb']:.1f} GB |"
            for row in found["sample"]
        ]
        table(f"| sampling, {POINTS} points, batch {found['sample'][0]['batch']} | compile | time | estimate "
              "| images/s | peak |", body)  # fmt: skip
    if "encode" in found:
        body = [
            f"| {row['precision']} | {row['batch'] / row['seconds']:.0f} "
            f"| {row['batch'] / row['estimated_seconds']:.0f} |"
            for row in found["encode"]
        ]
        table("| DINOv2-base, 224 pixels | images/s | estimate |", body)
    if "em" in found:
        em, scale = found["em"], found["em"]["scale"]
        body = [
            f"| {name} | {em[f'{name}_seconds']:.2f} s | {em[f'{name}_seconds'] * scale:.1f} s "
            f"| {em['estimated_seconds'] * scale:.1f} s |"
            for name in ("exact", "truncated")
        ]
        table(f"| EM iteration, K = {em['k']}, D = {em['c']} | {em['tokens']:,} tokens | scaled to ImageNet "
              "| estimate (exact) |", body)  # fmt: skip
    if "couple" in found:
        row = found["couple"]
        lines.append(f"Posterior, mode and source of {row['batch']} images: {row['seconds'] * 1e3:.1f} ms.")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", default=["S", "XL"], help="models to train; the last one samples")
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--compile", nargs="+", choices=["off", "on"], default=["off", "on"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the benchmark")
    parser.add_argument("--out", type=Path, default=runs.RESULTS)
    options = parser.parse_args(arguments)
    sizes = Sizes(options.tiny)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # as in every stage
    found: dict[str, Any] = {"card": card(), "torch": torch.__version__, "driver": driver_version() or "none"}

    def measure(part: str, run: Callable[[], Any]) -> None:
        if part in options.parts:
            start = time.perf_counter()
            found[part] = found.get(part, []) + made if isinstance(made := run(), list) else made
            print(f"{part}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            runs.publish("gpu", found, report(found), options.out)

    for compiled in (name == "on" for name in options.compile):
        for name in options.models:
            measure("train", lambda n=name, c=compiled: train(sizes, n, options.micro_batches, c, options.steps))
        sampled = options.models[-1], options.models[0]
        measure("sample", lambda c=compiled, s=sampled: sample(sizes, *s, c))
    measure("encode", lambda: encode(sizes))
    measure("couple", lambda: couple(sizes))
    measure("em", lambda: em(sizes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
