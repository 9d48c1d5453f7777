"""Solvers of the flow's ordinary differential equation, dx/dt = v(x, t), along a decreasing time grid."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from mmfm.config.choices import SOLVERS

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""(x (B, ...), t (B,)) -> velocity (B, ...). Fixed-step solvers give t on the CPU, whatever the device of x."""

MAX_STEPS = 2000
"""Limit for adaptive solvers: tolerances of 1e-5 take dozens, tolerances below rounding error would never end."""


def solve(
    solver: str,
    velocity_fn: VelocityFn,
    x: Tensor,
    times: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    rtol: float = 0.0,
    atol: float = 0.0,
    watch: Callable[[int], None] = lambda evaluations: None,
) -> tuple[Tensor, int]:
    """Integrate with one of :data:`mmfm.config.choices.SOLVERS`.

    Fixed-step solvers have the signature of :func:`euler`, adaptive ones that of :func:`adaptive`.

    Args:
        dtype: of state and time, for fixed-step solvers.
        rtol, atol, watch: for adaptive solvers.

    Returns:
        state at times[-1], (B, ...), and the number of velocity evaluations.
    """
    choice = SOLVERS[solver]
    if choice.evaluations is None:
        return choice.load()(velocity_fn, x, times, solver, rtol, atol, watch)
    return choice.load()(velocity_fn, x, times, dtype), choice.evaluations * (len(times) - 1)


def euler(velocity_fn: VelocityFn, x: Tensor, times: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Integrate with Euler's method, which evaluates the velocity once per step.

    Args:
        velocity_fn: the velocity field.
        x: state at times[0], (B, ...).
        times: (T,) strictly decreasing, from 1 (source) towards 0 (data).
        dtype: of state and time. bfloat16 rounds both, as the published code did. A step's length is the difference of
            float32 times in any case, rounded to the state's dtype.

    Returns:
        state at times[-1], (B, ...) of ``dtype``.

    Raises:
        ValueError: `times` is not decreasing or has fewer than two points.
    """

    def step(x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        return x + _length(t, t_next, x) * _evaluate(velocity_fn, x, t)

    return _integrate(step, x, times, dtype)


def heun(velocity_fn: VelocityFn, x: Tensor, times: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Integrate with Heun's second-order method, which averages the velocities at both ends of a step.

    Two evaluations per step. Arguments, result and errors as for :func:`euler`.
    """

    def step(x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        first = _evaluate(velocity_fn, x, t)
        second = _evaluate(velocity_fn, x + _length(t, t_next, x) * first, t_next)
        return x + _length(t, t_next, x) * (first + second) / 2

    return _integrate(step, x, times, dtype)


def adaptive(
    velocity_fn: VelocityFn,
    x: Tensor,
    times: Tensor,
    method: str,
    rtol: float,
    atol: float,
    watch: Callable[[int], None] = lambda evaluations: None,
) -> tuple[Tensor, int]:
    """Integrate with an adaptive solver of torchdiffeq from times[0] to times[-1].

    A step is accepted if the error of the worst image in the batch is within tolerance. The batch shares its steps, so
    an image depends, within the tolerances, on the rest of its batch.

    Args:
        velocity_fn: the velocity field.
        x: state at times[0], (B, ...).
        times: (T,) strictly decreasing; only the ends are used.
        method: name in torchdiffeq, such as ``dopri5``.
        rtol, atol: tolerances.
        watch: called after each evaluation with the number so far.

    Returns:
        state at times[-1], (B, ...) float32, and the number of evaluations.

    Raises:
        ValueError: `times` is not decreasing, or the tolerances can't be met within :data:`MAX_STEPS` steps.
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
    except AssertionError as error:  # torchdiffeq raises it for steps that are too short or too many, and for NaN
        raise ValueError(
            f"{method} with rtol {rtol:g} and atol {atol:g} did not reach the end ({error}); raise sample.rtol and "
            "sample.atol, or set sample.solver to euler"
        ) from error
    return path[-1], evaluations


def _length(t: Tensor, t_next: Tensor, x: Tensor) -> Tensor:
    """Return the length of a step in the dtype of x, to which only some devices would round it in a product."""
    return (t_next - t).to(x.dtype)


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
    # The default is float32 even if the network runs in bf16, which can't resolve steps of 0.003 near t = 1. Times are
    # float32, so t_next - t is exact for any dtype of the state. They stay on the CPU, so that guidance can read
    # them without waiting for a GPU.
    times = _checked(times)
    x = x.to(dtype)
    for t, t_next in itertools.pairwise(times):
        x = step(x, t, t_next)
    return x
