"""Solvers of the flow's ordinary differential equation, dx/dt = v(x, t), along a decreasing time grid."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from mmfm.config.choices import SOLVERS

# (x (B, ...), t (B,)) -> velocity (B, ...)
VelocityFn = Callable[[Tensor, Tensor], Tensor]

MAX_STEPS = 2000
"""Of a solver that chooses its steps; tolerances of 1e-5 take dozens. Below the arithmetic's rounding it never ends."""


def solve(
    solver: str, velocity_fn: VelocityFn, x: Tensor, times: Tensor, *, dtype: torch.dtype = torch.float32,
    rtol: float = 0.0, atol: float = 0.0, watch: Callable[[int], None] = lambda evaluations: None,
) -> tuple[Tensor, int]:  # fmt: skip
    """Integrate with one of :data:`mmfm.config.choices.SOLVERS`.

    A solver with given steps is implemented by (velocity_fn, x, times, dtype) -> state, as :func:`euler`; one that
    chooses its steps as :func:`adaptive`.

    Args:
        dtype: of state and time, where the steps are given.
        rtol, atol, watch: of a solver that chooses its steps.

    Returns:
        state at times[-1], (B, ...), and the evaluations of the velocity.
    """
    kind = SOLVERS[solver]
    if kind.evaluations is None:
        return kind.load()(velocity_fn, x, times, solver, rtol, atol, watch)
    return kind.load()(velocity_fn, x, times, dtype), kind.evaluations * (len(times) - 1)


def euler(velocity_fn: VelocityFn, x: Tensor, times: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Integrate with Euler's method: one evaluation a step, len(times) - 1 in all.

    Args:
        velocity_fn: the velocity field.
        x: state at times[0], (B, ...).
        times: (T,) strictly decreasing, from 1 (source) towards 0 (data).
        dtype: of state and time. bfloat16 rounds both as the published code did; the step's length stays exact.

    Returns:
        state at times[-1], (B, ...) of ``dtype``.

    Raises:
        ValueError: a grid that is not decreasing or has fewer than two points.
    """

    def step(x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        return x + (t_next - t) * _evaluate(velocity_fn, x, t)

    return _integrate(step, x, times, dtype)


def heun(velocity_fn: VelocityFn, x: Tensor, times: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Integrate with Heun's second-order method: the mean of the velocities at both ends of a step.

    Two evaluations a step, 2 (len(times) - 1) in all. Arguments, result and errors as for `euler`.
    """

    def step(x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        first = _evaluate(velocity_fn, x, t)
        second = _evaluate(velocity_fn, x + (t_next - t) * first, t_next)
        return x + (t_next - t) * (first + second) / 2

    return _integrate(step, x, times, dtype)


def adaptive(
    velocity_fn: VelocityFn, x: Tensor, times: Tensor, method: str, rtol: float, atol: float,
    watch: Callable[[int], None] = lambda evaluations: None,
) -> tuple[Tensor, int]:  # fmt: skip
    """Integrate with a solver of torchdiffeq that chooses its steps; the grid gives only the two ends.

    The error is held per image: a step is taken if that of the worst one is within the tolerance. The steps are shared
    by the batch, so an image depends on its companions within the tolerances.

    Args:
        velocity_fn: the velocity field.
        x: state at times[0], (B, ...).
        times: (T,) strictly decreasing.
        method: name in torchdiffeq, ``dopri5`` for instance.
        rtol, atol: tolerances.
        watch: called with the number of evaluations after each.

    Returns:
        state at times[-1], (B, ...) float32, and the number of evaluations.

    Raises:
        ValueError: a grid that is not decreasing, or tolerances that no step can hold, or none of :data:`MAX_STEPS`.
    """
    from torchdiffeq import odeint

    times = _checked(times)
    evaluations = 0

    def field(t: Tensor, x: Tensor) -> Tensor:
        nonlocal evaluations
        velocity = _evaluate(velocity_fn, x, t.to(torch.float32))
        evaluations += 1
        watch(evaluations)
        return velocity

    def worst_image(error: Tensor) -> Tensor:
        return error.reshape(len(x), -1).square().mean(1).sqrt().max()

    ends = times[[0, -1]].to(x.device)
    options = {"norm": worst_image, "max_num_steps": MAX_STEPS}
    try:
        path = odeint(field, x.float(), ends, rtol=rtol, atol=atol, method=method, options=options)
    except AssertionError as error:  # torchdiffeq's word for a step that became too short, too many, or for NaN
        raise ValueError(
            f"{method} with rtol {rtol:g} and atol {atol:g} does not get to the end ({error}); raise sample.rtol and "
            "sample.atol, or set sample.solver to euler"
        ) from error
    return path[-1], evaluations


def _evaluate(velocity_fn: VelocityFn, x: Tensor, t: Tensor) -> Tensor:
    return velocity_fn(x, t.to(x.dtype).expand(x.shape[0])).to(x.dtype)


def _checked(times: Tensor) -> Tensor:
    times = times.detach().to("cpu", torch.float32)
    if times.ndim != 1 or len(times) < 2 or not (times.diff() < 0).all():
        raise ValueError(f"times {times.tolist()} must be at least two numbers in decreasing order")
    return times


def _integrate(
    step: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, times: Tensor, dtype: torch.dtype
) -> Tensor:
    # By default state and time stay in float32 even where the network runs in bf16: steps of 0.003 near t = 1 vanish in
    # bf16. Times are 0-dimensional, so that t_next - t is exact whatever the state's dtype.
    times = _checked(times)
    x, times = x.to(dtype), times.to(x.device)
    for t, t_next in itertools.pairwise(times):
        x = step(x, t, t_next)
    return x
