"""Random numbers that depend only on (seed, purpose, index), not on the order in which they are drawn.

Everything random here belongs to something with a global index: an image, a training step, a component. Its random
bits are a hash of that index, computed with tensor operations, so they do not depend on the number of processes, the
batch size or restarts. The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014), applied to a counter offset by a keyed stream constant.
"""

import hashlib
import math

import torch

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit integer; torch has no uint64 arithmetic."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical (not sign-extending) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def derive_seed(seed: int, purpose: str) -> int:
    """Return a 63-bit seed for one purpose, e.g. for a ``torch.Generator`` that initialises weights."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _bits(seed: int, purpose: str, index: torch.Tensor, count: int) -> torch.Tensor:
    """Return (B, count) int64 with 64 random bits each, for integer indices (B,)."""
    stream = _signed(derive_seed(seed, purpose))
    row = _mix(index.to(torch.int64) * _signed(_GAMMA) + stream)
    column = torch.arange(1, count + 1, device=index.device, dtype=torch.int64) * _signed(_GAMMA)
    return _mix(row[:, None] + column[None, :])


def uniform(seed: int, purpose: str, index: torch.Tensor, shape: tuple[int, ...] = ()) -> torch.Tensor:
    """Draw float64 uniforms in (0, 1) of shape (B, *shape), one independent row per index.

    Args:
        index: (B,) integers: image numbers, step numbers, ...
    """
    bits = _bits(seed, purpose, index, math.prod(shape))
    # The largest of the 2^53 values is rounded to 1.
    uniforms = ((_shift_right(bits, 11).double() + 0.5) * 2.0**-53).clamp(max=1 - 2.0**-53)
    return uniforms.reshape(len(index), *shape)


def stratified(seed: int, purpose: str, index: torch.Tensor) -> torch.Tensor:
    """Return float64 in (0, 1), (B,), evenly spread for consecutive indices.

    This is the van der Corput sequence (the bits of the index reversed) with a random digital shift, which makes each
    value uniform over seeds (L'Ecuyer and Lemieux 2002, "Recent advances in randomized quasi-Monte Carlo methods"): any
    2^m consecutive indices that start at a multiple of 2^m have one value in each interval of length 2^-m.

    Args:
        index: (B,) integers in [0, 2^32).
    """
    reversed_bits = torch.zeros_like(index, dtype=torch.int64)
    for bit in range(32):
        reversed_bits |= ((index.to(torch.int64) >> bit) & 1) << (31 - bit)
    shift = derive_seed(seed, purpose) & 0xFFFFFFFF
    return ((reversed_bits ^ shift).double() + 0.5) * 2.0**-32


def normal(seed: int, purpose: str, index: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw float32 standard normals of shape (B, *shape), one independent row per index.

    The transform of Box and Muller ("A note on the generation of random normal deviates", 1958) turns the two halves of
    a 64-bit hash into two normals.
    """
    count = math.prod(shape)
    bits = _bits(seed, purpose, index, (count + 1) // 2)
    # 32 bits each. The radius comes from (0, 1], so its logarithm is finite and |normal| <= 6.7.
    radius = torch.sqrt(-2.0 * torch.log((_shift_right(bits, 32).double() + 1.0).mul_(2.0**-32))).float()
    angle = ((bits & 0xFFFFFFFF).double() * (2.0 * math.pi * 2.0**-32)).float()
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.reshape(len(index), -1)[:, :count].reshape(len(index), *shape)


def permutation(seed: int, purpose: str, index: int, n: int) -> torch.Tensor:
    """Return a permutation of range(n) as int64, for (seed, purpose, index), such as an epoch's data order."""
    generator = torch.Generator().manual_seed(derive_seed(seed, f"{purpose}/{index}"))
    return torch.randperm(n, generator=generator)
