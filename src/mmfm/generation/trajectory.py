"""Trajectories of samples from source to data."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfm import data
from mmfm.flow.path import interpolate, time_grid, time_shift
from mmfm.flow.solver import VelocityFn
from mmfm.generation.generator import Field, Generator

STRAIGHTNESS_POINTS = 50
"""Time points of the paths whose straightness is measured: the same for all results, however they are sampled."""


@dataclass(frozen=True)
class Trajectory:
    """The paths of n samples from source to data.

    Attributes:
        times: (T,) float32 on the CPU, decreasing from 1 (source) towards 0 (data).
        states: (T, n, C, H, W) float32, normalised latents at these times; the last ones decode to the images.
    """

    times: Tensor
    states: Tensor

    def deviation(self) -> Tensor:
        """Return each path's distance from its chord at each time, relative to the chord's length: (T, n).

        The chord connects the ends of the path at constant speed, so a straight path of varying speed deviates too.
        """
        start, end = self.states[0], self.states[-1]
        shares = (self.times - self.times[-1]) / (self.times[0] - self.times[-1])
        length = (start - end).flatten(1).norm(dim=1)

        def distance(state: Tensor, share: Tensor) -> Tensor:
            chord = interpolate(end, start, share.expand(len(start)).to(start.device))
            return (state - chord).flatten(1).norm(dim=1) / length

        return torch.stack([distance(state, share) for state, share in zip(self.states, shares, strict=True)])

    def straightness(self) -> Tensor:
        """Return the mean of :meth:`deviation` over time, (n,); 0 for a straight path at constant speed."""
        deviation = self.deviation()
        times = self.times.to(deviation.device)
        return torch.trapezoid(deviation, times, dim=0) / (times[-1] - times[0])


def trajectory(generator: Generator, velocity: VelocityFn, x: Tensor) -> Trajectory:
    """Follow the flow from x at t = 1, (n, C, H, W), and keep the state at every time of the generator's grid.

    With a fixed-step solver the last state equals the result of :meth:`Generator.follow`. An adaptive solver is
    restarted at every time, so the two agree only within its tolerances.

    Raises:
        ValueError: the grid has a single time point.
    """
    if len(generator.times) < 2:
        raise ValueError("time_points is 1, which is the source alone; set it to 2 or more")
    states = [x.float()]
    for step in generator.times.unfold(0, 2, 1):
        states.append(replace(generator, times=step).follow(velocity, states[-1])[0])
    return Trajectory(generator.times.cpu(), torch.stack(states))


def mean_straightness(generator: Generator, field: Field, n: int, batch_size: int) -> float | None:
    """Return the mean of :meth:`Trajectory.straightness` over the first n images, along Euler's steps in float32.

    All states of a batch are in memory: 39 MB an image of latents [768, 16, 16].

    Args:
        field: the velocity field of the network with guidance.

    Returns:
        the mean; None if a path ends where it starts, or is not finite.
    """
    times = time_grid(STRAIGHTNESS_POINTS, time_shift(generator.latent_shape))
    along = replace(generator, times=times, solver="euler", dtype=torch.float32)
    found = []
    for numbers in data.ranges(0, n, batch_size):
        drawn = along.draw(numbers)
        path = trajectory(along, field(drawn.labels), along.source.draw(drawn.modes, drawn.noise))
        found.append(path.straightness())
    mean = torch.cat(found).mean().item()
    return mean if math.isfinite(mean) else None
