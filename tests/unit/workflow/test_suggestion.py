"""What is suggested for images, encoders and machines."""

import dataclasses

import pytest
import yaml

from mmfm import config
from mmfm.config.choices import CARDS
from mmfm.workflow import costs, suggestion
from mmfm.workflow.suggestion import EncoderChoice, Images, Machine
from support.places import DEFAULTS, ROOT

DEFAULT_VALUES = yaml.safe_load(DEFAULTS.read_text())
PHOTOS = Images("/data/my phötos: 1", 5_000, 10, 300, 50_000, False)
SMALL = EncoderChoice("dinov2", "hf:facebook/dinov2-small", "a small one", 384, 12, 14)
BASE = dataclasses.replace(SMALL, width=768)
LAPTOP = Machine("8 cores", False, 8, costs.Rates(2e11, 2e11, 2e11, 200, 2e8))
GPU = Machine("a GPU", True, 16, dataclasses.replace(costs.gpu_rates(CARDS["A100-40GB"]), decode=200))


def suggest(images=PHOTOS, encoder=SMALL, machine=LAPTOP, **options):
    return suggestion.suggest(images, encoder, machine, DEFAULT_VALUES, **options)


def resolve(suggested, tmp_path):
    (tmp_path / "mine.yaml").write_text(suggestion.as_yaml(suggested.lines))
    return config.load([DEFAULTS, tmp_path / "mine.yaml"])


@pytest.mark.parametrize("machine", [LAPTOP, GPU])
@pytest.mark.parametrize("encoder", [SMALL, BASE, dataclasses.replace(SMALL, width=96, patch=8)])
@pytest.mark.parametrize(("count", "side"), [(64, 28), (499, 40), (2_000, 100), (50_000, 600)])
def test_every_suggestion_holds_together(machine, encoder, count, side, tmp_path):
    images = dataclasses.replace(PHOTOS, count=count, side=side)
    suggested = suggest(images, encoder, machine)
    c = resolve(suggested, tmp_path)
    entry, model = c.encoders["dinov2"], c.models[c.train.model]
    n, grid = count - c.data.holdout, entry.input_size // encoder.patch
    assert entry.input_size % encoder.patch == 0 and c.image.size % grid == 0 and 4 <= grid <= 16
    assert c.image.size <= max(32, 1.1 * side) and c.image.size <= 256
    assert c.data.holdout == (min(count // 10, 2_000) if count >= 500 else 0)
    assert c.gmm.n_components >= 4 and (n / c.gmm.n_components >= 40 or c.gmm.n_components == 4)
    assert c.train.global_batch <= max(8, n / 8) and all(k <= n / 8 for k in c.sweep.modes)
    assert model.hidden_size[1] >= encoder.width
    assert c.train.decay_end_epoch == c.train.epochs and c.decoder.horizon == c.decoder.steps
    steps = c.train.epochs * (n // c.train.global_batch)
    assert 500 <= steps <= 25_000 and 0.9 <= c.train.ema_decay <= 0.9995
    assert encoder.width < c.sample.n_images <= 10_000 and 2e-4 <= c.train.lr <= 1e-3


@pytest.mark.parametrize("machine", [LAPTOP, GPU])
def test_all_settings_fit_the_budget(machine):
    suggested = suggest(machine=machine)
    assert 0.5 * suggestion.BUDGET < sum(suggested.seconds.values()) <= suggestion.BUDGET
    more = suggest(machine=machine, budget=4 * suggestion.BUDGET)
    assert suggestion.BUDGET < sum(more.seconds.values()) <= 4 * suggestion.BUDGET


def test_too_slow_a_machine_is_told_the_truth():
    slow = dataclasses.replace(LAPTOP, rates=costs.Rates(1e9, 1e9, 1e9, 200, 2e8))
    suggested = suggest(machine=slow)
    assert suggested.minutes > 60
    reason = next(line.reason for line in suggested.lines if line.key == "train.epochs")
    assert "for lack of time" in reason


def test_every_line_has_a_reason_beside_it(tmp_path):
    suggested = suggest(dataclasses.replace(PHOTOS, damaged=True))
    text = suggestion.as_yaml(suggested.lines)
    values = [line for line in text.splitlines() if line and not line.rstrip().endswith(":")]
    assert len(values) == len(suggested.lines) and all("  # " in line and line.split("  # ")[1] for line in values)
    assert max(len(line) for line in text.splitlines() if "http" not in line) <= 140
    loaded = resolve(suggested, tmp_path)
    assert loaded.data.root == PHOTOS.root and loaded.data.unreadable == "skip"
    assert yaml.safe_load(text) == suggestion.nested(suggested.lines)


def test_a_size_that_is_asked_for():
    assert suggest(size=48).value("image.size") == 48 and not suggest(size=48).doubt
    assert suggest(size=256).doubt == "this machine has the time for at most 128"
    assert suggest(size=352, machine=GPU).doubt.endswith("smaller images (median 300) are enlarged")
    with pytest.raises(ValueError, match="50 is not a multiple of 4; take 48 or 52"):
        suggest(size=50)
    with pytest.raises(ValueError, match="size of 0 is too small"):
        suggest(size=0)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_images(count):
    with pytest.raises(ValueError, match=rf"has {count} readable image.*at least 64 are needed"):
        suggest(dataclasses.replace(PHOTOS, count=count))


def test_small_yaml_resolves_with_what_is_the_users(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "data: {root: /data/flowers}\nimage: {size: 64}\nfid: {detector: inception, weights: x}\n"
        "encoders: {dinov2: {family: dinov2, weights: 'hf:facebook/dinov2-small', input_size: 112}}\n"
    )
    c = config.load([DEFAULTS, ROOT / "config" / "small.yaml", mine])
    assert c.models[c.train.model].hidden_size[1] >= 384 and c.train.decay_end_epoch == c.train.epochs
