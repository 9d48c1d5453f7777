"""Measure what each optimisation of the model gains in eager mode, in the forward and backward passes.

python benchmarks/model.py [--rounds 7] [--device cuda]

Replaces each optimised part by a plain implementation, one at a time and then all together. The variants take turns. On
a CPU, process time is measured, to exclude other programs. Writes benchmarks/results/model.json and .md.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfm.models import dit, layers

ROOT = Path(__file__).parent.parent
SIZES = {
    "tiny": (dit.DiTConfig(4, 1, 192, (192, 192), (3, 1), (6, 6), 64, 0.0), 128),
    "S, 4 + 1 blocks": (dit.DiTConfig(16, 1, 768, (384, 1024), (4, 1), (6, 16), 0, 0.0), 2),
}


def rotate(self: layers.Rope2d, x: Tensor) -> Tensor:
    """Rotary positions in real arithmetic."""
    shape = (x.shape[1], *(1,) * (x.ndim - 3), -1)
    cos, sin = self.freqs_cos.view(shape), self.freqs_sin.view(shape)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


def attend(self: layers.Attention, x: Tensor, rope: layers.Rope2d) -> Tensor:
    """Attention that rotates queries and keys separately."""
    q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
    q, k, v = (part.transpose(1, 2) for part in (rope(q), rope(k), v))
    return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


def modulate(self: layers.ModulatedNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Norm, weight, scale and shift as separate operations."""
    return F.rms_norm(x.float(), self.weight.shape, self.weight, layers.NORM_EPS) * (1 + scale) + shift


def embed(self: layers.PatchEmbed, patches: Tensor) -> Tensor:
    """Patch embedding by a convolution (patch size 1)."""
    grid = int(patches.shape[1] ** 0.5)
    return self.proj(patches.transpose(1, 2).unflatten(2, (grid, grid))).flatten(2).transpose(1, 2)


def gated_silu(both: Tensor) -> Tensor:
    """The product of SwiGLU, differentiated by autograd."""
    gate, value = both.chunk(2, dim=-1)
    return F.silu(gate) * value


PLAIN: dict[str, tuple[Any, str, Callable[..., Tensor]]] = {
    "rotary positions as one complex product": (layers.Rope2d, "forward", rotate),
    "queries and keys rotated together": (layers.Attention, "forward", attend),
    "norm, scale and shift folded": (layers.ModulatedNorm, "forward", modulate),
    "patches embedded by a matrix product": (layers.PatchEmbed, "forward", embed),
    "SwiGLU's gradient written in place": (layers, "gated_silu", gated_silu),
    "gates by one fused operation": (layers, "add_gated", lambda x, gate, update: x + gate * update),
}


@contextlib.contextmanager
def without(*changes: str) -> Iterator[None]:
    """Use the plain implementations of the named optimisations."""
    with contextlib.ExitStack() as stack:
        for change in changes:
            owner, name, plain = PLAIN[change]
            stack.enter_context(mock.patch.object(owner, name, plain))
        yield


def stepper(config: dit.DiTConfig, batch: int, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that runs a forward and a backward pass and returns the gradient of the latents."""
    generator = torch.Generator().manual_seed(0)
    model = dit.DiT(config, generator=generator)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    model = model.to(device)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, generator=generator).to(device)
    x.requires_grad_()
    t = torch.rand(batch, generator=generator).to(device)
    y = torch.zeros(batch, dtype=torch.long, device=device) if config.num_classes else None

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(x, t, y).square().mean()
        loss.backward()
        return x.grad

    return step


def seconds(step: Callable[[], Tensor], device: torch.device) -> float:
    """Return the time of one step."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(name: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """Time all variants in turns; return their median seconds and the gain of each optimisation."""
    step = stepper(*SIZES[name], device)
    variants = {"as it is": (), **{change: (change,) for change in PLAIN}, "all": tuple(PLAIN)}
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    exact = step().clone()
    for turn in range(rounds + 1):
        for variant, changes in variants.items():
            with without(*changes):
                found = seconds(step, device)
            if turn:  # the first round warms up
                times[variant].append(found)
    with without(*PLAIN):
        difference = ((step() - exact).norm() / exact.norm()).item()
    medians = {variant: statistics.median(values) for variant, values in times.items()}
    gains = {variant: medians[variant] / medians["as it is"] for variant in variants if variant != "as it is"}
    return {"seconds": medians, "gain": gains, "relative_difference": difference}


def report(found: dict[str, Any]) -> str:
    """Return the Markdown tables."""
    lines = ["# Optimisations of the model in eager mode", "", f"{found['device']}, torch {found['torch']}.", ""]
    lines += ["Time of a forward and backward pass without an optimisation, relative to the time with all:", ""]
    sizes = found["sizes"]
    lines += [f"| optimisation | {' | '.join(sizes)} |", "|---|" + "---|" * len(sizes)]
    for change in (*PLAIN, "all"):
        gains = (f"{size['gain'][change]:.3f}" for size in sizes.values())
        lines.append(f"| {change} | {' | '.join(gains)} |")
    cells = (f"{size['seconds']['as it is']:.3f} s" for size in sizes.values())
    lines += [f"| time with all | {' | '.join(cells)} |"]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    sizes = {name: measure(name, options.rounds, device) for name in options.sizes}
    found = {"device": card, "torch": torch.__version__, "sizes": sizes}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "model.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    (options.out / "model.md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
