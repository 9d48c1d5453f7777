"""Sampling: images depend on their numbers alone, survive kills, and refuse inputs that do not belong together."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file

from mmfm import config
from mmfm.autoencoder.decoder import Decoder, DecoderConfig, save_decoder
from mmfm.cli.__main__ import main
from mmfm.flow.path import time_grid, time_shift
from mmfm.generation import networks
from mmfm.generation.sampler import SampleFiles, Sampler
from mmfm.generation.trajectory import Trajectory
from mmfm.infra import npz, store
from mmfm.infra.progress import Progress
from mmfm.models.dit import DiT
from mmfm.models.weights import load_ema
from support.places import DETECTOR
from support.sample_runs import CLASSES, SAMPLE, arguments, files, run, weights, write_ema  # noqa: F401 (fixtures)
from support.tiny import CHANNELS, GRID, MODES, SECTIONS, SIZE, Pipeline

GUIDED = {"guidance": {"scale": 1.5, "interval": [0.0, 1.0]}}


def distinct(images: np.ndarray) -> int:
    return len({image.tobytes() for image in images})


def assert_equal_to_rounding(a: np.ndarray, b: np.ndarray) -> None:
    """At most one level on at most 0.1 % of the pixels."""
    difference = np.abs(a.astype(int) - b.astype(int))
    assert a.shape == b.shape and difference.max() <= 1 and (difference > 0).mean() <= 1e-3


@pytest.fixture(scope="module")
def made(
    files: Pipeline, weights: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[np.ndarray, dict, Path]:
    out = tmp_path_factory.mktemp("made")
    return *run(files, weights["mode"], out), out


def test_outputs(made, weights):
    images, about, out = made
    assert images.shape == (22, SIZE, SIZE, 3) and images.dtype == np.uint8
    assert np.array_equal(np.load(out / "images.npz")["arr_0"], images), "numpy and other programs read the file"
    assert about["images_digest"] == store.array_digest(images)
    assert distinct(images) == 22 and images.std() > 10
    assert about["weights"]["digest"] == load_ema(weights["mode"])[1]["digest"]
    assert (about["weights"]["step"], about["weights"]["epochs"], about["seed"]) == (7, 1.5, 3)
    assert (about["setting"], about["n_images"], about["function_evaluations"]) == ("mode", 22, 3)
    times = time_grid(4, time_shift((CHANNELS, GRID, GRID)))
    assert (about["first_time"], about["last_time"]) == (times[0].item(), times[-1].item())
    assert set(about["inputs"]) == {"ema", "decoder", "stats", "encoder", "spatial_gmm"}
    assert sorted(p.name for p in out.glob("*.*")) == ["grid.png", "images.npz", "samples.json"]
    assert not list(out.glob("state-*/shard-*"))


def test_image_is_the_flow_of_its_own_noise(made, files, weights):
    """Euler by hand for image 13 alone: noise and mode of number 13, labels, decoder, truncation to uint8."""
    from mmfm.infra import rng

    images, *_ = made
    sampler = load(files, weights["mode"])
    index = torch.tensor([13])
    mode = sampler.source.draw_modes(rng.uniform(3, "sample/mode", index))
    noise = rng.normal(3, "sample/noise", index, (CHANNELS, GRID, GRID))
    x = sampler.source.means[mode] + sampler.source.sigma[mode].view(-1, 1, 1, 1) * noise
    times = sampler.times
    with torch.no_grad():
        for t, after in itertools.pairwise(times):
            x = x + (after - t) * sampler.model(x, t[None], mode)
        pixels = (sampler.autoencoder.decode(x).clamp(0, 1) * 255).to(torch.uint8)
    assert_equal_to_rounding(pixels[0].permute(1, 2, 0).numpy(), images[13])


def test_no_network_sees_more_images_at_once_than_a_batch(files, weights, tmp_path, monkeypatch):
    """Neither for the picture nor for the straightness: a small GPU would run out of memory at the very end."""
    seen = []

    def noting(forward):
        def noted(self, x, *rest):
            seen.append(len(x))
            return forward(self, x, *rest)

        return noted

    for network in (DiT, Decoder):
        monkeypatch.setattr(network, "forward", noting(network.forward))
    run(files, weights["mode"], tmp_path, batch_size=3)
    assert max(seen) == 3


def test_straightness_is_that_of_the_first_paths(made, files, weights, tmp_path):
    """Of 49 steps of Euler, whatever the solver and its grid."""
    sampler = load(files, weights["mode"])
    times = time_grid(50, time_shift((CHANNELS, GRID, GRID)))
    with torch.no_grad():
        drawn = sampler.generator.draw(range(16))
        states = [sampler.source.draw(drawn.modes, drawn.noise)]
        for t, after in itertools.pairwise(times):
            states.append(states[-1] + (after - t) * sampler.model(states[-1], t.expand(16), drawn.labels))
    expected = Trajectory(times, torch.stack(states)).straightness().mean().item()
    assert made[1]["straightness"] == {"deviation": pytest.approx(expected, rel=1e-4), "n_images": 16}
    assert 0.001 < expected < 1
    _, about = run(files, weights["mode"], tmp_path, solver="heun", time_points=2, batch_size=16)
    assert about["straightness"]["deviation"] == pytest.approx(expected, rel=1e-4)


def load(files: Pipeline, ema: Path, seed: int | None = None, scale: float = 1.0, **other: object) -> Sampler:
    guided = {**SAMPLE, "guidance": {"scale": scale, "interval": [0.0, 1.0]}}
    guided |= {name: other.pop(name) for name in SAMPLE if name in other}
    sections = {"image": SECTIONS["image"], "encoder": SECTIONS["encoder"], "sample": guided}
    built = config.StageConfig.build("sample", sections)
    expected = other.pop("expected", None)
    paths = {"spatial_gmm": files.spatial_gmm, "decoder": files.decoder, **other}
    given = SampleFiles(ema, stats=files.stats, encoder_weights=files.encoder, **paths)
    return Sampler(given, built.sample, built.encoder, built.image.size, seed, "cpu", expected)


def test_shards_and_batches_do_not_matter(made, files, weights, tmp_path):
    """Batches that straddle nothing, single images, and a prefix: image i is image i."""
    images, *_ = made
    other, _ = run(files, weights["mode"], tmp_path, shard_size=9, batch_size=1, n_images=14)
    assert_equal_to_rounding(other, images[:14])


def test_seeds_differ(made, files, weights, tmp_path):
    images, *_ = made
    other, about = run(files, weights["mode"], tmp_path, "--seed", "4", n_images=5)
    assert about["seed"] == 4 and distinct(np.concatenate([images, other])) == 27


@pytest.mark.parametrize("setting", ["uncond", "gmm"])
def test_settings_without_labels(setting, made, files, weights, tmp_path):
    images, about = run(files, weights[setting], tmp_path, n_images=5, solver="heun")
    assert about["setting"] == setting and about["function_evaluations"] == 6 and distinct(images) == 5
    assert (about["n_modes"], "spatial_gmm" in about["inputs"]) == (
        (0, False) if setting == "uncond" else (MODES, True)
    )


def test_spatial_flag_may_be_empty(files, weights, tmp_path):
    call = arguments(files, weights["uncond"], tmp_path, n_images=2)
    call.remove(str(files.spatial_gmm))
    assert main(call) == 0
    call[call.index(str(weights["uncond"]))] = str(weights["gmm"])
    assert main(call) == 2


def test_one_time_point_is_the_decoded_source(made, files, weights, tmp_path):
    images, about = run(files, weights["mode"], tmp_path, n_images=5, time_points=1)
    assert about["straightness"] is None and about["function_evaluations"] == 0
    assert about["source_only"] and about["last_time"] == about["first_time"]
    sampler = load(files, weights["mode"])
    decoded = (sampler.autoencoder.decode(sampler.generator.draw_source(range(5))).detach().clamp(0, 1) * 255).byte()
    assert_equal_to_rounding(images, decoded.permute(0, 2, 3, 1).numpy())
    assert np.abs(images.astype(int) - made[0][:5]).mean() > 1, "the flow does something"


def test_guide(made, files, weights, tmp_path):
    images, *_ = made
    call = ("--guide", str(weights["guide"]))
    same, about = run(files, weights["mode"], tmp_path / "1", *call, n_images=5)
    assert about["guidance"]["scale"] == 1
    assert_equal_to_rounding(same, images[:5])
    guided, about = run(files, weights["mode"], tmp_path / "2", *call, n_images=5, **GUIDED)
    assert about["guidance"]["scale"] == 1.5
    assert about["guidance"]["guide"]["digest"] == load_ema(weights["guide"])[1]["digest"] == about["inputs"]["guide"]
    assert np.abs(guided.astype(int) - images[:5]).mean() > 0.1


def test_class_labels_in_equal_numbers(files, weights, tmp_path):
    """Image i of a class setting is the flow under label i, whatever the number of images."""
    images, about = run(files, weights["class"], tmp_path / "all", n_images=7)
    assert (about["label_draw"], about["n_labels"], about["n_modes"], about["mode_draw"]) == ("equal", 3, 0, None)
    sampler = load(files, weights["class"])
    labels = sampler.generator.draw(range(7)).labels
    assert torch.bincount(labels).sort().values.tolist() == [2, 2, 3]
    fewer, _ = run(files, weights["class"], tmp_path / "fewer", n_images=4, batch_size=3)
    assert_equal_to_rounding(fewer, images[:4])
    other, about = run(files, weights["class"], tmp_path / "random", n_images=7, label_draw="random")
    changed = load(files, weights["class"], label_draw="random").generator.draw(range(7)).labels != labels
    same = (np.abs(other.astype(int) - images).reshape(7, -1).max(1) <= 1).tolist()
    assert changed.any() and same == (~changed).tolist() and about["label_draw"] == "random"


def test_classifier_free_guidance(files, weights, tmp_path):
    """Guided images differ, except with an interval in which no time lies."""
    plain, _ = run(files, weights["class_gmm"], tmp_path / "1", n_images=5, mode_draw="stratified")
    scales = {"2": {"scale": 1.5, "interval": [0.0, 1.0]}, "3": {"scale": 9.0, "interval": [0.0, 0.0]}}
    (guided, about), (outside, _) = (
        run(files, weights["class_gmm"], tmp_path / n, n_images=5, mode_draw="stratified", guidance=guidance)
        for n, guidance in scales.items()
    )
    assert about["guidance"] == {"kind": "classifier-free", "scale": 1.5, "interval": [0.0, 1.0], "guide": None}
    assert about["mode_draw"] == "k ~ mixture weights, stratified"
    assert np.abs(guided.astype(int) - plain).mean() > 0.1
    assert_equal_to_rounding(outside, plain)


@pytest.mark.parametrize(("setting", "labels"), [("mode", [1]), ("class", None)])
def test_classifier_free_guidance_needs_labels_and_a_null_label(weights, setting, labels):
    model, guidance = load_ema(weights[setting])[0], config.Guidance(1.5, (0.0, 1.0))
    field = networks.guided(model, None, guidance, "float32", torch.device("cpu"))
    with pytest.raises(ValueError, match="needs labels and a model trained with label dropout"):
        field(None if labels is None else torch.tensor(labels))


def test_an_adaptive_solver_survives_a_kill(files, weights, tmp_path, monkeypatch):
    """Evaluations are counted over all shards, also those made before the restart."""
    keys = {"solver": "bosh3", "rtol": 0.05, "atol": 0.05, "n_images": 12}
    images, about = run(files, weights["gmm"], tmp_path / "whole", **keys)
    assert about["function_evaluations"] > 4 and about["tolerances"] == {"rtol": 0.05, "atol": 0.05}
    with monkeypatch.context() as patch:
        patch.setattr("mmfm.stages.sample.npz.write_parts", write_once_then_fail(npz.write_parts))
        assert main(arguments(files, weights["gmm"], tmp_path / "killed", **keys)) == 2
    again, about_again = run(files, weights["gmm"], tmp_path / "killed", **keys)
    assert np.array_equal(again, images) and about_again == about
    fine, _ = run(files, weights["gmm"], tmp_path / "fine", **{**keys, "rtol": 1e-4, "atol": 1e-4})
    euler, _ = run(files, weights["gmm"], tmp_path / "euler", n_images=12, time_points=200)
    errors = [np.abs(x.astype(int) - euler).mean() for x in (images, fine)]
    assert errors[1] < 1 and errors[1] <= errors[0]


def test_an_adaptive_solver_shows_its_evaluations(files, weights, tmp_path, monkeypatch, capsys):
    """Also within a batch, which may take minutes."""
    monkeypatch.setattr("mmfm.stages.runner.Progress", partial(Progress, every=0))
    run(files, weights["gmm"], tmp_path, n_images=2, solver="bosh3", rtol=0.05, atol=0.05)
    lines = [line for line in capsys.readouterr().err.splitlines() if "0/2 images" in line]
    assert len(lines) > 4 and lines[3].endswith("  4 evaluations of a batch")


def test_reference_precision_rounds_state_and_time(made, files, weights, tmp_path):
    rounded, about = run(files, weights["mode"], tmp_path, n_images=5, precision="reference")
    assert about["precision"] == "reference" and about["function_evaluations"] == 3
    assert 0 < np.abs(rounded.astype(int) - made[0][:5]).mean() < 8
    with pytest.raises(ValueError, match=r"bf16 times, too coarse for dopri5"):
        load(files, weights["mode"], precision="reference", solver="dopri5")


@pytest.mark.parametrize("trained", ["auto", "bf16"])
def test_the_source_has_the_means_that_the_model_was_trained_with(made, files, tmp_path, trained):
    """In memory too: at full size float32 means take 6.4 GB."""
    section = config.build(config.Train, {**SECTIONS["train"], "means_precision": trained})
    recorded = {"settings": {"train": config.keys_of_kind(section, "identity")}}
    ema = write_ema(tmp_path / "ema.safetensors", files, "mode", recorded=recorded)
    images, about = run(files, ema, tmp_path / "out", n_images=5)
    bf16 = trained == "bf16"  # `auto` is float32 on a CPU
    assert made[1]["means_precision"] == "float32" and about["means_precision"] == ("bf16" if bf16 else "float32")
    assert load(files, ema).source.means.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert np.array_equal(images, made[0][:5]) != bf16 and np.abs(images.astype(int) - made[0][:5]).mean() < 2


def test_features_lie_beside_the_images(made, files, weights, tmp_path, monkeypatch):
    """One shard is made without the detector, the others with it; stale features vanish with the images."""
    from mmfm.evaluation.detector import load_detector
    from mmfm.evaluation.features import sampled_features

    with monkeypatch.context() as patch:
        patch.setattr("mmfm.stages.sample.npz.write_parts", write_once_then_fail(npz.write_parts))
        assert main(arguments(files, weights["mode"], tmp_path)) == 2
    call = ("--detector", "fashion", "--detector-weights", str(DETECTOR))
    images, about = run(files, weights["mode"], tmp_path, *call, features=True)
    assert np.array_equal(images, made[0]) and about == made[1]
    detector = load_detector("fashion", DETECTOR)
    expected = detector.features(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)).numpy()
    features = sampled_features(tmp_path / "images.npz", about["images_digest"], detector)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)
    assert sampled_features(tmp_path / "images.npz", "0" * 64, detector) is None
    other = replace(detector, digest="1" * 64)
    assert sampled_features(tmp_path / "images.npz", about["images_digest"], other) is None
    run(files, weights["mode"], tmp_path, *call[:3], str(tmp_path / "absent"), features=True, n_images=3)
    assert not (tmp_path / "features.safetensors").exists()
    assert main(arguments(files, weights["mode"], tmp_path, features=True)) == 2


def test_finished_images_get_the_features_of_the_detector(made, files, weights, tmp_path, monkeypatch, capsys):
    """Without the model, once for every detector; and they stay where none is asked for."""
    from mmfm.evaluation.detector import load_detector
    from mmfm.evaluation.detectors.fashion import FashionDetector
    from mmfm.evaluation.features import sampled_features

    other = tmp_path / "other.safetensors"
    save_file(FashionDetector().state_dict(), other)
    out = tmp_path / "out"
    run(files, weights["mode"], out)
    inode = (out / "images.npz").stat().st_ino
    monkeypatch.setattr(Sampler, "generate", None)
    for path, computed in ((DETECTOR, True), (DETECTOR, False), (other, True), (None, False)):
        call = () if path is None else ("--detector", "fashion", "--detector-weights", str(path))
        for output in out.glob("*.*"):
            output.unlink()  # as Snakemake does
        capsys.readouterr()
        images, about = run(files, weights["mode"], out, *call, features=path is not None)
        assert ("22 features done" in capsys.readouterr().err) == computed
        assert np.array_equal(images, made[0]) and about == made[1] and (out / "images.npz").stat().st_ino == inode
        detector = load_detector("fashion", path or other)
        expected = detector.features(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)).numpy()
        features = sampled_features(out / "images.npz", about["images_digest"], detector)
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)
        assert sorted(p.name for p in out.glob("state-*/*")) == ["about.json", "finished", "lock"]


@pytest.mark.parametrize("draw", ["multinomial", "stratified"])
def test_no_image_twice_after_kills_between_shards(files, weights, tmp_path, monkeypatch, draw):
    """Stopped after every single shard: the digests of all images are those of an undisturbed run, none twice."""
    keys = {"n_images": 14, "mode_draw": draw}
    undisturbed, _ = run(files, weights["class_gmm"], tmp_path / "whole", **keys)
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("mmfm.stages.sample.npz.write_parts", write_once_then_fail(npz.write_parts))
            assert main(arguments(files, weights["class_gmm"], tmp_path / "killed", **keys)) == 2
    assert len(list(tmp_path.glob("killed/state-*/shard-*.npz"))) == 2
    images, _ = run(files, weights["class_gmm"], tmp_path / "killed", **keys)
    digests = [store.array_digest(image) for image in images]
    assert digests == [store.array_digest(image) for image in undisturbed] and len(set(digests)) == 14


def test_the_time_is_that_of_all_images_at_the_rate_of_the_last_run(files, weights, tmp_path, monkeypatch):
    """A batch takes a second: whether the run was killed before changes nothing, and an image made before is free."""
    clock = SimpleNamespace(monotonic=itertools.count().__next__)
    monkeypatch.setattr("mmfm.stages.sample.time", clock)
    keys = {"n_images": 20, "shard_size": 10, "batch_size": 5}

    def seconds(out: Path, n_images: int) -> float:
        run(files, weights["mode"], tmp_path / out, **{**keys, "n_images": n_images})
        return store.read_json(tmp_path / out / "samples.json")["seconds"]

    assert seconds("whole", 20) == 4
    with monkeypatch.context() as patch:
        patch.setattr("mmfm.stages.sample.npz.write_parts", write_once_then_fail(npz.write_parts))
        assert main(arguments(files, weights["mode"], tmp_path / "killed", **keys)) == 2
    assert seconds("killed", 20) == seconds("killed", 20) == 4
    assert seconds("killed", 10) is None


def test_grid_shows_images_and_their_sources(made, files, weights):
    images, _, out = made
    grid = np.asarray(Image.open(out / "grid.png").convert("RGB"))
    side = 2 * SIZE  # pixels of tiny images are repeated until they can be seen

    def occurs(image: np.ndarray) -> np.ndarray:
        tile = image.repeat(2, axis=0).repeat(2, axis=1)
        corners = np.argwhere((grid[: -side + 1, : -side + 1] == tile[0, 0]).all(-1))
        return np.array([c for c in corners if np.array_equal(grid[c[0] : c[0] + side, c[1] : c[1] + side], tile)])

    sources = load(files, weights["mode"]).generator.source_images(range(22)).permute(0, 2, 3, 1).numpy()
    for i in (0, 7, 21):
        (row, left), (source_row, right) = occurs(images[i])[0], occurs(sources[i])[0]
        assert row == source_row and right > left + 4 * side


def test_damaged_shards_are_made_again(made, files, weights, tmp_path):
    """A kill -9 leaves whole shards; truncated, empty and altered ones are seen and remade, the others kept."""
    out = tmp_path / "out"
    killed = killed_after_first_shard(files, weights["mode"], out)
    state = next(out.glob("state-*"))
    kept = sorted(state.glob("shard-*.npz"))
    assert killed == -signal.SIGKILL and 1 <= len(kept) < 5 and not (out / "images.npz").exists()
    for number in range(1, 5):
        content = bytearray(kept[0].read_bytes())
        content[len(content) // 2] ^= 1
        damaged = {1: content[:-100], 2: b"", 3: content, 4: content[:1000]}[number]
        (state / f"shard-{number:05d}.npz").write_bytes(damaged)
    first = kept[0].stat().st_mtime_ns
    touched = []
    original = npz.write_parts
    npz.write_parts = lambda path, *rest: (touched.append(Path(path).name), original(path, *rest))[1]
    try:
        images, about = run(files, weights["mode"], out)
    finally:
        npz.write_parts = original
    assert first and touched == [*(f"shard-{i:05d}.npz" for i in range(1, 5)), "images.npz"]
    assert np.array_equal(images, made[0]) and about == made[1]
    assert (out / "images.npz").read_bytes() == (made[2] / "images.npz").read_bytes()


@pytest.mark.parametrize("part", ["evaluations", "features"])
def test_what_lies_beside_a_damaged_shard_is_made_again(files, weights, tmp_path, monkeypatch, part):
    """Truncated, altered, emptied and with a broken header."""
    keys, more = {"solver": "bosh3", "rtol": 0.05, "atol": 0.05}, ()
    if part == "features":
        keys, more = {"features": True}, ("--detector", "fashion", "--detector-weights", str(DETECTOR))
    images, about = run(files, weights["gmm"], tmp_path / "whole", *more, **keys)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("mmfm.stages.sample._Shards.publish", raise_full_disk)
        assert main(arguments(files, weights["gmm"], out, *more, **keys)) == 2
    state = next(out.glob("state-*"))
    for number in range(4):
        path = state / f"shard-{number:05d}.safetensors"
        content = path.read_bytes()
        altered = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        header = content.replace(b'"dtype"', b'"dtipe"')
        path.write_bytes([content[:-4], altered, b"", header][number])
    again, about_again = run(files, weights["gmm"], out, *more, **keys)
    assert np.array_equal(again, images) and about_again == about
    if part == "features":
        made, undisturbed = (
            load_file(folder / "features.safetensors")["features"] for folder in (out, out.with_name("whole"))
        )
        assert np.allclose(made, undisturbed, rtol=1e-4, atol=1e-4)


def raise_full_disk(*arguments: object) -> None:
    raise OSError("the disk is full")


def killed_after_first_shard(files: Pipeline, ema: Path, out: Path) -> int:
    """Run the command in another process, kill it when its first shard is there, and return its exit status."""
    process = start(arguments(files, ema, out), slow=True)
    deadline = time.monotonic() + 600
    while not list(out.glob("state-*/shard-*.npz")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    return process.wait()


def start(call: list[str], slow: bool = False) -> subprocess.Popen:
    """Start a command; ``slow`` makes it wait for a kill after its first shard."""
    code = "import sys; from mmfm.cli.__main__ import main; sys.exit(main(sys.argv[1:]))"
    if slow:
        code = (
            "import time; from mmfm.infra import npz; write = npz.write_parts; "
            "npz.write_parts = lambda *a: (write(*a), time.sleep(60))[0]; " + code
        )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "-c", code, *call], env=environment, stderr=subprocess.DEVNULL)


def test_another_configuration_does_not_take_the_shards(files, weights, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("mmfm.stages.sample.npz.write_parts", write_once_then_fail(npz.write_parts))
        assert main(arguments(files, weights["mode"], tmp_path)) == 2
    before = next(tmp_path.glob("state-*"))
    images, _ = run(files, weights["mode"], tmp_path, time_points=3)
    assert before.exists() and list(before.glob("shard-*.npz")) and distinct(images) == 22


def test_more_images_take_the_first_from_a_finished_set(made, files, weights, tmp_path, monkeypatch):
    """And fewer; shards that are cut short in either are made, and other settings and a damaged set give none."""
    asked, generate = [], Sampler.generate
    monkeypatch.setattr(
        Sampler, "generate", lambda self, numbers, *rest: asked.extend(numbers) or generate(self, numbers, *rest)
    )

    def numbers_made(**keys):
        asked.clear()
        images, _ = run(files, weights["mode"], tmp_path, **keys)
        if "time_points" not in keys:
            assert np.array_equal(images, made[0][: len(images)])
        return asked

    assert numbers_made(n_images=12) == list(range(12))
    assert numbers_made() == list(range(10, 22))
    assert numbers_made(n_images=13) == [10, 11, 12]
    assert numbers_made() == numbers_made(n_images=12) == [], "the sets are kept side by side"
    assert numbers_made(n_images=6, time_points=3) == list(range(6))
    for path in tmp_path.glob("state-*/finished/images.npz"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert numbers_made(n_images=7) == list(range(7))


def write_once_then_fail(write: Callable) -> Callable:
    calls = itertools.count()

    def limited(*args: object) -> str:
        if next(calls):
            raise OSError("the disk is full")
        return write(*args)

    return limited


@pytest.mark.parametrize(
    "recorded, message",
    [
        ({"stats_digest": "0" * 64}, "was trained with another set of latent statistics than"),
        ({"encoder_digest": "0" * 64}, "was trained with another encoder than"),
        ({"spatial_gmm_digest": "0" * 64}, "was trained with another spatial mixture than"),
        ({"setting": "banana"}, "setting 'banana'"),
    ],
)
def test_refuses_weights_of_other_files(recorded, message, files, tmp_path, capsys):
    ema = write_ema(tmp_path / "ema.safetensors", files, "mode", recorded=recorded)
    assert main(arguments(files, ema, tmp_path)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_imported_weights_without_digests_pass(files, tmp_path):
    nothing = dict.fromkeys(("stats_digest", "encoder_digest", "spatial_gmm_digest", "step", "epochs", "seed"))
    ema = write_ema(tmp_path / "ema.safetensors", files, "mode", recorded=nothing)
    _, about = run(files, ema, tmp_path / "out", n_images=2)
    assert about["seed"] == 0 and about["weights"]["step"] is None


def test_refuses_other_decoders_modes_and_guides(files, weights, tmp_path):
    sizes = {"width": (CHANNELS + 1, 8, GRID**2), "grid": (CHANNELS, 8, 4), "size": (CHANNELS, 4, GRID**2)}
    for name, (channels, patch, patches) in sizes.items():
        save_decoder(Decoder(DecoderConfig(channels, 32, 64, 2, 1, patch, patches)), tmp_path / name)
        with pytest.raises(ValueError, match=r"decoder .*|image\.size"):
            load(files, weights["mode"], decoder=tmp_path / name)
    with pytest.raises(ValueError, match="--spatial-gmm"):
        load(files, weights["gmm"], spatial_gmm=None)
    with pytest.raises(ValueError, match="same setting"):
        load(files, weights["mode"], scale=1.5, guide=weights["gmm"])
    with pytest.raises(ValueError, match=r"of setting 'uncond' with 0 labels, the weights of 'gmm' with 0"):
        load(files, weights["gmm"], scale=1.5, guide=weights["uncond"])
    more = write_ema(tmp_path / "more", files, "class", model={"classes": CLASSES + 1})
    with pytest.raises(ValueError, match=r"of setting 'class' with 4 labels, the weights of 'class' with 3"):
        load(files, weights["class"], scale=1.5, guide=more)
    wide = write_ema(tmp_path / "wide", files, "mode", model={"channels": CHANNELS + 1})
    with pytest.raises(ValueError, match=r"has latents \[33, 4, 4\], the weights \[32, 4, 4\]"):
        load(files, weights["mode"], scale=1.5, guide=wide)
    with pytest.raises(ValueError, match="33"):
        load(files, wide)
    unlabelled = write_ema(tmp_path / "unlabelled", files, "class", model={"classes": 0})
    with pytest.raises(ValueError, match="of setting 'class', but know 0 labels"):
        load(files, unlabelled)
    load(files, write_ema(tmp_path / "one", files, "class", model={"classes": 1}))
    with pytest.raises(ValueError, match=r"of setting 'gmm', not 'mode'; give those of 'mode'"):
        load(files, weights["gmm"], expected="mode")
    with pytest.raises(ValueError, match="give the weaker model for autoguidance: --guide"):
        load(files, weights["mode"], scale=1.5)


def test_npz_reader_refuses_what_it_cannot_map(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    np.savez(tmp_path / "plain.npz", array)
    assert np.array_equal(npz.map_array(tmp_path / "plain.npz"), array), "also files that numpy wrote"
    assert isinstance(npz.map_array(tmp_path / "plain.npz"), np.memmap)
    np.savez_compressed(tmp_path / "compressed.npz", array)
    np.savez(tmp_path / "objects.npz", np.array([{}], dtype=object))
    np.savez(tmp_path / "named.npz", other=array)
    (tmp_path / "short.npz").write_bytes((tmp_path / "plain.npz").read_bytes()[:-30])
    for name, message in (("compressed", "compressed"), ("objects", "objects"), ("named", "arr_0"), ("short", "trunc")):
        with pytest.raises(ValueError, match=message):
            npz.map_array(tmp_path / f"{name}.npz")
    with pytest.raises(ValueError, match="rows"):
        npz.write_parts(tmp_path / "x.npz", (3, 2, 2, 3), np.uint8, [array])
    with pytest.raises(ValueError, match=r"a part .* does not fit into"):
        npz.write_parts(tmp_path / "x.npz", (2, 2, 2, 3), np.uint8, [array, array])
    assert not (tmp_path / "x.npz").exists()


def test_features_of_finished_images_are_made_in_a_state_that_is_nobody_elses(files, weights, tmp_path, monkeypatch):
    """A second run would put the images in place, and remove the shards of features that the first has made."""
    from mmfm.evaluation.detector import Detector
    from mmfm.infra import stage_state

    run(files, weights["gmm"], tmp_path, n_images=7)
    held, features = [], Detector.features

    def watched(self, images):
        held.append(next(tmp_path.glob("state-*")) in stage_state._locks)
        return features(self, images)

    monkeypatch.setattr(Detector, "features", watched)
    given = ("--detector", "fashion", "--detector-weights", str(DETECTOR))
    run(files, weights["gmm"], tmp_path, *given, n_images=7, features=True)
    assert held and all(held) and (tmp_path / "features.safetensors").is_file()
    assert next(tmp_path.glob("state-*")) not in stage_state._locks
