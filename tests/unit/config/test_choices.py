"""The tables of choices: every implementation is there, and a new one is a file of its own and one line."""

import importlib
import json
import sys

import numpy as np
import pytest
import torch

from mmfm import config
from mmfm.cli.__main__ import main
from mmfm.config import choices
from mmfm.data import Listing
from mmfm.data.tokens import TokenStore
from mmfm.flow.solver import solve
from mmfm.workflow.resources import Estimator
from support.fid_runs import garments, reference, write_samples  # noqa: F401 (fixtures)
from support.fid_runs import run as run_fid
from support.places import DEFAULTS
from support.sample_runs import files, run, weights  # noqa: F401 (fixtures)
from support.tiny import SECTIONS, SIZE, Pipeline

TABLES = {name: table for name, table in vars(choices).items() if isinstance(table, choices.Choices)}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that writes a module of one's own and returns where its name ``new`` lies."""

    def write(text: str) -> str:
        (tmp_path / "modules").mkdir()
        (tmp_path / "modules" / "one_of_my_own.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path / "modules")
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, "one_of_my_own", raising=False)
        return "one_of_my_own:new"

    return write


@pytest.mark.parametrize("table", TABLES)
def test_every_choice_has_its_implementation(table):
    for choice in TABLES[table].values():
        assert not choice.implementation or choice.load() is not None


def test_another_value_is_answered_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"unknown solver 'eulr' \(did you mean 'euler'\?\); it must be one of euler, h"
    ):
        choices.SOLVERS["eulr"]


def test_every_key_with_choices_reads_a_table():
    named = {name: about["choices"] for name, _, about in config.declared(config.Train)}
    assert named["schedule"] is choices.SCHEDULES and named["loss_weighting.rule"] is choices.WEIGHTINGS
    for section in config.SECTIONS.values():
        for name, _, about in config.declared(section):
            assert about["choices"] is None or isinstance(about["choices"], choices.Choices), name


ENCODER = """
from mmfm.autoencoder.family import Family
from transformers import ViTModel

def run(model, pixels):
    tokens = model(pixel_values=pixels).last_hidden_state
    return tokens[:, 1:], tokens[:, 0]

new = Family({"vit": ViTModel}, "layernorm", run, unused=("pooler.dense.weight", "pooler.dense.bias"))
"""


def test_a_new_encoder_family(module, monkeypatch, tiny_pipeline: Pipeline, tmp_path):
    """From the configuration to the tokens of the stage, and in the estimates."""
    from transformers import ViTConfig, ViTModel

    family = choices.EncoderFamily(module(ENCODER), 8, ("vit",))
    monkeypatch.setitem(choices.ENCODER_FAMILIES, "plain_vit", family)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(**sizes, image_size=SIZE, patch_size=8)).eval()
    vit.save_pretrained(tmp_path / "vit")
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    keys = {"family": "plain_vit", "weights": "unused", "input_size": SIZE}
    sections = {"image": SECTIONS["image"], "encoder": keys, "latents": SECTIONS["latents"]}
    sections["extract"] = SECTIONS["extract"]
    given = ["--listing", str(tiny_pipeline.listing), "--encoder-weights", str(tmp_path / "vit")]
    outputs = ["--out-tokens", str(tmp_path / "t.zarr"), "--out-moments", str(tmp_path / "m.safetensors")]
    assert main(["extract", "--settings", json.dumps(sections), *given, *outputs]) == 0
    from mmfm.data import image_batches, to_float

    n = len(Listing.open(tiny_pipeline.listing))
    images = to_float(next(image_batches(tiny_pipeline.listing, SIZE, [range(n)]))[1], torch.device("cpu"))
    vit.layernorm.weight.data.fill_(1), vit.layernorm.bias.data.fill_(0)
    with torch.no_grad():
        expected = vit(pixel_values=(images - 0.5) / 0.5).last_hidden_state[:, 0]
    np.testing.assert_allclose(TokenStore.open(tmp_path / "t.zarr").read(0, n), expected, atol=1e-5)
    entry = [f"encoders.dinov2.{key}={value}" for key, value in {**keys, "weights": "absent"}.items()]
    assert Estimator(config.load([DEFAULTS], entry), "dinov2", 1, False).encoder.grid == SIZE // 8
    with pytest.raises(ValueError, match="did you mean 'plain_vit'"):
        config.load([DEFAULTS], ["encoders.dinov2.family=plan_vit"])


DETECTOR = """
from mmfm.evaluation.detector import Detector

def new(path, digest, device):
    return Detector("mean colours", digest, 3, False, lambda images: images.float().mean((2, 3)), device)
"""


def test_a_new_detector(module, monkeypatch, tiny_pipeline: Pipeline, tmp_path):
    kind = choices.DetectorKind(module(DETECTOR), 3, 1.0, 1.0, "draw it yourself")
    monkeypatch.setitem(choices.DETECTORS, "colours", kind)
    keys = {"detector": "colours", "weights": str(tmp_path / "w"), "reference": "train", "batch_size": 4, "workers": 0}
    values = json.dumps({"image": SECTIONS["image"], "fid": keys})
    call = ["fid_reference", "--settings", values, "--train-listing", str(tiny_pipeline.listing), "--out"]
    assert main([*call, str(tmp_path / "r.safetensors")]) == 2  # no weights yet
    (tmp_path / "w").write_text("w")
    assert main([*call, str(tmp_path / "r.safetensors")]) == 0
    from mmfm.evaluation.reference import Reference

    made = Reference.open(tmp_path / "r.safetensors")
    assert made.mu.shape == (3,) and made.about["detector"] == "mean colours"
    needs = Estimator(config.load([DEFAULTS], ["fid.detector=colours"]), "dinov2", 1, False).stages()
    assert needs["fid_reference"].disk < 1e5


SOLVER = """
from mmfm.flow.solver import _checked, _evaluate

def new(velocity_fn, x, times, dtype):
    times = _checked(times)
    for t, t_next in zip(times, times[1:]):
        half = x + (t_next - t) / 2 * _evaluate(velocity_fn, x, t)
        x = x + (t_next - t) * _evaluate(velocity_fn, half, (t + t_next) / 2)
    return x
"""


def test_a_new_solver(module, monkeypatch, files: Pipeline, weights, tmp_path):
    """The midpoint rule: in `solve` and `sample`, and counted in results and estimates."""
    monkeypatch.setitem(choices.SOLVERS, "midpoint", choices.Solver(module(SOLVER), 2))
    x, evaluations = solve("midpoint", lambda x, t: x, torch.ones(2, 1), torch.tensor([1.0, 0.5, 0.0]))
    assert evaluations == 4 and x.tolist() == [[(1 - 0.5 + 0.125) ** 2]] * 2
    found = {}
    for solver in ("euler", "midpoint"):
        images, about = run(files, weights["gmm"], tmp_path / solver, n_images=5, time_points=12, solver=solver)
        found[solver] = images.astype(int)
    assert (about["solver"], about["function_evaluations"]) == ("midpoint", 22)
    assert 0 < np.abs(found["midpoint"] - found["euler"]).mean() < 2
    flops = [
        Estimator(config.load([DEFAULTS], [f"sample.solver={solver}"]), "dinov2", 1, False).sample().flops
        for solver in ("euler", "midpoint")
    ]
    assert flops[1] > 1.5 * flops[0]


METRIC = """
def new(generated, reference, device):
    return {"largest_gap": float((generated.gaussian.mean.numpy() - reference.gaussian.mean).__abs__().max())}
"""


def test_a_new_metric(module, monkeypatch, garments, reference, tmp_path):
    monkeypatch.setitem(choices.METRICS, "largest_gap", choices.Metric(module(METRIC), "largest gap of a mean"))
    asked = {"metrics": ["frechet", "largest_gap"]}
    text, result = run_fid(write_samples(tmp_path / "same", garments[:300]), reference, tmp_path, **asked)
    assert result["metrics"]["largest_gap"] == pytest.approx(0, abs=1e-6) and "largest gap of a mean  0.0000" in text
    _, other = run_fid(write_samples(tmp_path / "other", 255 - garments[:300]), reference, tmp_path, **asked)
    assert other["metrics"]["largest_gap"] > 0.1 and other["frechet_distance"] > 1
