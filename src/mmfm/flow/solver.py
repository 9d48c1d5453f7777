"""Fixed-step solvers of the flow's ordinary differential equation, dx/dt = v(x, t), along a decreasing time grid."""

from collections.abc import Callable

import torch
from torch import Tensor

# (x (B, ...), t (B,)) -> velocity (B, ...)
VelocityFn = Callable[[Tensor, Tensor], Tensor]
# (index of the step just taken, from 1; its time, 0-dimensional; state (B, ...)) -> None
StepCallback = Callable[[int, Tensor, Tensor], None]


def euler(velocity_fn: VelocityFn, x: Tensor, times: Tensor, on_step: StepCallback | None = None) -> Tensor:
    """Integrate with Euler's method: one evaluation a step, len(times) - 1 in all.

    Args:
        velocity_fn: the velocity field.
        x: state at times[0], (B, ...).
        times: (T,) strictly decreasing, from 1 (source) towards 0 (data).
        on_step: called after each step; collecting its states gives the trajectory.

    Returns:
        state at times[-1], (B, ...) float32.

    Raises:
        ValueError: a grid that is not decreasing or has fewer than two points.
    """

    def step(x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        return x + (t_next - t) * _evaluate(velocity_fn, x, t)

    return _integrate(step, x, times, on_step)


def heun(velocity_fn: VelocityFn, x: Tensor, times: Tensor, on_step: StepCallback | None = None) -> Tensor:
    """Integrate with Heun's second-order method: the mean of the velocities at both ends of a step.

    Two evaluations a step, 2 (len(times) - 1) in all. Arguments, result and errors as for `euler`.
    """

    def step(x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        first = _evaluate(velocity_fn, x, t)
        second = _evaluate(velocity_fn, x + (t_next - t) * first, t_next)
        return x + (t_next - t) * (first + second) / 2

    return _integrate(step, x, times, on_step)


def _evaluate(velocity_fn: VelocityFn, x: Tensor, t: Tensor) -> Tensor:
    return velocity_fn(x, t.expand(x.shape[0])).float()


def _integrate(
    step: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, times: Tensor, on_step: StepCallback | None
) -> Tensor:
    times = times.detach().to("cpu", torch.float32)
    if times.ndim != 1 or len(times) < 2 or not (times.diff() < 0).all():
        raise ValueError(f"times {times.tolist()} must be at least two numbers in decreasing order")
    # State and time stay in float32 even where the network runs in bf16: steps of 0.003 near t = 1 vanish in bf16.
    x, times = x.float(), times.to(x.device)
    for index in range(1, len(times)):
        x = step(x, times[index - 1], times[index])
        if on_step is not None:
            on_step(index, times[index], x)
    return x
