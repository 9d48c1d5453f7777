"""The Python API on a tiny results folder, laid out as the workflow lays it out."""

import doctest
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

import mmfm
from mmfm import api, config, data
from mmfm.data import tokens
from mmfm.evaluation.detector import load_detector
from mmfm.evaluation.frechet import frechet_distance
from mmfm.flow.path import interpolate
from mmfm.generation import batches
from mmfm.generation.between import slerp
from mmfm.generation.options import numbers
from mmfm.infra import npz, store
from mmfm.mixture.gaussian import Mixture
from mmfm.stages.sample import belonging
from mmfm.workflow import last_run, missing
from mmfm.workflow.exporting import export
from support.places import DEFAULTS, DETECTOR, ROOT
from support.sample_runs import run, write_ema
from support.tiny import CHANNELS, MODES, SIZE, Pipeline

LOOSE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def build(root: Path, files: Pipeline, setting: str) -> tuple[Path, np.ndarray]:
    """Lay out what the workflow would leave of one target; return the result's file and the sampled images."""
    results, k = root / "results", ".k4" if config.SETTINGS[setting].mixture else ""
    for source, place in {
        files.decoder: "decoder/dinov2/decoder.safetensors", files.stats: "latent_stats/dinov2/stats.pt",
        files.gmm: "gmm/dinov2/k4/gmm.safetensors", files.listing: "list_images/listing.train.safetensors",
    }.items():  # fmt: skip
        (results / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, results / place)
    shutil.copytree(files.spatial_gmm, results / "spatial_gmm/dinov2/k4/spatial_gmm.zarr", dirs_exist_ok=True)
    encoder = {"family": "dinov2", "weights": str(files.encoder), "input_size": SIZE}
    recorded = {
        "encoder": encoder, "settings": {"encoder": encoder, "image": {"size": SIZE}},
        "listing_digest": data.Listing.open(files.listing).digest,
        **({"gmm_digest": Mixture.load(files.gmm).metadata["digest"]} if k else {}),
    }  # fmt: skip
    folder = results / f"train/dinov2_{setting}/seed3.tiny{k}"
    folder.mkdir(parents=True)
    ema = write_ema(folder / "ema.safetensors", files, setting, recorded=recorded)
    images, about = run(files, ema, results / f"sample/dinov2_{setting}/seed3.tiny{k}.t4")
    (results / "fid").mkdir(exist_ok=True)
    target = results / f"fid/dinov2_{setting}.txt"
    target.write_text("Frechet distance: 1\n")
    store.write_json(target.with_suffix(".json"), {"samples": about})
    changes = ["sample.time_points=3", "sample.batch_size=4", "sample.shard_size=5", f"fid.weights={DETECTOR}"]
    settings = config.load([ROOT / "config" / "config.yaml"], changes)
    last_run.save(settings, results, ["train"])
    return target, images


def add_tokens(results: Path, files: Pipeline) -> None:
    """Write tokens and modes of the training images."""
    listing = data.Listing.open(files.listing)
    labels = np.arange(len(listing), dtype=np.int32) % MODES
    path = results / "cls_tokens/dinov2/cls_tokens.zarr"
    array = tokens.create(path, len(listing), CHANNELS, 40, listing.labels)
    array[:] = np.random.default_rng(0).normal(size=array.shape).astype(np.float32)
    tokens.finish(path, {"digest": "t", "listing_digest": listing.digest})
    store.write_arrays(results / "gmm/dinov2/k4/assignment.safetensors", {"labels": labels}, {})


@pytest.fixture(scope="module")
def root(tiny_pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    for setting in ("mode", "uncond", "class_gmm"):
        build(root, tiny_pipeline, setting)
    add_tokens(root / "results", tiny_pipeline)
    return root


@pytest.fixture(scope="module")
def sampled(root: Path) -> torch.Tensor:
    images = npz.map_array(root / "results/sample/dinov2_mode/seed3.tiny.k4.t4/images.npz")
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def model(root: Path) -> mmfm.Model:
    return mmfm.open(root / "results/fid/dinov2_mode.txt", "cpu")


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    """At most one level on at most 0.1 % of the pixels."""
    difference = (a.int() - b.int()).abs()
    assert a.shape == b.shape and difference.max() <= 1 and (difference > 0).float().mean() <= 1e-3


def test_import_is_light():
    code = "import mmfm, sys; assert not {'torch', 'numpy'} & set(sys.modules); print(len(mmfm.__all__), dir(mmfm))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout.split()[0]) <= 10 and "'open'" in result.stdout
    assert mmfm.__all__ == api.__all__ and (Path(mmfm.__file__).parent / "py.typed").is_file()
    assert all(getattr(mmfm, name) is getattr(api, name) for name in mmfm.__all__)
    with pytest.raises(AttributeError, match="mmfm' has no attribute 'opne'"):
        _ = mmfm.opne


def test_images_are_those_of_sample(model, sampled):
    """All of them in the sampling's batches, bit for bit; others to rounding."""
    assert torch.equal(model.generate(22).tensor, sampled)
    assert_close(model.generate(5, first=7).tensor, sampled[7:12])
    assert_close(model.generate(22, batch_size=22).tensor, sampled)


@pytest.mark.parametrize("solver", ["euler", "heun", "dopri5"])
def test_the_bar_ends_at_the_number_of_images(model, monkeypatch, solver):
    ends = []

    class Bar(batches.tqdm):
        def __exit__(self, *exception):
            ends.append((self.n, self.total, str(self)))
            return super().__exit__(*exception)

        def update(self, n=1):
            super().update(n)
            assert self.n <= self.total

    monkeypatch.setattr(batches, "tqdm", Bar)
    model.generate(7, solver=solver, time_points=8)  # two batches
    ((n, total, shown),) = ends
    assert n == total and "100%" in shown and "| 7/7 images [" in shown


@pytest.mark.parametrize("place", ["sample/dinov2_{}/seed3.tiny{}.t4", "train/dinov2_{}/seed3.tiny{}"])
@pytest.mark.parametrize("setting", ["mode", "uncond", "class_gmm"])
def test_folders_open(root, setting, place):
    """A sampling's images are its own; weights are sampled as the configuration says."""
    k = "" if setting == "uncond" else ".k4"
    model = mmfm.open(root / "results" / place.format(setting, k), "cpu")
    images = npz.map_array(root / f"results/sample/dinov2_{setting}/seed3.tiny{k}.t4/images.npz")
    made = model.generate(22, time_points=4)
    assert_close(made.tensor.permute(0, 2, 3, 1), torch.from_numpy(np.array(images)))
    assert len(model.trajectory(1).times) == (4 if "sample" in place else 3)
    assert (made.modes is None) == (setting == "uncond")


def test_the_weights_of_a_step_open(root, tmp_path):
    """The folder of a milestone beside that of its training, and a result of such weights."""
    results = tmp_path / "results"
    shutil.copytree(root / "results", results)
    folder = results / "train/dinov2_mode/seed3.tiny.k4"
    folder.rename(folder.with_name("seed3.tiny.k4.step5"))
    made = [
        mmfm.open(results / place, "cpu").generate(3, time_points=4).tensor
        for place in ("train/dinov2_mode/seed3.tiny.k4.step5", "fid/dinov2_mode.txt")
    ]
    assert torch.equal(*made)
    shutil.rmtree(folder.with_name("seed3.tiny.k4.step5"))
    sampled = results / "sample/dinov2_mode/seed3.tiny.k4.step5.t4"
    (results / "sample/dinov2_mode/seed3.tiny.k4.t4").rename(sampled)
    with pytest.raises(FileNotFoundError, match=r"snakemake results/train/dinov2_mode/seed3.tiny.k4.step5/ema.safe"):
        mmfm.open(sampled)


@pytest.mark.parametrize(
    ("setting", "keys", "arguments"),
    [
        ("mode", {"solver": "heun", "time_points": 3, "mode_draw": "stratified"}, ()),
        ("mode", {"solver": "dopri5", "rtol": 1e-2, "atol": 1e-2}, ()),
        ("class_gmm", {"guidance": 2.0, "label_draw": "random"}, ("--seed", "8")),
    ],
)
def test_settings_are_those_of_sample(root, tiny_pipeline, tmp_path, setting, keys, arguments):
    """Other solvers, grids, draws, guidance and seeds than the target's give what the command gives, bit for bit."""
    model = mmfm.open(root / f"results/fid/dinov2_{setting}.txt", "cpu")
    ema = root / f"results/train/dinov2_{setting}/seed3.tiny.k4/ema.safetensors"
    changes = {k: v if k != "guidance" else {"scale": v, "interval": [0.0, 1.0]} for k, v in keys.items()}
    images, _ = run(tiny_pipeline, ema, tmp_path, *arguments, **changes)
    made = model.generate(22, seed=8 if arguments else None, **keys)
    assert np.array_equal(made.tensor.permute(0, 2, 3, 1), images)


def test_autoguidance(root, tiny_pipeline, sampled):
    """A target with a guide finds it, by the digest, and generates with it."""
    results = root / "results"
    guide = results / "train/dinov2_mode/seed3.small.k4.guide/ema.safetensors"
    write_ema(guide, tiny_pipeline, "mode", draw=9)
    call = (tiny_pipeline, results / "train/dinov2_mode/seed3.tiny.k4/ema.safetensors")
    folder, guidance = results / "sample/dinov2_mode_ag/seed3.tiny.k4.t4.g1.5", {"scale": 1.5, "interval": [0.0, 0.9]}
    images, about = run(*call, folder, "--guide", str(guide), guidance=guidance)
    store.write_json(results / "fid/dinov2_mode_ag.json", {"samples": about})
    for target in (folder, results / "fid/dinov2_mode_ag.json"):
        model = mmfm.open(target, "cpu")
        assert np.array_equal(model.generate(22).tensor.permute(0, 2, 3, 1), images)
        assert_close(model.generate(22, guidance=1.0).tensor, sampled)


def test_given_modes_and_labels(root, model):
    images = model.generate(3, modes=[2, 0, 2])
    assert images.modes.tolist() == [2, 0, 2]
    assert torch.equal(model.generate(3, modes=torch.tensor(2)).tensor[::2], images.tensor[::2])
    drawn = model.generate(3)
    assert torch.equal(model.generate(3, modes=drawn.modes).tensor, drawn.tensor)
    classes = mmfm.open(root / "results/fid/dinov2_class_gmm.txt", "cpu")
    assert not torch.equal(classes.generate(2, labels=0).tensor, classes.generate(2, labels=2).tensor)


@pytest.mark.parametrize(
    ("setting", "asked", "message"),
    [
        ("mode", {"modes": 4}, r"modes must be from 0 to 3, got 4"),
        ("mode", {"modes": [0, 1, 2]}, r"modes are \(3,\) torch.int64; give an integer, or 2 of them"),
        ("mode", {"labels": 0}, "this setting has no labels"),
        ("uncond", {"modes": 0}, "this setting has no modes"),
        ("class_gmm", {"labels": [0, 3]}, "labels must be from 0 to 2"),
        ("mode", {"guidance": 2.0}, "trained with label dropout.*set it to 1, or open a target with autoguidance"),
        ("mode", {"solver": "eulre"}, r"did you mean 'euler'\?"),
        ("mode", {"time_points": 0}, "'sample.time_points' is 0; it must be at least 1"),
        (
            "mode",
            {"steps": 3},
            r"no argument 'steps' \(did you mean 'time_points'\?\); the sampling options are guidance, .*time_points",
        ),
        ("mode", {"time_point": 3}, r"there is no argument 'time_point' \(did you mean 'time_points'\?\)"),
        ("mode", {"first": "4"}, "2 images from number '4' are wanted; give whole numbers"),
    ],
)
def test_what_can_not_be_asked(root, setting, asked, message):
    model = mmfm.open(root / f"results/fid/dinov2_{setting}.txt", "cpu")
    with pytest.raises(ValueError, match=message):
        model.generate(2, **asked)
    for generate in (model.generate, model.interpolate):
        with pytest.raises(ValueError, match="no images"):
            generate(0)
        assert len(numbers(np.uint8(100), np.uint8(200))) == 100
        for n in ("4", 4.0, None):
            with pytest.raises(ValueError, match=f"{n!r} images .* give whole numbers"):
                generate(n)


def test_a_device_that_is_not_there(root, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        ValueError, match=r"can't use the device 'cuda': it is a build for the CPU.* give the device 'cpu'"
    ):
        mmfm.open(root / "results/fid/dinov2_mode.txt", "cuda")
    with pytest.raises(ValueError, match="'gpu' is not a device that this runs on; give 'cpu', 'cuda'"):
        mmfm.open(root / "results/fid/dinov2_mode.txt", "gpu")
    with pytest.raises(ValueError, match="'meta' is not a device that this runs on"):
        mmfm.open(root / "results/fid/dinov2_mode.txt", torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="there is no device 'cuda:2': PyTorch sees 2 GPUs"):
        mmfm.open(root / "results/fid/dinov2_mode.txt", "cuda:2")


def test_encode_takes_what_people_have(model, tiny_pipeline):
    """PIL images, tensors of bytes and of floats, one or several: as the stages encode the files."""
    listing = data.Listing.open(tiny_pipeline.listing)
    files = [data.read_image(listing.path(i)) for i in range(3)]
    stacked = next(data.image_batches(tiny_pipeline.listing, SIZE, [range(3)]))[1]
    latents, token = model.encode(files)
    assert latents.shape == (3, *model.latent_shape) and token.shape == (3, CHANNELS)
    for same in (stacked, stacked.float() / 255, mmfm.Images(stacked)):
        assert torch.equal(model.encode(same).latent, latents)
    torch.testing.assert_close(model.encode(files[1]).latent, latents[1:2])
    assert model.encode(torch.stack([torch.zeros(3, SIZE, SIZE), torch.ones(3, SIZE, SIZE)])).latent.isfinite().all()
    large = Image.new("L", (70, 50), 128)
    assert torch.equal(model.encode(large).latent, model.encode(torch.full((3, SIZE, SIZE), 128).byte()).latent)
    torch.testing.assert_close(model.mixture.posterior(token).sum(1), torch.ones(3))
    floats = stacked.float()
    for wrong in ("a.png", Path("a.png"), ["a.png", "b.png"], stacked.numpy()):
        with pytest.raises(ValueError, match=r"of type (str|PosixPath|ndarray); give PIL images \(`PIL.Image.open"):
            model.encode(wrong)
    for wrong in (stacked[:, :1], stacked[..., 1:], stacked.int(), floats, floats / 100, floats / 255 - 0.1, []):
        with pytest.raises(ValueError, match=r"images|pixels"):
            model.encode(wrong)


def test_decode(model, sampled):
    path = model.trajectory(4)
    assert torch.equal(model.decode(path.states[-1]).tensor, sampled[:4])
    assert_close(model.decode(path.states[-1, 1]).tensor, sampled[1:2])
    with pytest.raises(ValueError, match=r"latents are \(1, 4, 4, 4\); this model's are \(n, 32, 4, 4\)"):
        model.decode(path.states[-1, :, 0])
    with pytest.raises(ValueError, match="NaN"):
        model.decode(path.states[0] * torch.nan)


def test_images_are_a_sequence(sampled):
    images = mmfm.Images(sampled, torch.arange(22))
    assert len(images) == 22 and images[3:5].modes.tolist() == [3, 4] and repr(images[:2]).startswith("<2 images of 32")
    assert np.array_equal(np.asarray(images[-1]), sampled[-1].permute(1, 2, 0).numpy())
    assert len(list(images)) == 22 and images._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("ends", [{"modes": (0, 3)}, {"seeds": (5, 6)}, {"seeds": (5, 6), "modes": (1, 1)}])
def test_interpolation_ends_are_the_images(model, ends):
    walk = model.interpolate(5, **ends, number=2).tensor
    for place, index in ((0, 0), (-1, 1)):
        asked = {name: values[index] for name, values in ends.items()}
        seed, modes = asked.get("seeds"), asked.get("modes")
        assert_close(walk[place][None], model.generate(1, seed=seed, modes=modes, first=2).tensor)
    steps = (walk[1:].float() - walk[:-1].float()).abs().mean((1, 2, 3))
    assert (steps > 0).all() and steps.max() < 3 * steps.min() + 3


def test_interpolation_between_classes_and_without_modes(root):
    classes = mmfm.open(root / "results/fid/dinov2_class_gmm.txt", "cpu")
    walk = classes.interpolate(3, labels=(0, 2))
    assert_close(walk.tensor[2:], classes.generate(1, labels=2).tensor)
    gaussian = mmfm.open(root / "results/fid/dinov2_uncond.txt", "cpu")
    assert_close(gaussian.interpolate(2, seeds=(1, 2)).tensor[1:], gaussian.generate(1, seed=2).tensor)


def test_slerp_stays_on_the_sphere():
    start, end = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    end *= start.norm() / end.norm()
    path = slerp(start, end, torch.linspace(0, 1, 5))
    assert torch.equal(path[0], start) and torch.equal(path[-1], end)
    torch.testing.assert_close(path.flatten(1).norm(dim=1), start.norm().expand(5))


def test_slerp_between_equal_and_opposite_ends_is_straight():
    """Also where rounding takes their cosine beyond 1."""
    for seed in range(20):
        start = torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(slerp(start, start, torch.tensor([0.3]))[0], start)
        torch.testing.assert_close(slerp(start, -start, torch.tensor([0.25]))[0], start / 2)


def test_trajectory(model):
    path = model.trajectory(3, time_points=6)
    assert path.states.shape == (6, 3, *model.latent_shape) and path.times[0] == 1
    assert torch.equal(model.decode(path.states[-1]).tensor, model.generate(3, time_points=6).tensor)
    assert (path.straightness() > 0).all() and path.deviation()[[0, -1]].abs().max() < 1e-6
    with pytest.raises(ValueError, match="time_points is 1"):
        model.trajectory(1, time_points=1)


def test_straightness_of_known_paths():
    """A straight one at constant speed has 0, a detour of half the chord at the middle a mean of a quarter."""
    times = torch.tensor([1.0, 0.5, 0.0])
    start, end = torch.ones(1, 1, 2, 1), torch.tensor([[[[3.0], [1.0]]]])
    middle = interpolate(end, start, torch.tensor([0.5]))
    straight = mmfm.Trajectory(times, torch.stack([start, middle, end]))
    bent = mmfm.Trajectory(times, torch.stack([start, middle + torch.tensor([[[[0.0], [1.0]]]]), end]))
    assert (straight.straightness().item(), bent.straightness().item()) == (0, 0.25)


def test_distance(model, sampled):
    detector = load_detector("fashion", DETECTOR)
    features = [detector.features(part).double() for part in (sampled[:12], sampled[12:])]
    expected = frechet_distance(*(value for f in features for value in (f.mean(0), f.T.cov())))
    made = mmfm.distance(sampled[:12], list(mmfm.Images(sampled[12:])), model.detector, batch_size=5)
    assert made == pytest.approx(expected, rel=1e-3)  # batches round differently
    assert mmfm.distance(sampled, sampled, detector) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="needed for this variance"):
        mmfm.distance(sampled, sampled[:1], detector)


def test_distance_to_the_real_images(root, tiny_pipeline, tmp_path):
    """That of `fid` with the same reference; a reference of other images is refused."""
    copy = shutil.copytree(root / "results", tmp_path / "results")
    model = mmfm.open(copy / "fid/dinov2_mode.txt", "cpu")
    real = next(data.image_batches(tiny_pipeline.listing, SIZE, [range(40)]))[1]
    features = model.detector.features(real).double().numpy()
    about = {"detector": "fashion", "detector_digest": model.detector.digest, "image_size": SIZE, "n_images": 40}
    moments = {"mu": features.mean(0), "sigma": np.cov(features.T)}
    path = copy / "fid_reference/reference.safetensors"
    path.parent.mkdir()
    for digest in (model._sampler.weights["listing_digest"], "another"):
        store.write_arrays(path, moments, {**about, "listing_digest": digest})
        if digest == "another":
            with pytest.raises(ValueError, match="of another listing"):
                _ = mmfm.open(copy / "fid/dinov2_mode.txt", "cpu").reference
        else:
            images = model.generate(8)
            apart = mmfm.distance(images, real, model.detector)
            assert mmfm.distance(images, model.reference, model.detector) == pytest.approx(apart, rel=1e-6)


def test_nearest_images(model, tiny_pipeline):
    found = model.nearest_images(2, 4)
    listing = data.Listing.open(tiny_pipeline.listing)
    own = {np.asarray(data.read_image(listing.path(i))).tobytes() for i in range(2, len(listing), MODES)}
    assert len(found) == 4 and {np.asarray(image).tobytes() for image in found} <= own
    assert len(model.nearest_images(2, 99)) == 10


def test_missing_files_are_named_with_the_command(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(root / "results", tmp_path / "results")
    target = copy / "fid/dinov2_mode.txt"
    for name, command in {
        "fid/dinov2_mode.json": "snakemake results/fid/dinov2_mode.json --cores all",
        "decoder/dinov2/decoder.safetensors": "snakemake results/decoder/dinov2/decoder.safetensors --cores all",
        "train/dinov2_mode": "snakemake results/fid/dinov2_mode.txt --cores all -R train",
        "spatial_gmm/dinov2/k4": "snakemake results/spatial_gmm/dinov2/k4/spatial_gmm.zarr --cores all",
    }.items():
        (copy / name).rename(tmp_path / "aside")
        with pytest.raises(FileNotFoundError, match=f"{name}.*missing; make it: {command}"):
            mmfm.open(target)
        (tmp_path / "aside").rename(copy / name)
    with pytest.raises(FileNotFoundError, match=r"make it: snakemake results/fid/dinov2_gmm.txt --cores all"):
        mmfm.open("results/fid/dinov2_gmm.txt")
    with pytest.raises(FileNotFoundError, match=r"make it: snakemake results/train/a_mode/b/ema.safetensors --cores"):
        mmfm.open("results/train/a_mode/b")
    with pytest.raises(ValueError, match=r"not a finished target; give one of .*dinov2_mode.txt"):
        mmfm.open(copy)
    with pytest.raises(ValueError, match="Gaussian source"):
        _ = mmfm.open(root / "results/fid/dinov2_uncond.txt").mixture


def test_the_command_for_another_run_asks_for_its_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = (
        "make it: snakemake results/pics/fid/dinov2_mode.txt --cores all --configfile YAML, the file with `run: pics`"
    )
    with pytest.raises(FileNotFoundError, match=f"{re.escape(made)}$"):
        mmfm.open("results/pics/fid/dinov2_mode.txt")


@pytest.mark.parametrize(
    ("path", "made"),
    [
        ("results/comparison.txt", "results/comparison.txt --cores all"),
        ("results/a/b/fid/x_mode.txt", "results/a/b/fid/x_mode.txt --cores all --configfile YAML, .* `run: a/b`"),
        ("results/sample/fid/x_mode.txt", "results/sample/fid/x_mode.txt --cores all"),
        ("results/a b/train/x_mode/seed0", "'results/a b/train/x_mode/seed0/ema.safetensors' .* `run: a b`"),
    ],
)
def test_commands_in_a_folder_that_is_called_like_a_stage(path, made, tmp_path, monkeypatch):
    (tmp_path / "train" / "x").mkdir(parents=True)
    for folder in (tmp_path / "train", tmp_path / "train" / "x"):
        monkeypatch.chdir(folder)
        assert re.match(f"snakemake {made}", missing.snakemake_command(Path(path)))
        assert "ema.safetensors" not in missing.advice(Path("results/nothing"))


def test_a_name_that_is_no_result_comes_without_a_command(tmp_path, monkeypatch):
    """By the configuration of the run, and before there is one by the settings alone."""
    monkeypatch.chdir(tmp_path)
    for first, message in (
        (True, "no 'results/pics/fid/nope.txt'; results are results/pics/fid/ENCODER_SETTING.txt, with a setting of "),
        (False, "no 'results/pics/fid/nope.txt'; 'nope.txt' is not a result.*; there are dinov2_uncond.txt"),
    ):
        with pytest.raises(FileNotFoundError, match=message) as caught:
            mmfm.open("results/pics/fid/nope.txt")
        assert "snakemake" not in str(caught.value)
        if first:
            last_run.save(replace(config.load([DEFAULTS]), run="pics"), "results/pics", ["fid"])
    with pytest.raises(FileNotFoundError, match=r"did you mean 'dinov2_mode.txt'"):
        mmfm.open("results/pics/fid/dinov2_mod.txt")


def test_a_missing_folder_of_neither_weights_nor_samples_comes_without_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("results/nothing", "results/a/b/c", "results"):
        with pytest.raises(FileNotFoundError, match=f"no '{name}'; give results/fid/NAME.txt, or a folder of a"):
            mmfm.open(name)


def test_a_comparison_is_not_a_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"compares several results; open one of them: results/pics/fid/NAME.txt"):
        mmfm.open("results/pics/comparison.txt")
    (tmp_path / "results/pics/fid").mkdir(parents=True)
    for name in ("comparison.txt", "fid/dinov2_gmm.txt", "fid/dinov2_mode.txt"):
        (tmp_path / "results/pics" / name).touch()
    with pytest.raises(ValueError, match=r"of them: results/pics/fid/dinov2_gmm.txt, results/pics/fid/dinov2_mode.txt"):
        mmfm.open("results/pics/comparison.txt")


def test_a_summary_of_seeds_is_not_a_result(tmp_path):
    record = {"stage": "seeds", "results": ["dinov2_mode.seed0", "dinov2_mode.seed1"]}
    summary = tmp_path / "fid/dinov2_mode.seeds2.txt"
    store.write_json(summary.with_suffix(".json"), record)
    summary.touch()
    for target in (summary, summary.with_suffix(".json")):
        with pytest.raises(ValueError, match=r"a summary of several seeds; open .* dinov2_mode.seed0.txt, dinov2_mode"):
            mmfm.open(target)


def test_what_the_published_layout_lacks_is_refused_before_anything_is_written(root, tmp_path):
    copy = shutil.copytree(root / "results", tmp_path / "results")
    group = zarr.open_group(copy / "spatial_gmm/dinov2/k4/spatial_gmm.zarr", mode="r+")
    variances = np.ones(group["means"].shape, np.float32)
    group.create_array("variances", data=variances, chunks=(1, *variances.shape[1:]), overwrite=True)
    with pytest.raises(ValueError, match=r"one variance per mode.*; export it with --layout hub"):
        export(copy / "fid/dinov2_mode.txt", tmp_path / "out", "published", "mit")
    assert list(tmp_path.iterdir()) == [copy]


def test_other_files_than_the_targets_are_refused(root, tmp_path):
    copy = shutil.copytree(root / "results", tmp_path / "results")
    stats = copy / "latent_stats/dinov2/stats.pt"
    content = torch.load(stats, weights_only=True)
    torch.save({name: value + 1 for name, value in content.items()}, stats)
    with pytest.raises(ValueError, match=r"made with another stats .*; make it again: snakemake"):
        mmfm.open(copy / "fid/dinov2_mode.txt")

    shutil.copytree(root / "results", tmp_path / "2")
    labels = np.zeros(40, np.int32)
    store.write_arrays(
        tmp_path / "2/gmm/dinov2/k4/assignment.safetensors", {"labels": labels}, {"gmm_digest": "another"}
    )
    with pytest.raises(ValueError, match="another mixture"):
        mmfm.open(tmp_path / "2/fid/dinov2_mode.txt").nearest_images(0)
    gmm = Mixture.load(root / "results/gmm/dinov2/k4/gmm.safetensors")
    Mixture(gmm.weights, gmm.means + 1, gmm.variances).save(tmp_path / "2/gmm/dinov2/k4/gmm.safetensors", {})
    with pytest.raises(ValueError, match="made with another gmm"):
        _ = mmfm.open(tmp_path / "2/fid/dinov2_mode.txt").mixture


def test_files_belong_together(model):
    """What is found passes the check of the stage."""
    assert set(belonging(model._found.sample_files()).digests) == set(model._found.digests)


@pytest.mark.parametrize("name", ["open", "distance", *(n for n in vars(api.Model) if not n.startswith("_"))])
def test_docstring_examples(root, model, monkeypatch, name):
    monkeypatch.chdir(root)
    documented = vars(api.Model).get(name) or getattr(api, name)
    names = {"mmfm": mmfm, "model": model, "images": model.generate(4, progress=False)}
    test = doctest.DocTestParser().get_doctest(documented.__doc__, names, name, None, 0)
    assert test.examples or name in ("detector", "reference")
    assert doctest.DocTestRunner(optionflags=LOOSE).run(test).failed == 0


def test_guide_runs(root, monkeypatch):
    """The code of docs/python.md, in its order, on the tiny results."""
    monkeypatch.chdir(root)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(code) > 5
    exec("\n".join(code), {})
