"""Layers of the diffusion transformer: patch and time embeddings, rotary attention, SwiGLU, adaptive RMS norm.

Shapes: B images, N tokens, width D, h heads of d = D / h channels. A condition is (B, 1, D) if all tokens of an image
share it and (B, N, D) if each token has its own; the same code broadcasts both.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
_COMPILED_SIZES = 64


class ModulatedNorm(nn.Module):
    """RMS norm over the last axis in float32, followed by an adaptive scale and shift.

    Sources: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; Peebles and Xie 2023, adaLN.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Return norm(x) * weight * (1 + scale) + shift, float32, for x (B, N, D) and shift, scale (B, 1 or N, D)."""
        # Folding the weight into the scale is cheap: in most blocks the scale is per image, not per token.
        factor = torch.addcmul(self.weight, self.weight, scale.float()).float()
        return torch.addcmul(shift.float(), F.rms_norm(x.float(), self.weight.shape, eps=NORM_EPS), factor)


class PatchEmbed(nn.Module):
    """Linear embedding of non-overlapping patches as tokens (Dosovitskiy et al. 2021).

    The parameters are those of timm's PatchEmbed, a convolution, but its output would carry a transposed layout through
    the whole network. A matrix product leaves the tokens contiguous.
    """

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """Embed patches (B, N, C * p * p) from :func:`patchify` as (B, N, D)."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Cut (B, C, H, W) into patches (B, N, C * p * p), contiguous, in row-major order, channels first in each patch."""
    patches = x.unflatten(-1, (-1, patch_size)).unflatten(-3, (-1, patch_size))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2).contiguous()


class FourierTimeEmbed(nn.Module):
    """Gaussian Fourier features of the time, with frozen random frequencies `W`, and a two-layer MLP: (B,) -> (B, D).

    Source: Tancik et al. 2020, "Fourier Features Let Networks Learn High Frequency Functions".
    """

    def __init__(self, width: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(num_frequencies), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed times t (B,) in [0, 1]; the phases are always computed in float32."""
        phase = t.float()[:, None] * self.W.float() * (2 * math.pi)
        features = torch.cat([phase.sin(), phase.cos()], dim=-1)
        return self.mlp(features.to(self.W.dtype))


class LabelEmbed(nn.Module):
    """Table of label embeddings: (B,) int64 -> (B, D)."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, width)

    def forward(self, y: Tensor) -> Tensor:
        """Look up labels y (B,) int64."""
        return self.embedding_table(y)


class Rope2d(nn.Module):
    """Rotary position embedding for a square grid.

    The first half of a head's channels encodes the row, the second half the column; channels (2i, 2i + 1) form a pair.

    Sources: Su et al. 2021, "RoFormer"; two-dimensional layout of EVA-02 (Fang et al. 2023).
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, grid: int, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(
                f"head width {head_dim} is not a multiple of 4, as two-dimensional rotary positions require; "
                "change hidden_size or num_heads"
            )
        axis_dim = head_dim // 2
        frequencies = theta ** (-torch.arange(0, axis_dim, 2).float() / axis_dim)
        angles = torch.outer(torch.arange(grid).float(), frequencies).repeat_interleave(2, dim=-1)
        rows = angles[:, None, :].expand(grid, grid, axis_dim)
        columns = angles[None, :, :].expand(grid, grid, axis_dim)
        table = torch.cat([rows, columns], dim=-1).reshape(grid * grid, head_dim)
        self.register_buffer("freqs_cos", table.cos())
        self.register_buffer("freqs_sin", table.sin())

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x (B, N, ..., d) in float32; the result has the dtype of x."""
        # Both channels of a pair have the same angle. In eager mode, a complex product takes one pass over the data.
        # The compiler can't generate complex code, but fuses the real form.
        shape = (x.shape[1], *(1,) * (x.ndim - 3), -1)
        cos, sin = self.freqs_cos[:, ::2].float().view(shape), self.freqs_sin[:, ::2].float().view(shape)
        if torch.compiler.is_compiling():
            even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
            rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
        else:
            rotated = torch.view_as_real(
                torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
            )
        return rotated.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions on queries and keys (Vaswani et al. 2017)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope2d) -> Tensor:
        """Apply self-attention to tokens (B, N, D)."""
        # Queries and keys are rotated together, in the layout of the projection; the transposes are views.
        qk, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).split((2, 1), dim=2)
        q, k = rope(qk).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v.squeeze(2)))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _GatedSilu(torch.autograd.Function):
    """silu(a) * b, where a and b are the halves of the last axis.

    Autograd would compute the gradients of the halves separately, concatenate them with a copy, and also keep silu(a).
    Here both are written into one tensor.
    """

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, value = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, value = both.chunk(2, dim=-1)
        joined = torch.empty_like(both)
        grad_gate, grad_value = joined.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_value)
        torch.ops.aten.silu_backward.grad_input(grad * value, gate, grad_input=grad_gate)
        return joined


def gated_silu(both: Tensor) -> Tensor:
    """Return silu(a) * b, (..., n), for the halves a, b of the last axis of (..., 2 n)."""
    if torch.compiler.is_compiling():
        gate, value = both.chunk(2, dim=-1)
        return F.silu(gate) * value
    return _GatedSilu.apply(both)


class SwiGLU(nn.Module):
    """Gated MLP, w3(silu(a) * b) with (a, b) = w12(x) (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * inner_width)
        self.w3 = nn.Linear(inner_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, N, D)."""
        return self.w3(gated_silu(self.w12(x)))


def add_gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Return x + gate * update for x, update (B, N, D) and gate (B, 1 or N, D)."""
    if x.dtype == gate.dtype == update.dtype:
        return torch.addcmul(x, gate, update)
    return x + gate * update  # under autocast, addcmul would copy all three to the widest dtype


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero modulation by a shared or per-token condition.

    The inner width of the SwiGLU is int(2/3 * mlp_ratio * width), which matches the parameters of a plain MLP.

    Sources: Peebles and Xie 2023, "Scalable Diffusion Models with Transformers"; Wang et al. 2025, "DDT" (per-token
    conditions in the head blocks).
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = ModulatedNorm(width)
        self.attn = Attention(width, num_heads)
        self.norm2 = ModulatedNorm(width)
        self.mlp = SwiGLU(width, int(2 / 3 * int(width * mlp_ratio)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, rope: Rope2d) -> Tensor:
        """Transform tokens (B, N, D) under a condition (B, 1 or N, D) to which SiLU has already been applied."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation[-1](condition).chunk(6, dim=-1)
        x = add_gated(x, gate_a, self.attn(self.norm1(x, shift_a, scale_a), rope))
        return add_gated(x, gate_m, self.mlp(self.norm2(x, shift_m, scale_m)))


class FinalLayer(nn.Module):
    """Modulated norm and linear map from tokens to patches: (B, N, D) -> (B, N, p * p * C)."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = ModulatedNorm(width)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map tokens (B, N, D) under a condition (B, N, D) to which SiLU has already been applied."""
        shift, scale = self.adaLN_modulation[-1](condition).chunk(2, dim=-1)
        return self.linear(self.norm_final(x, shift, scale))


def sincos_position_table(width: int, grid: int) -> Tensor:
    """Return fixed sine-cosine positions of a square grid, (grid * grid, width) float32, in row-major order.

    The first half of the channels encodes the column, the second half the row, each as [sines, cosines]. This is the
    layout of MAE (He et al. 2022) and of the published weights.

    Raises:
        ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width {width} is not a multiple of 4, as sine-cosine positions require; change hidden_size")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.outer(torch.arange(grid, dtype=torch.float64), frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)
    columns = axis[None, :, :].expand(grid, grid, width // 2)
    rows = axis[:, None, :].expand(grid, grid, width // 2)
    return torch.cat([columns, rows], dim=-1).reshape(grid * grid, width).float()


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a model: the elements of its module lists, in order."""
    return [block for part in model.modules() if isinstance(part, nn.ModuleList) for block in part]


def compile_blocks(model: nn.Module) -> None:
    """Compile each block of a model with torch.compile, in place.

    Blocks of the same sizes share their code, so compiling takes seconds where the whole model would take minutes. The
    limit is for all blocks together: a model, its head and a guide have three sizes, each compiled once for every size
    of batch. Past PyTorch's own limit of 8, further ones would run as they are, with other rounding.
    """
    for block in blocks(model):
        block.compile(dynamic=False, recompile_limit=_COMPILED_SIZES)
