"""The path of a sample from source to data."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfm.flow.path import interpolate
from mmfm.flow.solver import VelocityFn
from mmfm.generation.generator import Generator


@dataclass(frozen=True)
class Trajectory:
    """Paths of samples.

    Attributes:
        times: (T,) float32, from 1 (source) towards 0 (data), on the CPU.
        states: (T, n, C, H, W) float32, normalised latents at these times.
    """

    times: Tensor
    states: Tensor

    def deviation(self) -> Tensor:
        """Return how far each path is from its chord at each time, relative to the chord's length: (T, n).

        The chord joins the path's ends at constant speed, so a path along it that hurries or lags deviates, too.
        """
        start, end = self.states[0], self.states[-1]
        share = (self.times - self.times[-1]) / (self.times[0] - self.times[-1])
        chord = torch.stack([interpolate(end, start, s.expand(len(start)).to(start.device)) for s in share])
        distance = (self.states - chord).flatten(2).norm(dim=2)
        return distance / (start - end).flatten(1).norm(dim=1)

    def straightness(self) -> Tensor:
        """Return the mean of :meth:`deviation` over time, (n,): 0 for straight paths at constant speed."""
        deviation = self.deviation()
        times = self.times.to(deviation.device)
        return torch.trapezoid(deviation, times, dim=0) / (times[-1] - times[0])


def trajectory(generator: Generator, velocity: VelocityFn, x: Tensor) -> Trajectory:
    """Follow the flow from x at t = 1, (n, C, H, W), and keep the states at all times of the generator's grid.

    With given steps the last state is what :meth:`Generator.follow` returns; solvers that choose their steps are
    started anew at every time, and agree within their tolerances.

    Raises:
        ValueError: a grid of one point has no path.
    """
    if len(generator.times) < 2:
        raise ValueError("time_points is 1, the source alone; a path has at least 2")
    states = [x]
    for step in generator.times.unfold(0, 2, 1):
        states.append(replace(generator, times=step).follow(velocity, states[-1])[0])
    return Trajectory(generator.times.cpu(), torch.stack(states))
