"""The spatial mixture against NumPy over images and flips; dealing; kills; refusals."""

import json
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm import config, data
from mmfm.cli import sample as sample_command
from mmfm.cli import spatial_gmm
from mmfm.cli.__main__ import main
from mmfm.data.moments import Moments
from mmfm.flow.source import source_for
from mmfm.infra import rng, store
from mmfm.infra.distributed import Ranks
from mmfm.mixture import spatial
from mmfm.mixture.coupling import CouplingCost
from mmfm.mixture.images_by_mode import ImagesByMode
from mmfm.mixture.spatial import SpatialMixture
from mmfm.stages import spatial_gmm as stage
from mmfm.stages.provenance import Inputs
from mmfm.stages.runner import Context, deal
from support.tiny import SECTIONS, Pipeline, write_images, write_listing
from support.tiny import settings as json_of

ALONE = Ranks(0, 1, torch.device("cpu"))
N, SIZE = 30, 8
LABELS = np.array([0] * 9 + [2] + [3] * 14 + [5] * 6)[np.random.default_rng(0).permutation(N)].astype(np.int32)
WEIGHTS = np.array([0.3, 0.0, 0.05, 0.4, 0.0, 0.25])  # modes 1 and 4 are empty, mode 2 has one image
DIGESTS = {"listing_digest": "l", "encoder_digest": "e", "stats_digest": "s", "gmm_digest": "g"}


def encode(images):
    """Latents (B, 3, 4, 4) that hang a little on the batch, as a real encoder's rounding does."""
    pooled = torch.nn.functional.avg_pool2d(images, 2) * torch.arange(1.0, 5.0)
    return pooled.tanh() + 1e-6 * images.mean()


def sections(batch_size=4, covariance_type="spherical"):
    values = {
        "image": {"size": SIZE},
        "encoder": SECTIONS["encoder"],
        "spatial_gmm": {"batch_size": batch_size, "workers": 0, "covariance_type": covariance_type},
    }
    return config.StageConfig.build("spatial_gmm", values)


@pytest.fixture(scope="module")
def listing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spatial")
    return write_listing(folder / "listing.safetensors", write_images(folder / "images", N, size=SIZE))


def fit(listing, out, encode=encode, ranks=ALONE, batch_size=4, labels=LABELS, covariance_type="spherical"):
    outputs = {"spatial_gmm.zarr": out, "report.json": out.with_name("report.json")}
    inputs = Inputs(DIGESTS, {"listing_digest": listing})
    context = Context.open(sections(batch_size, covariance_type), ranks, inputs, outputs)
    autoencoder = stage.Autoencoder(lambda images: (encode(images), images[:, :, 0, 0]), (3, 4, 4))
    return stage.fit(context, listing, labels, WEIGHTS, lambda: autoencoder)


def contents(path):
    group = zarr.open_group(path, mode="r")
    return {name: array[:].tobytes() for name, array in group.arrays()}, dict(group.attrs)


def unions_with_flips(listing, encode=encode):
    """Latents of every mode's images and their flips, (2 n, C, H, W) float64; modes without images left out."""
    images = torch.cat([images for _, images in data.image_batches(listing, SIZE, [range(N)])])
    latents = encode(data.to_float(images, torch.device("cpu"))).double().numpy()
    own = {k: latents[np.equal(LABELS, k)] for k in range(len(WEIGHTS))}
    return {k: np.concatenate([x, x[..., ::-1]]) for k, x in own.items() if len(x)}


def brute_force(listing):
    return {k: (both.mean(0), both.var(0).mean()) for k, both in unions_with_flips(listing).items()}


def test_means_and_variances_are_those_of_images_and_flips(listing, tmp_path):
    report = fit(listing, tmp_path / "spatial_gmm.zarr")
    mixture, expected = SpatialMixture.open(tmp_path / "spatial_gmm.zarr"), brute_force(listing)
    for k, (mean, variance) in expected.items():
        np.testing.assert_allclose(mixture.means[k], mean, atol=3e-6)
        assert mixture.variances[k] == pytest.approx(variance, rel=1e-4)
    for k in (1, 4):  # unweighted average of the modes with images
        np.testing.assert_allclose(mixture.means[k], np.mean([m for m, _ in expected.values()], 0), atol=3e-6)
        assert mixture.variances[k] == pytest.approx(np.mean([v for _, v in expected.values()]), rel=1e-4)
    assert mixture.means.dtype == np.float32
    assert mixture.means.chunks == (1, 3, 4, 4)
    np.testing.assert_array_equal(mixture.weights, WEIGHTS)
    np.testing.assert_array_equal(mixture.counts, [9, 0, 1, 14, 0, 6])
    assert {name: mixture.attributes[name] for name in DIGESTS} == DIGESTS
    assert (report["empty_components"], report["components_of_one_image"]) == (2, 1)
    assert json.loads((tmp_path / "report.json").read_text())["digest"] == mixture.attributes["digest"]
    assert not list(tmp_path.glob("state-*/component-*"))
    assert torch.equal(mixture.load_means(), torch.from_numpy(mixture.means[:]))
    assert mixture.load_means(dtype=torch.bfloat16).dtype == torch.bfloat16


def test_diag_variances_are_those_of_images_and_flips_at_every_position(listing, tmp_path):
    out = tmp_path / "spatial_gmm.zarr"
    report = fit(listing, out, covariance_type="diag")
    mixture, raised = SpatialMixture.open(out), 0
    assert mixture.covariance_type == report["covariance_type"] == "diag"
    assert mixture.variances.dtype == np.float32 and mixture.variances.chunks == (1, 3, 4, 4)
    expected = {}
    for k, both in unions_with_flips(listing).items():
        floor = max(1e-6, 1e-3 * both.var(0).mean())
        raised += (both.var(0) < floor).sum()
        expected[k] = np.maximum(both.var(0), floor)
        np.testing.assert_allclose(mixture.variances[k], expected[k], rtol=3e-4, atol=1e-6)
    assert report["share_of_positions_raised_to_the_floor"] == raised / (4 * 48)
    for k in (1, 4):
        np.testing.assert_allclose(mixture.variances[k], np.mean(list(expected.values()), 0), rtol=3e-4, atol=1e-6)
    assert (mixture.variances[:] == mixture.variances[:][..., ::-1]).all()
    spherical = fit(listing, tmp_path / "spherical" / "s.zarr")
    assert report["variance"] == spherical["variance"]
    np.testing.assert_array_equal(mixture.means[:], SpatialMixture.open(tmp_path / "spherical" / "s.zarr").means[:])


def test_a_position_without_variance_gets_the_floor(listing, tmp_path):
    def symmetric_channel(images):
        latents = encode(images)
        latents[:, 0] = latents[:, 0] + latents[:, 0].flip(-1)
        latents[:, 1] = 2.0
        return latents

    report = fit(listing, tmp_path / "s.zarr", symmetric_channel, covariance_type="diag")
    variances = SpatialMixture.open(tmp_path / "s.zarr").variances
    one_image = unions_with_flips(listing, symmetric_channel)[2]
    floor = max(1e-6, 1e-3 * one_image.var(0).mean())
    np.testing.assert_allclose(variances[2][:2], floor, rtol=1e-4)  # its own flip, and the same in all images
    np.testing.assert_allclose(variances[2][2], one_image.var(0)[2].clip(min=floor), rtol=1e-3)
    assert (variances[3][0] > variances[3][1]).all() and (variances[3][1] > 0).all()
    assert 0.3 < report["share_of_positions_raised_to_the_floor"] < 1


@pytest.mark.parametrize("covariance_type", ["spherical", "diag"])
def test_coupling_costs_are_those_of_pairs(listing, tmp_path, covariance_type):
    """Monte Carlo over the real latents and flips, source drawn from the published store."""
    cost = fit(listing, tmp_path / "s.zarr", covariance_type=covariance_type)["coupling_cost"]
    source = source_for("gmm", tmp_path / "s.zarr", "cpu")
    unions = unions_with_flips(listing)
    x_data = torch.from_numpy(np.concatenate(list(unions.values())))
    own = torch.from_numpy(np.repeat(list(unions), [len(x) for x in unions.values()]))
    n, repeats = len(x_data), 1500
    x_data, own = x_data.repeat(repeats, 1, 1, 1), own.repeat(repeats)
    index = torch.arange(n * repeats)
    noise = rng.normal(0, "test", index, (3, 4, 4))
    drawn = {
        "gaussian": noise,
        "mixture_independent": source.draw(source.draw_modes(rng.uniform(0, "test", index)), noise),
        "mode_coupled": source.draw(own, noise),
    }
    for name, x_source in drawn.items():
        distances = (x_source - x_data).square().mean((1, 2, 3))
        error = distances.std().item() / len(distances) ** 0.5
        assert cost[name] == pytest.approx(distances.mean().item(), abs=5 * error), name
        assert error < 0.005 * cost[name]
    assert cost["mode_coupled"] < cost["mixture_independent"] < cost["gaussian"]


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 6), seed=st.integers(0, 1000))
def test_flip_algebra(n, seed):
    latents = np.random.default_rng(seed).normal(3.0, 1.0, (n, 2, 3, 5))
    both = np.concatenate([latents, latents[..., ::-1]])
    mean, variance = spatial.union_with_flips(Moments.zeros((2, 3, 5)).update(latents))
    np.testing.assert_allclose(mean, both.mean(0), rtol=1e-12)
    assert variance == pytest.approx(both.var(0).mean(), rel=1e-12)
    positions, raised = spatial.position_variances(Moments.zeros((2, 3, 5)).update(latents))
    floor = max(1e-6, 1e-3 * both.var(0).mean())
    np.testing.assert_allclose(positions, np.maximum(both.var(0), floor), rtol=1e-12)
    assert raised == (both.var(0) < floor * (1 - 1e-9)).sum()


def test_the_batch_size_changes_rounding_only(listing, tmp_path):
    small, large = (fit(listing, tmp_path / str(size) / "s.zarr", batch_size=size) for size in (1, 100))
    assert small["variance"]["max"] == pytest.approx(large["variance"]["max"], rel=1e-4)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("calls", "kind"), [(0, "spherical"), (1, "spherical"), (4, "diag"), (7, "spherical")])
def test_a_killed_run_ends_with_the_same_bits_and_encodes_only_what_is_missing(listing, tmp_path, calls, kind):
    fit(listing, tmp_path / "undisturbed" / "s.zarr", covariance_type=kind)
    batches = []

    def encode_and_die(images):
        if len(batches) == calls:
            raise Killed
        batches.append(len(images))
        return encode(images)

    out = tmp_path / "killed" / "s.zarr"
    with pytest.raises(Killed):
        fit(listing, out, encode_and_die, covariance_type=kind)
    assert not out.exists()
    finished = len(list(out.parent.glob("state-*/component-*")))
    again = []
    fit(listing, out, lambda images: again.append(len(images)) or encode(images), covariance_type=kind)
    assert contents(out) == contents(tmp_path / "undisturbed" / "s.zarr")
    assert (sum(again) < N) == (finished > 0)


def test_a_kill_between_row_and_marker_is_repaired(listing, tmp_path, monkeypatch):
    fit(listing, tmp_path / "undisturbed" / "s.zarr")
    out, write = tmp_path / "killed" / "s.zarr", store.write_arrays

    def write_and_die(path, arrays, metadata):
        if "00003" in path.name:
            raise Killed
        return write(path, arrays, metadata)

    monkeypatch.setattr(store, "write_arrays", write_and_die)
    with pytest.raises(Killed):
        fit(listing, out)
    monkeypatch.setattr(store, "write_arrays", write)
    fit(listing, out)
    assert contents(out) == contents(tmp_path / "undisturbed" / "s.zarr")


@pytest.mark.parametrize("array", ["means", "variances"])
def test_a_damaged_row_is_found_and_made_anew(listing, tmp_path, monkeypatch, array):
    out = tmp_path / "s.zarr"
    publish = stage._SpatialFit.publish
    monkeypatch.setattr(stage._SpatialFit, "publish", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        fit(listing, out, covariance_type="diag")
    monkeypatch.setattr(stage._SpatialFit, "publish", publish)
    rows = zarr.open_group(next(tmp_path.glob("state-*")) / "spatial.zarr", mode="r+")[array]
    rows[3] = rows[3] + 1
    with pytest.raises(ValueError, match="row of mode 3 is damaged"):
        fit(listing, out, covariance_type="diag")
    fit(listing, out, covariance_type="diag")
    np.testing.assert_allclose(SpatialMixture.open(out).means[3], brute_force(listing)[3][0], atol=3e-6)


@pytest.mark.parametrize("array", ["means", "variances"])
@pytest.mark.parametrize("damage", ["truncated", "longer", "missing"])
def test_a_row_that_is_not_whole_is_an_error_when_loading(listing, tmp_path, array, damage):
    fit(listing, tmp_path / "spatial_gmm.zarr", covariance_type="diag")
    mixture = SpatialMixture.open(tmp_path / "spatial_gmm.zarr")
    row = tmp_path / "spatial_gmm.zarr" / array / "c" / "3" / "0" / "0" / "0"
    content = row.read_bytes()
    row.unlink()  # a hard link to what the state keeps
    if damage != "missing":
        row.write_bytes(content[:100] if damage == "truncated" else content + b"0000")
    with pytest.raises(
        ValueError, match=r"spatial_gmm.zarr' is damaged \(row 3 .*\); delete it and run spatial_gmm again"
    ):
        mixture.load_means() if array == "means" else mixture.load_variances()


class Threads:
    """Two processes of the stage as two threads: the same calls, the same order of collectives."""

    def __init__(self, rank, barrier, box):
        self.rank, self.world, self.device, self.is_main = rank, len(box), torch.device("cpu"), rank == 0
        self._barrier, self._box = barrier, box

    def barrier(self):
        self._barrier.wait(timeout=30)

    def from_main(self, make):
        if self.is_main:
            self._box[0] = make()
        self.barrier()
        made = self._box[0]
        self.barrier()  # before the main one puts the next thing there
        return made


def test_two_processes_write_what_one_writes(listing, tmp_path):
    fit(listing, tmp_path / "one" / "s.zarr", batch_size=1)
    barrier, box, encoded = threading.Barrier(2), [None, None], [0, 0]

    def count(rank):
        def counting(images):
            encoded[rank] += len(images)
            return encode(images)

        return counting

    def run(rank):
        fit(listing, tmp_path / "two" / "s.zarr", count(rank), Threads(rank, barrier, box), batch_size=1)

    other = threading.Thread(target=run, args=(1,))
    other.start()
    run(0)
    other.join()
    assert sum(encoded) == N
    assert min(encoded) >= N // 3
    assert contents(tmp_path / "two" / "s.zarr") == contents(tmp_path / "one" / "s.zarr")


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any), size=st.integers(1, 9))
def test_a_plan_covers_every_image_once_in_full_batches(counts, size):
    labels = np.repeat(np.arange(len(counts)), counts)[np.random.default_rng(0).permutation(sum(counts))]
    plan = ImagesByMode.make(labels, len(counts), size)
    assert [k for group in plan.groups for k in group] == list(range(len(counts)))
    batches = [plan.batches(group, set()) for group in plan.groups]
    assert [i for group in batches for batch in group for i in batch] == list(range(len(labels)))
    for group in batches:
        assert all(len(batch) == size for batch in group[:-1])
    for batch in (batch for group in batches for batch in group):
        assert plan.modes(batch) == np.unique(labels[plan.order[batch.start : batch.stop]]).tolist()
    for k in range(len(counts)):
        own = plan.order[plan.offsets[k] : plan.offsets[k + 1]]
        np.testing.assert_array_equal(own, np.flatnonzero(labels == k))
    # What is left after a restart is a choice of the same batches.
    done = set(range(0, len(counts), 2))
    assert all(batch in batches[g] for g, group in enumerate(plan.groups) for batch in plan.batches(group, done))


def test_dealing_is_balanced_and_complete():
    sizes = [900, 10, 500, 400, 20, 470]
    hands = deal(sizes, 2)
    assert sorted(hands[0] + hands[1]) == list(range(6))
    assert max(sum(sizes[i] for i in hand) for hand in hands) <= 4 / 3 * sum(sizes) / 2
    assert deal([5], 3) == [[0], [], []]


def test_modes_are_dealt_by_their_counts_at_full_size():
    """ImageNet's numbers with sizes falling as 1 / sqrt(rank): no process has 1 % more images than the mean."""
    generator, k, n, world = np.random.default_rng(0), 8192, 1_281_167, 8
    shares = 1 / np.sqrt(np.arange(1, k + 1))
    counts = generator.multinomial(n, generator.permutation(shares / shares.sum()))
    plan = ImagesByMode.make(np.repeat(np.arange(k), counts), k, 256)
    sizes = [sum(map(len, plan.batches(group, set()))) for group in plan.groups]
    hands = deal(sizes, world)
    loads = [sum(sizes[g] for g in hand) for hand in hands]
    assert sum(loads) == n
    assert max(loads) < 1.01 * n / world
    modes = [sum(len(plan.groups[g]) for g in hand) for hand in hands]
    assert max(modes) > 1.02 * min(modes)  # dealt by images, not by modes
    # What a restart finds done weighs nothing.
    done = {k for g in hands[0] for k in plan.groups[g]}
    left = [sum(map(len, plan.batches(group, done))) for group in plan.groups]
    assert max(sum(left[g] for g in hand) for hand in deal(left, world)) < 1.01 * sum(left) / world


def test_latents_that_are_not_finite_are_refused(listing, tmp_path):
    with pytest.raises(ValueError, match="latents of images in mode 0 are not finite"):
        fit(listing, tmp_path / "s.zarr", lambda images: encode(images) / 0)


def test_an_assignment_of_other_images_is_refused(listing, tmp_path):
    with pytest.raises(ValueError, match="29 images in modes 0 to 5, the listing 30 images"):
        fit(listing, tmp_path / "s.zarr", labels=LABELS[:-1])
    with pytest.raises(ValueError, match="modes 0 to 6"):
        fit(listing, tmp_path / "s.zarr", labels=np.append(LABELS[:-1], 6))


def test_an_unfinished_store_is_refused(listing, tmp_path):
    fit(listing, tmp_path / "s.zarr")
    group = zarr.open_group(tmp_path / "s.zarr", mode="r+")
    del group.attrs["digest"]
    with pytest.raises(ValueError, match="is incomplete; delete it and run spatial_gmm again"):
        SpatialMixture.open(tmp_path / "s.zarr")
    shutil.rmtree(tmp_path / "s.zarr" / "weights")
    with pytest.raises(ValueError, match="is not a spatial mixture"):
        SpatialMixture.open(tmp_path / "s.zarr")
    with pytest.raises(FileNotFoundError, match="run spatial_gmm"):
        SpatialMixture.open(tmp_path / "none.zarr")
    fit(listing, tmp_path / "diag" / "s.zarr", covariance_type="diag")
    shutil.rmtree(tmp_path / "diag" / "s.zarr" / "variances" / "c" / "3")
    with pytest.raises(ValueError, match="is incomplete; delete it and run spatial_gmm again"):
        SpatialMixture.open(tmp_path / "diag" / "s.zarr")


def test_a_mean_of_zeros_is_stored(listing, tmp_path):
    """zarr leaves out chunks of its fill value, unless told otherwise at every opening."""
    fit(listing, tmp_path / "s.zarr", encode=lambda images: torch.zeros(len(images), 3, 4, 4))
    assert not SpatialMixture.open(tmp_path / "s.zarr").means[:].any()


# The command


def arguments(pipeline: Pipeline, out, assignment, covariance_type="spherical"):
    values = {
        "image": SECTIONS["image"],
        "encoder": SECTIONS["encoder"],
        "latents": SECTIONS["latents"],
        "spatial_gmm": {"batch_size": 16, "workers": 0, "covariance_type": covariance_type},
    }
    return [
        "--settings", json.dumps(values), "--listing", str(pipeline.listing), "--encoder-weights",
        str(pipeline.encoder), "--stats", str(pipeline.stats), "--gmm", str(pipeline.gmm), "--assignment",
        str(assignment), "--out", str(out),
    ]  # fmt: skip


def write_assignment(path, pipeline, **changes):
    labels = np.arange(pipeline.n_images, dtype=np.int32) % 4
    about = {"gmm_digest": store.map_arrays(pipeline.gmm)[1]["digest"]}
    about["listing_digest"] = data.Listing.open(pipeline.listing).digest
    store.write_arrays(path, {"labels": labels, "counts": np.bincount(labels)}, {**about, **changes})
    return path


def test_the_command_makes_the_mixture_of_the_encoders_latents(tiny_pipeline, tmp_path, capsys):
    assignment = write_assignment(tmp_path / "assignment.safetensors", tiny_pipeline)
    assert spatial_gmm.main(arguments(tiny_pipeline, tmp_path / "spatial_gmm.zarr", assignment)) == 0
    made, plain = (SpatialMixture.open(path) for path in (tmp_path / "spatial_gmm.zarr", tiny_pipeline.spatial_gmm))
    # The fixture's mixture is of the images alone: adding flips makes the mean symmetric and keeps its symmetric part.
    np.testing.assert_allclose(made.means[:], (plain.means[:] + plain.means[:][..., ::-1]) / 2, atol=1e-4)
    assert made.attributes["gmm_digest"] == store.map_arrays(tiny_pipeline.gmm)[1]["digest"]
    assert "4 modes (0 empty) from 40 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gmm_digest": "other"}, "was made from another mixture than"),
        ({"listing_digest": "other"}, "was made from another listing than"),
    ],
)
def test_the_command_refuses_what_does_not_belong_together(tiny_pipeline, tmp_path, changes, message):
    assignment = write_assignment(tmp_path / "assignment.safetensors", tiny_pipeline, **changes)
    with pytest.raises(ValueError, match=message):
        spatial_gmm.main(arguments(tiny_pipeline, tmp_path / "spatial_gmm.zarr", assignment))


def test_the_command_refuses_statistics_of_another_encoder(tiny_pipeline, tmp_path):
    assignment = write_assignment(tmp_path / "assignment.safetensors", tiny_pipeline)
    shutil.copy(tiny_pipeline.stats, tmp_path / "stats.pt")
    about = store.read_json(tiny_pipeline.stats.with_suffix(".json"))
    store.write_json(tmp_path / "stats.json", {**about, "encoder_digest": "other"})
    given = arguments(tiny_pipeline, tmp_path / "spatial_gmm.zarr", assignment)
    given[given.index("--stats") + 1] = str(tmp_path / "stats.pt")
    with pytest.raises(ValueError, match=r"stats\.pt was made from another encoder than"):
        spatial_gmm.main(given)


def test_training_and_sampling_draw_from_a_diag_mixture(tiny_pipeline, tmp_path):
    assignment = write_assignment(tmp_path / "assignment.safetensors", tiny_pipeline)
    path = tmp_path / "spatial_gmm.zarr"
    assert spatial_gmm.main(arguments(tiny_pipeline, path, assignment, "diag")) == 0
    files = replace(tiny_pipeline, spatial_gmm=path)
    given = ["--setting", "mode", "--settings", json_of(config.STAGES["train"].sections, train={"epochs": 1})]
    assert main(["train", *given, "--out-dir", str(tmp_path), *files.train_arguments]) == 0
    sample = {**SECTIONS["sample"], "n_images": 6, "time_points": 2, "shard_size": 3, "batch_size": 3}
    values = json.dumps({"image": SECTIONS["image"], "encoder": SECTIONS["encoder"], "sample": sample})
    given = ["--settings", values, "--ema", str(tmp_path / "ema.safetensors"), "--encoder-weights", str(files.encoder)]
    given += ["--stats", str(files.stats), "--decoder", str(files.decoder), "--spatial-gmm"]
    assert main(["sample", *given, str(path), "--out-dir", str(tmp_path / "samples")]) == 0
    with pytest.raises(ValueError, match="was trained with another spatial mixture than"):
        sample_command.main([*given, str(tiny_pipeline.spatial_gmm), "--out-dir", str(tmp_path / "other")])


def test_the_costs_of_coupling_are_means_over_all_pairs():
    """Of sources and data of a few points each; in a mode both have the same mean, and one mode has no data."""
    generator = np.random.default_rng(0)
    means, weights, counts = generator.normal(size=(3, 2, 3, 3)), np.array([0.5, 0.3, 0.2]), np.array([6, 0, 2])
    noise = [generator.normal(size=(2, n, 2, 3, 3)) for n in (5, 4, 3)]
    sources, data = (
        [mean + part[i] - part[i].mean(0) for mean, part in zip(means, noise, strict=True)] for i in (0, 1)
    )
    cost = CouplingCost(weights, counts)
    for k in range(3):
        cost.add(k, means[k].astype(np.float32), sources[k].var(0).mean(), data[k].var(0).mean())

    def distance(k, m):
        return np.square(sources[k][:, None] - data[m]).mean()

    shares, found = counts / 8, cost.result()
    independent = sum(weights[k] * shares[m] * distance(k, m) for k in range(3) for m in range(3))
    assert found["mixture_independent"] == pytest.approx(independent, rel=1e-5)
    assert found["mode_coupled"] == pytest.approx(sum(shares[k] * distance(k, k) for k in range(3)), rel=1e-5)
    second_moment = sum(shares[k] * np.square(data[k]).mean() for k in range(3))
    assert found["gaussian"] == pytest.approx(1 + second_moment, rel=1e-5), "noise of variance 1 that knows nothing"
