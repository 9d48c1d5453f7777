"""Layers of the diffusion transformer: patch and time embeddings, rotary attention, SwiGLU, adaptive layer norm.

Shapes: B images, N tokens, D width, h heads of d = D / h channels. Conditions have shape (B, 1, D) when all tokens of
an image share one and (B, N, D) when each token has its own; both broadcast through the same code.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last axis, computed in float32 and returned in the input's dtype.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., D)."""
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class PatchEmbed(nn.Module):
    """Non-overlapping patches (B, C, H, W) -> tokens (B, N, D), row by row (Dosovitskiy et al. 2021).

    The same as timm's, which would be the only thing to import from there: a dependency and seconds of every start.
    """

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed (B, C, H, W) as (B, N, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class FourierTimeEmbed(nn.Module):
    """Gaussian Fourier features of the time followed by a two-layer MLP: (B,) -> (B, D).

    Source: Tancik et al. 2020, "Fourier Features Let Networks Learn High Frequency Functions"; the random frequencies
    `W` are frozen.
    """

    def __init__(self, width: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(num_frequencies), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed times t (B,) in [0, 1]; the phases are float32 whatever the precision around."""
        phase = t.float()[:, None] * self.W.float() * (2 * math.pi)
        features = torch.cat([phase.sin(), phase.cos()], dim=-1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbed(nn.Module):
    """Table of label embeddings: (B,) int64 -> (B, D)."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, width)

    def forward(self, y: Tensor) -> Tensor:
        """Look up labels y (B,) int64."""
        return self.embedding_table(y)


class Rope2d(nn.Module):
    """Rotary position tables for a square grid: the first half of a head's channels turns with the row, the second with
    the column; neighbouring channels (2i, 2i + 1) are a rotated pair.

    Sources: Su et al. 2021, "RoFormer"; the two-dimensional layout of EVA-02 (Fang et al. 2023).
    """

    def __init__(self, grid: int, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(
                f"head width {head_dim} is not a multiple of 4, which two-dimensional rotary positions need; "
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
        """Rotate (B, h, N, d) in float32; returned in the input's dtype."""
        # Both channels of a pair hold the same angle: strided views of the tables serve without copies.
        cos, sin = self.freqs_cos[:, ::2].float(), self.freqs_sin[:, ::2].float()
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
        return rotated.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions on queries and keys (Vaswani et al. 2017)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope2d) -> Tensor:
        """Attend within tokens (B, N, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(rope(q), rope(k), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated MLP, w3(silu(a) * b) with (a, b) = w12(x) (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * inner_width)
        self.w3 = nn.Linear(inner_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, N, D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, for x (B, N, D) and shift, scale (B, 1 or N, D) (Peebles and Xie 2023, adaLN)."""
    return x * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero modulation by a shared or per-token condition.

    Sources: Peebles and Xie 2023, "Scalable Diffusion Models with Transformers"; Wang et al. 2025, "DDT" (per-token
    condition of the head blocks). The inner width of the SwiGLU is int(2/3 * mlp_ratio * width).
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, num_heads)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, int(2 / 3 * int(width * mlp_ratio)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, rope: Rope2d) -> Tensor:
        """Transform tokens (B, N, D) under a condition (B, 1 or N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate_a * self.attn(modulate(self.norm1(x), shift_a, scale_a), rope)
        return x + gate_m * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Modulated norm and the linear map from tokens to patches: (B, N, D) -> (B, N, p * p * C)."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map tokens (B, N, D) under a condition (B, N, D)."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def sincos_position_table(width: int, grid: int) -> Tensor:
    """Fixed sine-cosine positions of a square grid, (grid * grid, width) float32, token order row by row.

    The first half of the channels encodes the column and the second half the row, each as [sines, cosines] (the layout
    of MAE, He et al. 2022, that published weights have).

    Raises:
        ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width {width} is not a multiple of 4, which sine-cosine positions need; change hidden_size")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.outer(torch.arange(grid, dtype=torch.float64), frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)
    columns = axis[None, :, :].expand(grid, grid, width // 2)
    rows = axis[:, None, :].expand(grid, grid, width // 2)
    return torch.cat([columns, rows], dim=-1).reshape(grid * grid, width).float()
