"""How many images estimates and the rules' resources count on, and what `mmfm scale` says of a target."""

from dataclasses import replace

import pytest
from PIL import Image

from mmfm import config, data
from mmfm.cli.__main__ import main
from mmfm.workflow import costs, facts, resources, targets, this_cpu
from mmfm.workflow.outlook import duration
from support.checkout import link_workflow
from support.places import DEFAULTS

DEMO = config.load([DEFAULTS])


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), i).save(folder / f"{i}.png")
    return folder


def own(folder) -> config.Config:
    values = {"gmm.n_components": 4, "decoder.horizon": 1, "decoder.steps": 1, "train.model": "tiny", "train.epochs": 1,
              "encoders.mine.family": "dinov2", "encoders.mine.weights": "x", "encoders.mine.input_size": 56,
              "fid.detector": "inception", "fid.weights": "x", "image.size": 32, "data.holdout": 2}  # fmt: skip
    return config.load([DEFAULTS], [f"data.root={folder}", *(f"{name}={value}" for name, value in values.items())])


def list_some(folder, results, rows=5):
    classes, paths, labels, sizes = data.scan(folder)
    path = results / "list_images" / "listing.train.safetensors"
    data.write_listing(path, folder, "train", classes, paths[:rows], labels[:rows], sizes[:rows])


def test_what_is_known_of_the_images(photos, tmp_path):
    configuration = own(photos)
    counted = facts.gather(configuration, tmp_path)
    assert counted.n_images == 10 and counted.image_bytes < 200 and "counted in" in counted.origin
    list_some(photos, tmp_path)
    listed = facts.gather(configuration, tmp_path)
    assert listed.n_images == 5 and "listing.train" in listed.origin
    given = facts.gather(configuration, tmp_path, 77)
    assert given.n_images == 77 and given.image_bytes == listed.image_bytes
    damaged = tmp_path / "list_images" / "listing.train.safetensors"
    damaged.write_bytes(b"no listing")
    assert facts.gather(configuration, tmp_path).n_images == 10


def test_what_can_not_be_counted_is_assumed_and_said(photos, tmp_path, monkeypatch):
    absent = facts.gather(own(tmp_path / "absent"), tmp_path)
    assert absent.n_images == costs.IMAGENET_IMAGES - 2 and "there is no folder" in absent.origin
    monkeypatch.setattr(facts.image_files, "count", lambda root: None)
    many = facts.gather(own(photos), tmp_path)
    assert many.n_images == costs.IMAGENET_IMAGES - 2 and "can't be counted quickly" in many.origin
    assert facts.gather(DEMO, tmp_path).n_images == 8_000


def test_few_images_take_the_time_of_few(photos, tmp_path):
    few = resources.Estimator(own(photos), "mine", 1, False, facts.gather(own(photos), tmp_path)).stages()
    many = resources.Estimator(own(photos), "mine", 1, False).stages()
    assert few["extract"].minutes == 30 and few["extract"].seconds < many["extract"].seconds / 1000
    assert many["extract"].minutes == 24 * 60, "schedulers reject more"
    assert few["extract"].disk_mb < many["extract"].disk_mb


def test_cached_images_are_encoded_once():
    def encoded(cache):
        overrides = ["train.epochs=10", f"latents.cache={cache}"]
        return resources.Estimator(config.load([DEFAULTS], overrides), "dinov2", 1, False).train().flops

    saved = encoded("off") - encoded("on")
    estimator = resources.Estimator(DEMO, "dinov2", 1, False)
    images = 10 * (8_000 // 128) * 128
    assert saved == pytest.approx((images - 2 * 8_000) * estimator.encoder.flops, rel=0.01)  # 10 epochs against 2 views


@pytest.mark.parametrize(
    ("name", "stages", "k", "t"),
    [
        ("results/fid/dinov2_mode.k16.t10.txt", {"fit_gmm", "spatial_gmm"}, 16, 10),
        ("dinov2_gmm.json", {"fit_gmm", "spatial_gmm"}, 256, 25),
        ("dinov2_uncond.t4.txt", set(), None, 4),
        ("dinov2_mode_ag.txt", {"fit_gmm", "spatial_gmm", "train (guide)"}, 256, 25),
    ],
)
def test_a_target_says_what_it_takes(name, stages, k, t):
    target = targets.parse_target(name, DEMO)
    assert (target.variant.k, target.variant.t) == (k, t)
    found = resources.for_target(DEMO, target, 1, False, facts.assumed(DEMO))
    always = {"extract", "latent_stats", "train", "sample", "fid_reference", "fid"}
    assert set(found) == always | stages  # the demo's decoder is given


def test_modes_and_time_points_of_a_target_count():
    def need(name):
        return resources.for_target(DEMO, targets.parse_target(name, DEMO), 1, False, facts.assumed(DEMO))

    few, many = need("dinov2_mode.k16.t5.txt"), need("dinov2_mode.S.k1024.t50.txt")
    for stage in ("fit_gmm", "spatial_gmm", "train", "sample"):
        assert few[stage].flops <= many[stage].flops and few[stage].disk <= many[stage].disk
    assert few["sample"].seconds < many["sample"].seconds / 10 and few["train"].seconds < many["train"].seconds


def test_a_comparison_takes_what_its_settings_do_and_what_they_share_once():
    def needs(configuration, name):
        known = facts.assumed(configuration)
        wanted = targets.parse_compared(name, configuration)
        return resources.together(
            configuration, [(target, resources.for_target(configuration, target, 1, False, known)) for target in wanted]
        )

    found, of_one = needs(DEMO, "results/comparison.txt"), needs(DEMO, "dinov2_mode.txt")
    assert list(found) == [
        "extract", "latent_stats", "fit_gmm", "spatial_gmm", "train (uncond)", "train (gmm)", "train (mode)",
        "sample (uncond)", "sample (gmm)", "sample (mode)", "fid_reference", "fid (uncond)", "fid (gmm)", "fid (mode)",
    ]  # fmt: skip
    for name, taken in of_one.items():
        assert taken == found.get(f"{name} (mode)") or taken == found[name], name
    two = replace(DEMO, run="two", encoders={"dinov2": DEMO.encoders["dinov2"], "other": DEMO.encoders["dinov2"]})
    found = needs(two, "results/two/comparison.png")
    assert {"extract (dinov2)", "extract (other)", "train (other_gmm)", "fid (dinov2_uncond)"} < found.keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("results/memorisation/dinov2_mode.png", "is not a result; give one, such as results/fid/dinov2_mode.txt"),
        ("results/comparison.html.txt", "is not a result; give one, such as results/fid/dinov2_mode.txt"),
        ("results/other/comparison.txt", "is not in 'results/fid'"),
        ("dinov2_mod.txt", "is not a result.*did you mean 'dinov2_mode.txt'"),
        ("results/other/fid/dinov2_mode.txt", "is not in 'results/fid'"),
        ("dinov2_uncond.k4.txt", "has no mixture"),
    ],
)
def test_a_name_that_is_no_target(name, message):
    with pytest.raises(ValueError, match=message):
        targets.parse_compared(name, DEMO)


def test_without_a_gpu_scale_measures_as_init_does(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(link_workflow(tmp_path))
    line, seconds = ["scale", "results/fid/dinov2_mode.txt", "--gpus", "0"], []
    for rate in (4e10, 4e11):
        monkeypatch.setattr(this_cpu, "measured_rate", lambda rate=rate: rate)
        assert main(line) == 0
        said = capsys.readouterr().out
        assert f"of this machine, at {rate / 4:.1e} operations/s, from half a second's measurement" in said
        known = replace(facts.assumed(DEMO), rates=this_cpu.rates_for(facts.assumed(DEMO).image_bytes))
        [of_train] = [row for row in said.splitlines() if row.startswith("| `train` |")]
        need = resources.for_target(DEMO, targets.parse_target("dinov2_mode.txt", DEMO), 1, False, known)["train"]
        assert of_train.endswith(f"| {duration(need.seconds)} |")
        seconds.append(need.seconds)
    assert seconds[0] > 5 * seconds[1]
    monkeypatch.setattr(this_cpu, "measured_rate", None)
    assert main([*line[:2], "--gpus", "1"]) == 0, "nothing is measured for a GPU"


def test_scale_of_each_input(photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(link_workflow(tmp_path / "checkout"))  # results in the repository would count as this run's
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        f"data: {{root: {photos}}}\nimage: {{size: 64}}\nfid: {{detector: inception, weights: x}}\n"
        "encoders: {own: {family: dinov2, weights: 'hf:some/model', input_size: 112}}\n"
    )
    files = ["--configfile", "config/small.yaml", str(mine), "--gpus", "0"]
    monkeypatch.setattr(this_cpu, "measured_rate", lambda: 4e10)
    assert main(["scale", *files, "--images", "5000"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("5,000 training images (as given)") and "`train_decoder`" in said and "No GPUs" in said
    assert main(["scale", "own_uncond.txt", *files]) == 0
    said = capsys.readouterr().out
    assert main(["scale", "own_uncond.txt", "--config", files[1], "--config", files[2], "--gpus", "0"]) == 0
    assert said == capsys.readouterr().out, "the other spelling"
    assert "counted in" in said and "`fit_gmm`" not in said
    assert main(["scale", "dinov2_mode.txt", *files]) == 2
    assert "did you mean 'own_mode.txt'" in capsys.readouterr().err
