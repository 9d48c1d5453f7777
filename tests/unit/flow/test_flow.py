"""Path, times, solvers and guidance: parity with the reference and analytic checks."""

import json
import math
from functools import partial

import pytest
import torch
from safetensors import safe_open
from torch.overrides import TorchFunctionMode

from mmfm.config.choices import SOLVERS
from mmfm.flow.guidance import autoguidance, classifier_free_guidance
from mmfm.flow.path import interpolate, shift_times, target_velocity, time_grid, time_shift, train_times
from mmfm.flow.solver import adaptive, euler, heun, solve
from mmfm.models.dit import DiT, DiTConfig
from support.places import GOLDEN


@pytest.fixture(scope="module")
def schedule():
    return json.loads((GOLDEN / "time_schedule.json").read_text())


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN / "dit_ddt_tiny.safetensors", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    config = json.loads(metadata["config"])
    fields = {}
    for prefix, depth in (("model", config["depth"]), ("guide", json.loads(metadata["guide_depth"]))):
        network = DiT(DiTConfig(**{**config, "depth": depth}, label_dropout=0.1)).eval().requires_grad_(False)
        names = [name for name in tensors if name.startswith(f"{prefix}.")]
        network.load_state_dict({name.removeprefix(f"{prefix}."): tensors.pop(name) for name in names})
        fields[prefix] = network
    interval = tuple(json.loads(metadata["interval"]))
    return tensors, fields["model"], fields["guide"], interval, int(metadata["null_label"])


def assert_parity(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_interpolation_runs_from_data_to_source_at_the_target_velocity():
    data, source = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t = torch.tensor([0.0, 1.0, 0.25])
    x = interpolate(data, source, t)
    assert torch.equal(x[0], data[0]) and torch.equal(x[1], source[1])
    torch.testing.assert_close(x[2], 0.75 * data[2] + 0.25 * source[2])
    step = interpolate(data, source, t + 0.5) - x
    torch.testing.assert_close(step / 0.5, target_velocity(data, source))


def test_shift_and_grid_equal_reference(schedule):
    shift = time_shift((768, 16, 16))
    assert shift == pytest.approx(schedule["shift"], rel=1e-12)
    grid = time_grid(50, shift)
    assert grid.dtype == torch.float32
    torch.testing.assert_close(grid, torch.tensor(schedule["euler_time_grid_50"]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(384, 16, 16), (32, 4, 4), (768, 16, 16)])  # rounded above, below and to 1
def test_the_first_time_is_exactly_1(shape):
    """A guidance interval that ends, or lies, at 1 holds the first step."""
    times, guided = time_grid(10, time_shift(shape)), []
    assert times[0] == 1 and (times.diff() < 0).all()
    for interval, steps in (((0.01, 1.0), 9), ((1.0, 1.0), 1)):
        guided.clear()
        field = autoguidance(lambda x, t: x, lambda x, t: guided.append(t) or x, 1.5, interval)
        euler(field, torch.ones(1, 1), times)
        assert len(guided) == steps


def test_training_times_follow_the_reference_distribution(schedule):
    uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    times = train_times(uniform, schedule["shift"])
    assert times.dtype == torch.float32
    for level, expected in schedule["train_time_quantiles"].items():
        # 2 million draws determine the 1 % quantile to about 1e-3 and the inner ones better.
        assert times.double().quantile(float(level)).item() == pytest.approx(expected, abs=1.5e-3)


def test_training_times_are_truncated_logit_normal():
    edge = shift_times(torch.tensor(0.999), 6.928).item()
    times = train_times(torch.tensor([0.0, 0.5, 1 - 2**-24, 1.0], dtype=torch.float64), 6.928)
    assert times[0] == 0 and times.isfinite().all() and (times.diff() > 0).all()
    assert times[1].item() == pytest.approx(6.928 / 7.928, rel=1e-6)
    assert times[3].item() == pytest.approx(edge, abs=1e-4)
    probit = math.sqrt(2) * torch.erfinv(torch.tensor(2 * 0.8 - 1, dtype=torch.float64)).item()
    assert train_times(torch.tensor([0.8]), 1.0).item() == pytest.approx(1 / (1 + math.exp(-probit)), rel=1e-5)


def test_euler_trajectory_equals_reference(golden):
    tensors, model, *_ = golden
    states = []

    def velocity(x, t):
        states.append(x)
        return model(x, t, y=tensors["y"])

    final = euler(velocity, tensors["x"], time_grid(8, 3.0))
    assert_parity(torch.stack([*states, final]), tensors["euler_trajectory"])


def test_heun_equals_reference(golden):
    tensors, model, *_ = golden
    assert_parity(heun(partial(model, y=tensors["y"]), tensors["x"], time_grid(5, 3.0)), tensors["heun_final"])


@pytest.mark.parametrize("solver, order", [(euler, 1), (heun, 2)])
def test_convergence_order(solver, order):
    """dx/dt = x from t = 1 to 0: x(0) = x(1) / e; halving the step divides the error by 2 ** order."""
    start, exact = torch.ones(2, 1), math.exp(-1)
    errors = [
        abs(solver(lambda x, t: x, start, torch.linspace(1, 0, steps + 1))[0].item() - exact) for steps in (8, 16)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_solver_keeps_float32_and_passes_batched_times():
    seen = []

    def velocity(x, t):
        seen.append((x.dtype, t.dtype, tuple(t.shape)))
        return x.bfloat16()

    final = euler(velocity, torch.ones(3, 2, dtype=torch.bfloat16), torch.tensor([1.0, 0.999, 0.5]))
    assert final.dtype == torch.float32
    assert seen == [(torch.float32, torch.float32, (3,))] * 2


def test_bf16_state_and_time_round_as_torchdiffeq_does():
    """The published sampler gave torchdiffeq's Euler a bf16 state: time is rounded for the model."""
    from torchdiffeq import odeint

    start, times = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16(), time_grid(12, 3.0)

    def velocity(x, t):
        assert x.dtype == t.dtype == torch.bfloat16
        return torch.sin(3 * x) + t[:, None]

    expected = odeint(lambda t, x: velocity(x, t.expand(len(x))), start, times, method="euler")[-1]
    final = euler(velocity, start, times, dtype=torch.bfloat16)
    assert final.dtype == torch.bfloat16 and torch.equal(final, expected)
    exact = euler(lambda x, t: torch.sin(3 * x) + t[:, None], start.float(), times)
    assert 1e-3 < (final.float() - exact).abs().max() < 0.1


@pytest.mark.parametrize(("solver", "dtype"), [(s, d) for s in (euler, heun) for d in (torch.bfloat16, torch.float32)])
def test_a_steps_length_is_rounded_to_the_states_dtype_before_it_is_used(solver, dtype):
    """PyTorch would round it or not, depending on the devices of the two factors."""
    lengths = []

    class Products(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            factors = [a for a in arguments if isinstance(a, torch.Tensor)]
            if function is torch.Tensor.mul and len(factors) == 2:
                lengths.extend(factor for factor in factors if factor.ndim == 0)
            return function(*arguments, **(keywords or {}))

    times = time_grid(4, 3.0)
    with Products():
        solver(lambda x, t: x, torch.ones(2, 3), times, dtype=dtype)
    assert {length.dtype for length in lengths} == {dtype}
    assert sorted({length.item() for length in lengths}) == sorted(times.diff().to(dtype).tolist())


@pytest.mark.parametrize("method", [name for name, solver in SOLVERS.items() if solver.adaptive])
def test_adaptive_solvers_hold_their_tolerance_for_every_image(method):
    """dx/dt = a x from t = 1 to 0.01, with an easy image that must not hide the hard one."""
    rates = torch.tensor([0.0, 0.0, 0.0, 2.0])[:, None]
    start, times, calls = torch.ones(4, 5), torch.tensor([1.0, 0.4, 0.01]), []

    def velocity(x, t):
        calls.append((x.dtype, t.dtype, tuple(t.shape)))
        return rates * x

    final, evaluations = adaptive(velocity, start, times, method, 1e-4, 1e-5)
    torch.testing.assert_close(final, torch.exp(-0.99 * rates).expand(4, 5), rtol=0.02, atol=1e-4)
    assert len(calls) == evaluations > 5 and set(calls) == {(torch.float32, torch.float32, (4,))}
    assert adaptive(velocity, start, times, method, 1e-2, 1e-2)[1] < evaluations
    assert adaptive(velocity, torch.ones(4, 500), times, method, 1e-4, 1e-5)[1] == evaluations  # whatever the size


def test_an_adaptive_solver_says_what_to_do_where_it_fails():
    with pytest.raises(ValueError, match=r"dopri5 with rtol 0.001 .* raise sample\.rtol"):
        adaptive(lambda x, t: x * float("nan"), torch.ones(1, 1), torch.tensor([1.0, 0.0]), "dopri5", 1e-3, 1e-3)


def test_an_adaptive_solver_gives_up_where_rounding_hides_its_error(monkeypatch):
    """Below the rounding of float32 no step is small enough; steps get shorter without an end."""
    monkeypatch.setattr("mmfm.flow.solver.MAX_STEPS", 50)
    start, seen = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), []
    with pytest.raises(ValueError, match=r"rtol 1e-12 .*max_num_steps.*raise sample\.rtol and sample\.atol"):
        adaptive(lambda x, t: torch.sin(9 * x), start, torch.tensor([1.0, 0.0]), "dopri5", 1e-12, 1e-12, seen.append)
    assert seen == list(range(1, len(seen) + 1)) and 50 < len(seen) < 400


@pytest.mark.parametrize("name", list(SOLVERS))
def test_solvers_by_name_say_how_often_they_asked_for_the_velocity(name):
    asked = []

    def velocity(x, t):
        asked.append(len(asked) + 1)
        return x

    final, evaluations = solve(name, velocity, torch.ones(2, 1), torch.linspace(1, 0, 9), rtol=1e-3, atol=1e-3)
    assert evaluations == len(asked)
    assert final[0].item() == pytest.approx(math.exp(-1), abs=0.03)
    if SOLVERS[name].adaptive:
        seen, times = [], torch.tensor([1.0, 0.0])
        solve(name, velocity, torch.ones(2, 1), times, rtol=1e-3, atol=1e-3, watch=seen.append)
        assert seen == list(range(1, len(seen) + 1)) and len(seen) > 5


@pytest.mark.parametrize("times", [[1.0], [0.0, 1.0], [1.0, 1.0]])
def test_solver_refuses_a_grid_that_does_not_decrease(times):
    with pytest.raises(ValueError, match="decreasing"):
        euler(lambda x, t: x, torch.ones(1, 1), torch.tensor(times))


def test_one_time_point_is_the_source():
    assert time_grid(1, 6.9).tolist() == [1.0]


def test_time_grid_refuses_no_point():
    with pytest.raises(ValueError, match="time_points = 0"):
        time_grid(0, 1.0)


def test_autoguidance_equals_reference(golden):
    tensors, model, guide, interval, _ = golden
    y = tensors["y"]
    field = autoguidance(partial(model, y=y), partial(guide, y=y), scale=1.5, interval=interval)
    assert_parity(field(tensors["x"], tensors["t"]), tensors["autoguided_velocity"])


def test_classifier_free_guidance_equals_reference(golden):
    tensors, model, _, interval, null_label = golden
    field = classifier_free_guidance(model, tensors["y"], null_label, scale=2.0, interval=interval)
    assert_parity(field(tensors["x"], tensors["t"]), tensors["cfg_velocity"])


def test_each_network_runs_once_on_the_batch_and_the_guide_only_where_needed():
    batches = {"model": [], "guide": []}

    def record(name, factor):
        return lambda x, t: batches[name].append(len(x)) or factor * x

    field = autoguidance(record("model", 3.0), record("guide", 1.0), scale=1.5, interval=(0.2, 0.6))
    x = torch.ones(4, 2)
    inside = field(x, torch.full((4,), 0.2))
    mixed = field(x, torch.tensor([0.1, 0.2, 0.6, 0.7]))
    outside = field(x, torch.full((4,), 0.7))
    torch.testing.assert_close(inside, 4 * x)
    torch.testing.assert_close(mixed[:, 0], torch.tensor([3.0, 4.0, 4.0, 3.0]))
    torch.testing.assert_close(outside, 3 * x)
    assert batches == {"model": [4, 4, 4], "guide": [4, 4]}


def test_guidance_does_not_wait_for_the_device():
    """Tensors on `meta` have no values: reading one raises, as a GPU would have to be waited for."""
    guided = []
    weak = lambda x, t: guided.append(float(t[0])) or x  # noqa: E731
    field = autoguidance(lambda x, t: x, weak, scale=1.5, interval=(0.2, 0.6))
    x = torch.ones(4, 2, device="meta")
    assert euler(field, x, torch.tensor([1.0, 0.5, 0.3, 0.1, 0.0])).device.type == "meta"
    assert guided == pytest.approx([0.5, 0.3])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_guided_steps_on_a_gpu_never_wait():
    x = torch.ones(4, 2, device="cuda")
    field = autoguidance(lambda x, t: x, lambda x, t: x, scale=1.5, interval=(0.2, 0.6))
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = euler(field, x, torch.tensor([1.0, 0.5, 0.3, 0.1, 0.0]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


def test_classifier_free_guidance_doubles_the_batch_only_inside_the_interval():
    batches = []

    def velocity(x, t, y):
        batches.append(y.tolist())
        return y.float()[:, None] * x

    field = classifier_free_guidance(velocity, torch.tensor([1, 2]), null_label=9, scale=2.0, interval=(0.0, 0.5))
    x = torch.ones(2, 1)
    torch.testing.assert_close(field(x, torch.full((2,), 0.5)), torch.tensor([[-7.0], [-5.0]]))
    torch.testing.assert_close(field(x, torch.full((2,), 0.6)), torch.tensor([[1.0], [2.0]]))
    assert batches == [[1, 2, 9, 9], [1, 2]]


def test_guidance_without_an_interval_holds_at_all_times():
    x, t = torch.ones(3, 1), torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(autoguidance(lambda x, t: 3 * x, lambda x, t: x, scale=1.5)(x, t), 4 * x)
    labelled = classifier_free_guidance(lambda x, t, y: y[:, None] * x, torch.tensor([3, 3, 3]), 1, scale=1.5)
    assert torch.equal(labelled(x, t), 4 * x)


def test_guidance_scale_one_is_the_model_and_bad_intervals_are_refused():
    x, t = torch.randn(2, 3), torch.tensor([0.2, 0.9])
    field = autoguidance(lambda x, t: 2 * x, lambda x, t: -x, scale=1.0)
    torch.testing.assert_close(field(x, t), 2 * x)
    with pytest.raises(ValueError, match=r"interval \(0.8, 0.1\)"):
        autoguidance(lambda x, t: x, lambda x, t: x, scale=1.0, interval=(0.8, 0.1))
