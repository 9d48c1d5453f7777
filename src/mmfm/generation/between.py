"""Interpolation between two images: between their noise, modes and labels."""

import torch
from torch import Tensor

from mmfm.flow.solver import VelocityFn
from mmfm.flow.source import Source
from mmfm.generation.generator import Draw, Field


def slerp(start: Tensor, end: Tensor, shares: Tensor) -> Tensor:
    """Interpolate spherically: sin((1 - s) w) / sin w * start + sin(s w) / sin w * end, w the angle between the two.

    Normal noise lies close to a sphere, so points on a straight line between two draws have too small a norm.

    Args:
        start, end: (C, H, W) float32.
        shares: (B,) values of s in [0, 1].

    Returns:
        (B, C, H, W), exactly ``start`` at s = 0 and ``end`` at s = 1.

    Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.
    """
    s = shares.view(-1, 1, 1, 1)
    cosine = torch.nn.functional.cosine_similarity(start.flatten(), end.flatten(), dim=0).clamp(-1, 1)
    angle = torch.acos(cosine)
    if angle.sin() < 1e-3:  # equal directions, or opposite ones, between which the shortest path is not unique
        return torch.lerp(start.expand(len(s), *start.shape), end.expand(len(s), *end.shape), s)
    return (torch.sin((1 - s) * angle) * start + torch.sin(s * angle) * end) / torch.sin(angle)


def between(source: Source, field: Field, start: Draw, end: Draw, shares: Tensor) -> tuple[Tensor, VelocityFn]:
    """Return x at t = 1, (B, C, H, W), and the velocity field, between two draws of one image each.

    x has the dtype of the noise, which is interpolated spherically; the means and standard deviations of the modes are
    interpolated linearly. Labels are discrete, so the velocities for the two labels are interpolated instead.

    Args:
        shares: (B,) in [0, 1]: 0 for the first draw, 1 for the second.
    """
    n, s = len(shares), shares.view(-1, 1, 1, 1)
    noise = slerp(start.noise[0].float(), end.noise[0].float(), shares).to(start.noise.dtype)
    if start.modes is None or end.modes is None:
        x = source.draw(None, noise)
    else:
        first, last = source.draw(start.modes.expand(n), noise), source.draw(end.modes.expand(n), noise)
        x = torch.lerp(first, last, s.to(noise.dtype))
    if start.labels is None or end.labels is None:
        return x, field(None)
    of_first, of_last = field(start.labels.expand(n)), field(end.labels.expand(n))
    if torch.equal(start.labels, end.labels):
        return x, of_first
    return x, lambda x, t: torch.lerp(of_first(x, t).float(), of_last(x, t).float(), s)
