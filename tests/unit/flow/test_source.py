"""Sources of the flow and the coupling of images to modes."""

import types

import numpy as np
import pytest
import torch
import zarr
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmfm.config.choices import SETTINGS
from mmfm.flow.source import GaussianSource, MixtureSource, couple_modes, source_for
from mmfm.infra import rng
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.mapped_rows import MappedRows

K, SHAPE = 3, (2, 2, 2)
MEANS = torch.arange(K * 8, dtype=torch.float32).reshape(K, *SHAPE)
VARIANCES = torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.0, 0.8], dtype=torch.float64)


def draw(source: MixtureSource, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.arange(n)
    modes = source.draw_modes(rng.uniform(0, "mode", index))
    return modes, source.draw(modes, rng.normal(0, "noise", index, SHAPE))


def test_draws_recover_weights_means_and_variances():
    n = 40_000
    modes, x = draw(MixtureSource(MEANS, VARIANCES, WEIGHTS), n)
    counts = torch.bincount(modes, minlength=K)
    assert counts[1] == 0
    assert counts[0] / n == pytest.approx(0.2, abs=4 * np.sqrt(0.2 * 0.8 / n))
    for k in (0, 2):
        own = x[modes == k]
        sigma = VARIANCES[k].sqrt().item()
        assert (own.mean(0) - MEANS[k]).abs().max() < 5 * sigma / np.sqrt(len(own))
        assert own.var(0).mean().item() == pytest.approx(sigma**2, rel=0.03)


def test_a_draw_is_mean_plus_sigma_times_noise():
    noise = rng.normal(1, "noise", torch.arange(2), SHAPE)
    x = MixtureSource(MEANS, VARIANCES, WEIGHTS).draw(torch.tensor([2, 0]), noise)
    torch.testing.assert_close(x, torch.stack([MEANS[2] + 2 * noise[0], MEANS[0] + 0.5 * noise[1]]))


def test_a_diagonal_source_scales_every_position():
    noise = rng.normal(1, "noise", torch.arange(3), SHAPE)
    variances = torch.arange(1.0, 1 + K * 8).reshape(K, *SHAPE)
    modes = torch.tensor([2, 0, 2])
    x = MixtureSource(MEANS, variances, WEIGHTS).draw(modes, noise)
    torch.testing.assert_close(x, MEANS[modes] + variances[modes].sqrt() * noise)
    same = MixtureSource(MEANS, VARIANCES.reshape(K, 1, 1, 1).expand(K, *SHAPE), WEIGHTS).draw(modes, noise)
    assert torch.equal(same, MixtureSource(MEANS, VARIANCES, WEIGHTS).draw(modes, noise))


class Dtypes(TorchDispatchMode):
    """Notes the dtypes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.found |= {x.dtype for x in tree_leaves(made) if isinstance(x, torch.Tensor)}
        return made


def test_rows_on_disk_are_read_as_they_are(tmp_path):
    group = zarr.open_group(tmp_path / "s.zarr", mode="w")
    values = np.random.default_rng(0).uniform(0.1, 1, (5, *SHAPE)).astype(np.float32)
    layout = {"shape": values.shape, "dtype": "float32", "chunks": (1, *SHAPE)}
    group.create_array("variances", compressors=None, **layout)[:] = values
    rows, wanted = MappedRows(group["variances"]), torch.tensor([4, 0, 4])
    assert len(rows) == 5 and rows.shape == values.shape
    assert torch.equal(rows.gather(wanted), torch.from_numpy(values[wanted]))
    means, noise = torch.zeros(5, *SHAPE), rng.normal(1, "noise", torch.arange(3), SHAPE)
    loaded, mapped = (MixtureSource(means, v, torch.full((5,), 0.2)) for v in (torch.from_numpy(values), rows))
    with Dtypes() as used:
        drawn = mapped.draw(wanted, noise)
    assert torch.float64 not in used.found, "a batch of variances is large"
    assert torch.equal(drawn, loaded.draw(wanted, noise))
    if torch.cuda.is_available():
        source = MixtureSource(means.cuda(), rows, torch.full((5,), 0.2))
        torch.testing.assert_close(source.draw(wanted.cuda(), noise.cuda()).cpu(), loaded.draw(wanted, noise))
    group.create_array("packed", **layout)
    with pytest.raises(ValueError, match=r"'packed' has dtype float32.*only uncompressed float32"):
        MappedRows(group["packed"])


def test_half_precision_means_give_float32_near_the_exact_ones():
    source, coarse = (MixtureSource(means, VARIANCES, WEIGHTS) for means in (MEANS / 3, (MEANS / 3).bfloat16()))
    exact, rounded = draw(source, 50)[1], draw(coarse, 50)[1]
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() <= MEANS.max() * 2**-8


def test_means_on_the_host_give_the_same(tiny_pipeline):
    numbers = torch.arange(30)
    sources = [source_for("gmm", tiny_pipeline.spatial_gmm, "cpu", means_device=where) for where in ("device", "host")]
    modes, noise = sources[0].draw_modes(rng.uniform(0, "mode", numbers)), rng.normal(0, "noise", numbers, (32, 4, 4))
    assert torch.equal(*(source.draw(modes, noise) for source in sources))


def test_one_sigma_a_mode_lies_where_sources_are_made_and_one_a_position_with_the_means():
    """The latter are as large as the means, for which the device may have no room."""
    for variances, place in ((VARIANCES, "meta"), (torch.ones(K, *SHAPE), "cpu")):
        source = MixtureSource(MEANS, variances, WEIGHTS, device="meta")
        assert (source.device.type, source.means.device.type, source.sigma.device.type) == ("meta", "cpu", place)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_means_on_the_host_give_the_same_on_a_gpu(tiny_pipeline):
    numbers = torch.arange(30, device="cuda")
    noise = rng.normal(0, "noise", numbers, (32, 4, 4))
    drawn = []
    for where in ("device", "host"):
        source = source_for("gmm", tiny_pipeline.spatial_gmm, "cuda", means_device=where, precision="bf16")
        assert where == "device" or source.means.is_pinned()
        drawn.append(source.draw(source.draw_modes(rng.uniform(0, "mode", numbers)), noise))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("where", ["device", "host"])
def test_training_keeps_means_as_configured(tiny_pipeline, where):
    from mmfm import config
    from mmfm.training.setup import flow_matching
    from support.tiny import SECTIONS

    files, device = tiny_pipeline, torch.device("cpu")
    for precision, dtype in (("auto", torch.float32), ("bf16", torch.bfloat16)):
        keys = {**SECTIONS["train"], "means_precision": precision, "means_device": where}
        sections = config.StageConfig("train", "gmm", train=config.build(config.Train, keys))
        task = flow_matching(sections, files.listing, files.gmm, files.spatial_gmm, (32, 4, 4), 1, device)
        assert task.source.means.dtype == dtype and task.source.means.device.type == "cpu"


def test_the_posterior_is_float32_under_autocast(tiny_pipeline):
    mixture = Mixture.load(tiny_pipeline.gmm)
    tokens = mixture.means[[0, 1, 2, 3, 0]].float() + rng.normal(0, "g", torch.arange(5), (32,))
    plain = mixture.posterior(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        inside = mixture.posterior(tokens)
        assert (tokens @ tokens.T).dtype == torch.bfloat16, "autocast is on"
    assert inside.dtype == torch.float32 and torch.equal(inside, plain)


def test_the_gaussian_source_is_the_noise():
    noise = rng.normal(1, "noise", torch.arange(2), SHAPE)
    source = GaussianSource()
    assert source.draw_modes(torch.rand(2)) is None and source.num_modes == 0
    assert source.draw(None, noise) is noise
    with pytest.raises(ValueError, match="no modes"):
        source.draw(torch.tensor([0, 0]), noise)


def mixture() -> Mixture:
    """Two unit Gaussians at -1 and 1: p(1 | x) = 1 / (1 + exp(-2 x))."""
    return Mixture(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1))


def test_soft_coupling_draws_from_the_posterior():
    n = 20_000
    modes = couple_modes(mixture(), torch.full((n, 1), 0.5), rng.uniform(0, "mode", torch.arange(n)), "soft")
    expected = 1 / (1 + np.exp(-1.0))
    assert modes.float().mean().item() == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / n))


def test_hard_coupling_takes_the_likeliest_whatever_the_uniform():
    tokens = torch.tensor([[-0.1], [0.1], [3.0]])
    for u in (0.001, 0.999):
        assert couple_modes(mixture(), tokens, torch.full((3,), u), "hard").tolist() == [0, 1, 1]


def test_an_unknown_assignment_is_an_error():
    with pytest.raises(ValueError, match="must be one of soft, hard"):
        couple_modes(mixture(), torch.zeros(1, 1), torch.zeros(1), "sof")


@pytest.mark.parametrize(
    ("variances", "weights", "message"),
    [
        (VARIANCES[:2], WEIGHTS, "must be"),
        (-VARIANCES, WEIGHTS, "variances"),
        (VARIANCES, WEIGHTS * float("nan"), "weights"),
        (VARIANCES, WEIGHTS * 0, "all 0"),
    ],
)
def test_impossible_mixtures_are_refused(variances, weights, message):
    with pytest.raises(ValueError, match=message):
        MixtureSource(MEANS, variances, weights)


def test_source_for_every_setting(tiny_pipeline):
    for name, setting in SETTINGS.items():
        source = source_for(name, tiny_pipeline.spatial_gmm, "cpu")
        assert (source.num_modes > 0) == setting.mixture
    with pytest.raises(ValueError, match="--spatial-gmm"):
        source_for("gmm", None, "cpu")
    with pytest.raises(ValueError, match="uncond, gmm, mode, class, class_gmm"):
        source_for("gm", None, "cpu")


class Elsewhere:
    """A tensor on a device that rows reach a few at a time."""

    device = types.SimpleNamespace(type="elsewhere")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.dtype, self.taken = tensor, tensor.dtype, []

    def element_size(self) -> int:
        return self.tensor.element_size()

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.tensor[row]

    def __setitem__(self, rows: slice, values: torch.Tensor) -> None:
        self.taken.append(values.nbytes)
        self.tensor[rows] = values


@pytest.fixture
def rows_on_disk(tmp_path):
    values = np.random.default_rng(0).uniform(0.1, 1, (5, *SHAPE)).astype(np.float32)
    group = zarr.open_group(tmp_path / "s.zarr", mode="w")
    array = group.create_array("means", compressors=None, shape=values.shape, dtype="float32", chunks=(1, *SHAPE))
    array[:] = values
    return MappedRows(array), values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_reach_a_device_through_a_few_at_a_time(rows_on_disk, monkeypatch, dtype):
    rows, values = rows_on_disk
    wanted = torch.from_numpy(values).to(dtype)
    for fit, expected in ((0, 1), (1, 1), (2, 2), (9, 5)):
        monkeypatch.setattr("mmfm.mixture.mapped_rows._STAGED_BYTES", fit * wanted[0].nbytes)
        there = Elsewhere(torch.zeros(5, *SHAPE, dtype=dtype))
        rows.copy_to(there)
        assert torch.equal(there.tensor, wanted) and max(there.taken) == expected * wanted[0].nbytes
    here = torch.zeros(5, *SHAPE, dtype=dtype)
    rows.copy_to(here)
    assert torch.equal(here, wanted)


def test_a_row_that_is_missing_or_cut_is_named(rows_on_disk):
    rows, _ = rows_on_disk
    rows.check()
    files = [rows._file(row) for row in range(5)]
    files[3].write_bytes(files[3].read_bytes()[:-4])
    with pytest.raises(ValueError, match=rf"row 3 .* has {4 * np.prod(SHAPE) - 4:,} bytes, not {4 * np.prod(SHAPE):,}"):
        rows.check()
    files[1].unlink()
    with pytest.raises(ValueError, match=r"row 1 .* is missing"):
        rows.gather(torch.tensor([0, 1]))
    assert rows.gather(torch.tensor([0, 4])).shape == (2, *SHAPE)
