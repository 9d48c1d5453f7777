"""Estimate speed, model FLOPs utilisation and memory of DiTDH-XL on 8 GPUs, without measuring anything.

python benchmarks/estimate.py

torch.utils.flop_counter counts the FLOPs of the forward and backward passes on the meta device: 2 m k n for a product
of m x k and k x n, including the two products of attention, but no elementwise operations. Stored activations are
counted with fake tensors under bf16 autocast. Speed is the peak times an assumed utilisation.
"""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mmfm.models.dit import DIT_PRESETS, DiT, DiTConfig

CARDS = {"A100-40GB": (312e12, 40), "A100-80GB": (312e12, 80), "H100-80GB": (989e12, 80)}
"""Dense bf16 peak in FLOP/s and memory in GB, from the data sheets."""
UTILISATION = {"A100-40GB": (0.35, 0.5), "A100-80GB": (0.35, 0.5), "H100-80GB": (0.3, 0.45)}
"""Assumed shares of the peak, as reached by transformers of this width in eager mode and compiled."""
REFERENCE = 20 * 1_281_167 / (21 * 3600)
"""Images per second of the reference implementation on 8 A100-40GB: 20 epochs in about 21 hours."""
ENCODER_FLOPS = 2 * 86e6 * 261 + 12 * 4 * 261**2 * 768
"""FLOPs of a forward pass of DINOv2-base (86 M parameters, 12 blocks of width 768) over 256 + 5 tokens."""
SHARE = 1024 // 8
"""Images of the global batch per GPU."""
XL = DiTConfig(16, 1, 768, **DIT_PRESETS["XL"], num_classes=8192, label_dropout=0.0)


def flops_per_image(config: DiTConfig, *, backward: bool = True, batch: int = 1) -> int:
    """Return the FLOPs per image in training, or of the forward pass only."""
    with torch.device("meta"):
        model = DiT(config)
        x = torch.empty(batch, config.in_channels, config.input_size, config.input_size)
        t, y = torch.empty(batch), torch.empty(batch, dtype=torch.long) if config.num_classes else None
    with FlopCounterMode(display=False) as counter:
        velocity = model(x, t, y)
        if backward:
            velocity.sum().backward()
    return counter.get_total_flops() // batch


def activation_bytes_per_image(config: DiTConfig, *, checkpoint_activations: bool) -> int:
    """Return the bytes per image that autograd stores for the backward pass under bf16 autocast."""

    def kept(batch: int) -> int:
        seen: dict[int, int] = {}
        with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
            model = DiT(config, checkpoint_activations=checkpoint_activations)
            own = {p.untyped_storage()._cdata for p in model.parameters()}

            def note(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    seen[storage._cdata] = storage.nbytes()
                    alive.append(tensor)
                return tensor

            alive: list[torch.Tensor] = []
            x = torch.empty(batch, config.in_channels, config.input_size, config.input_size)
            y = torch.zeros(batch, dtype=torch.long) if config.num_classes else None
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                velocity = model(x, torch.empty(batch), y)
            del velocity
        return sum(seen.values())

    return kept(3) - kept(2)  # cancels what does not depend on the batch size, such as bf16 copies of weights


def state_bytes(config: DiTConfig, shards: int = 1) -> int:
    """Return the bytes of weights, gradients, two moments and EMA in float32, and of the weights' bf16 copies."""
    with torch.device("meta"):
        count = sum(p.numel() for p in DiT(config).parameters())
    return count * 5 * 4 // shards + count * 2


def full_size() -> dict[str, Any]:
    """Return the estimates for XL on 8 GPUs."""
    flops, forward = flops_per_image(XL), flops_per_image(XL, backward=False)
    found: dict[str, Any] = {
        "flops_per_image": flops, "flops_forward": forward, "encoder_flops": ENCODER_FLOPS, "cards": {},
        "activations_gb_per_image": activation_bytes_per_image(XL, checkpoint_activations=False) / 1e9,
        "activations_gb_per_image_checkpointed": activation_bytes_per_image(XL, checkpoint_activations=True) / 1e9,
        "state_gb": state_bytes(XL) / 1e9, "state_gb_fsdp8": state_bytes(XL, 8) / 1e9,
        "reference_images_per_second": REFERENCE,
        "reference_utilisation": REFERENCE * flops / (8 * CARDS["A100-40GB"][0]),
    }  # fmt: skip
    for card, (peak, gigabytes) in CARDS.items():
        speeds = [8 * peak * share / flops for share in UTILISATION[card]]
        # 2 GB for the CUDA context, encoder and workspaces; 3.2 GB for the source's means in bf16.
        room = gigabytes - 2 - 3.2 - found["state_gb"]
        found["cards"][card] = {
            "utilisation": UTILISATION[card], "images_per_second": speeds,
            "largest_micro_batch": int(room / found["activations_gb_per_image"]),
            "largest_micro_batch_checkpointed": int(room / found["activations_gb_per_image_checkpointed"]),
        }  # fmt: skip
    return found


def report(found: dict[str, Any]) -> str:
    """Return the Markdown table."""
    activations, recomputed = found["activations_gb_per_image"], found["activations_gb_per_image_checkpointed"]
    lines = ["## DiTDH-XL on 8 GPUs: an estimate, not a measurement", ""]
    lines += [
        f"Training takes {found['flops_per_image'] / 1e12:.2f} TFLOP per image,",
        f"of which {found['flops_forward'] / 1e12:.2f} in the forward pass,",
        f"and the frozen encoder {found['encoder_flops'] / 1e12:.3f}. Weights, gradients, moments and EMA take",
        f"{found['state_gb']:.1f} GB per GPU ({found['state_gb_fsdp8']:.1f} with `train.sharding: fsdp`).",
        f"Activations take {activations:.2f} GB per image, or {recomputed:.3f} plus those of one block with",
        "`train.checkpoint_activations`, which costs an additional forward pass.",
        f"The reference implementation's 20 epochs in 21 h on 8 A100-40GB are {REFERENCE:.0f} images/s,",
        f"a utilisation of {found['reference_utilisation']:.0%}.",
        "",
    ]
    lines += ["| 8 x | assumed utilisation | images/s | largest micro-batch | with activations recomputed |"]
    lines += ["|---|---|---|---|---|"]
    for card, values in found["cards"].items():
        (low, high), (slow, fast) = values["utilisation"], values["images_per_second"]
        whole, less = (min(SHARE, values[f"largest_micro_batch{name}"]) for name in ("", "_checkpointed"))
        lines.append(
            f"| {card} | {low:.0%} to {high:.0%} | {slow:,.0f} to {fast:,.0f} | {whole} "
            f"| {less}{' (the whole share)' if less == SHARE else ''} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(report(full_size()))
