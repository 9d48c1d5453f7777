"""The settings with class labels, label dropout, and how modes and labels of generated images are drawn."""

from dataclasses import replace

import pytest
import torch

from mmfm import config
from mmfm.data import Listing
from mmfm.flow.source import source_for
from mmfm.generation import conditioning
from mmfm.infra import rng
from mmfm.mixture.gaussian import Mixture
from mmfm.models.weights import load_ema
from mmfm.training import setup
from mmfm.training.latents import Inputs, MicroBatch
from mmfm.training.objective import FlowMatching
from mmfm.training.setup import image_classes
from support.tiny import MODES, SECTIONS, Pipeline
from support.train_runs import run, weights

SHAPE = (32, 4, 4)


class Recorder(torch.nn.Module):
    """Remembers what it is called with, and predicts no velocity."""

    def forward(self, x, t, y=None):
        self.seen = (x, t, y)
        return torch.zeros_like(x)


def task(files: Pipeline, setting: str, **train) -> FlowMatching:
    settings = config.build(config.Train, {**SECTIONS["train"], **train}, "train")
    classes = image_classes(Listing.open(files.listing))
    mixture = Mixture.load(files.gmm) if setting not in ("uncond", "class") else None
    return FlowMatching(setting, source_for(setting, files.spatial_gmm, "cpu"), mixture, settings, 1.0, classes)


def call(loss: FlowMatching, keys: range) -> tuple[torch.Tensor, ...]:
    index = torch.arange(keys.start, keys.stop)
    inputs = Inputs(rng.normal(1, "x", index, SHAPE), rng.normal(1, "g", index, SHAPE[:1]))
    model = Recorder()
    values = loss.losses(model, MicroBatch(keys, index % 40), inputs)
    return (values, *model.seen)


@pytest.mark.parametrize(("setting", "rows"), [("class", 2), ("class_gmm", 2), ("mode", 4)])
def test_dropout_hides_the_label_and_leaves_the_source_alone(tiny_pipeline, setting, rows):
    keys = range(0, 2000)
    plain, hidden = (call(task(tiny_pipeline, setting, label_dropout=p, mode_dropout=p), keys) for p in (0.0, 0.25))
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], hidden[:3], strict=True)), "source, time and loss stay"
    dropped = hidden[3] == rows
    assert torch.equal(hidden[3][~dropped], plain[3][~dropped]) and plain[3].max() == rows - 1
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.04)
    if setting != "mode":
        assert plain[3][:40].tolist() == Listing.open(tiny_pipeline.listing).labels.tolist()


def test_settings_without_labels_show_none(tiny_pipeline):
    for setting in ("uncond", "gmm"):
        loss = task(tiny_pipeline, setting)
        assert call(loss, range(8))[3] is None and (loss.num_labels, loss.label_dropout) == (0, 0.0)


@pytest.mark.parametrize("setting", ["class", "class_gmm"])
def test_class_settings_train(tiny_pipeline, tmp_path, setting):
    run(tiny_pipeline, tmp_path, setting, epochs=1)
    model, about = load_ema(tmp_path / "ema.safetensors")
    assert (model.config.num_classes, model.config.label_dropout, about["setting"]) == (2, 0.1, setting)
    assert weights(tmp_path)["y_embedder.embedding_table.weight"].shape == (3, 32)
    assert ("gmm_digest" in about) == (setting == "class_gmm") and (tmp_path / "preview.png").exists()


@pytest.mark.parametrize(("warmup_steps", "expected"), [(0, 15), (7, 7)])
def test_the_warmup_of_loss_weights_is_counted_in_steps(tiny_pipeline, warmup_steps, expected):
    warmup = {"warmup_epochs": 3, "warmup_steps": warmup_steps}
    keys = {**SECTIONS["train"]["loss_weighting"], "rule": "focal", **warmup}
    given = setup._weighting(task(tiny_pipeline, "mode", loss_weighting=keys), 5, torch.device("cpu"))
    assert given.warmup_steps == expected and len(given.weights) == MODES


def test_bad_labels_are_refused(tiny_pipeline):
    listing = Listing.open(tiny_pipeline.listing)
    labels = listing.labels.copy()
    labels[7] = 2
    with pytest.raises(ValueError, match=r"image 7 of the listing has label 2, but there are 2 classes .* list_images"):
        image_classes(replace(listing, labels=labels))
    with pytest.raises(ValueError, match="are of one class"):
        image_classes(replace(listing, classes=("all",), labels=labels * 0))


def test_equal_labels_come_in_blocks_and_depend_on_the_number_alone():
    labels = conditioning.class_labels(3, torch.arange(25), 10, "equal")
    assert sorted(labels[:10].tolist()) == sorted(labels[10:20].tolist()) == list(range(10))
    assert labels[:10].tolist() != labels[10:20].tolist() != list(range(10))
    assert len(set(labels[20:].tolist())) == 5
    assert torch.equal(conditioning.class_labels(3, torch.arange(7, 23), 10, "equal"), labels[7:23])
    assert not torch.equal(conditioning.class_labels(4, torch.arange(25), 10, "equal"), labels)
    drawn = conditioning.class_labels(3, torch.arange(20_000), 10, "random")
    assert drawn.min() == 0 and drawn.max() == 9
    assert torch.bincount(drawn).float().std().item() == pytest.approx((20_000 * 0.09) ** 0.5, rel=0.6)
    with pytest.raises(ValueError, match="equal, random"):
        conditioning.class_labels(3, torch.arange(2), 10, "even")


def test_stratified_modes_come_as_often_as_their_weights_say():
    weights = torch.tensor([0.5, 0.25, 0.2, 0.05], dtype=torch.float64)
    edges = weights.cumsum(0)

    def counts(draw: str, numbers: torch.Tensor) -> torch.Tensor:
        modes = torch.searchsorted(edges, conditioning.mode_uniforms(0, numbers, draw), right=True)
        return torch.bincount(modes, minlength=4)

    assert (counts("stratified", torch.arange(1000)) - 1000 * weights).abs().max() < 3
    assert (counts("stratified", torch.arange(64, 128)) - 64 * weights).abs().max() <= 1
    assert (counts("multinomial", torch.arange(1000)) - 1000 * weights).abs().max() > 3
    with pytest.raises(ValueError, match="multinomial, stratified"):
        conditioning.mode_uniforms(0, torch.arange(2), "strat")
    uniforms = torch.stack([conditioning.mode_uniforms(seed, torch.arange(4), "stratified") for seed in range(400)])
    assert uniforms.mean(0).tolist() == pytest.approx([0.5] * 4, abs=0.06), "each one is uniform over the seeds"
