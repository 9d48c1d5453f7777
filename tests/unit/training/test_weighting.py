"""Adaptive loss weights: rules, bounds, warm-up, and the same state however a run is divided or interrupted."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from mmfm import config
from mmfm.infra.distributed import Ranks
from mmfm.training import checkpoint
from mmfm.training.weighting import LossWeighting
from support.processes import meeting_point, reserve_port
from support.tiny import SECTIONS
from support.train_runs import assert_same, run, state_of

ALONE = Ranks(0, 1, torch.device("cpu"))
KEYS = {**SECTIONS["train"]["loss_weighting"], "rule": "focal", "warmup_epochs": 0, "bounds": [0.01, 100.0]}


def weighting(labels: int = 3, warmup_steps: int = 0, **keys) -> LossWeighting:
    built = config.build(config.LossWeighting, {**KEYS, **keys}, "train.loss_weighting")
    return LossWeighting(built, labels, warmup_steps, "cpu")


def steps(given: LossWeighting, *losses: tuple[list[float], list[int]]) -> torch.Tensor:
    for number, (values, labels) in enumerate(losses, 1):
        given.weigh(torch.tensor(values, requires_grad=True), torch.tensor(labels))
        given.after_step(ALONE, number)
    return given.weights


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("focal", [r**2 for r in (0.5, 1.5)]),
        ("sqrt", [math.sqrt(r) for r in (0.5, 1.5)]),
        ("log", [math.log(1 + r) for r in (0.5, 1.5)]),
        ("inverse", [1 / r for r in (0.5, 1.5)]),
    ],
)
def test_rules(rule, expected):
    """Running losses 1 and 3 have ratios 0.5 and 1.5 to their mean."""
    weights = steps(weighting(2, 1, rule=rule, gamma=2.0), ([0.5, 1.5, 3.0], [0, 0, 1]))
    mean = sum(expected) / 2
    assert weights.tolist() == pytest.approx([expected[0] / mean, expected[1] / mean])


def test_the_running_loss_starts_at_one_and_moves_in_the_steps_in_which_a_label_occurs():
    given = weighting(decay=0.75)
    steps(given, ([5.0], [0]), ([8.0, 1.0], [0, 1]), ([3.0], [1]))
    assert given.running.tolist() == pytest.approx([3.5, 1.5, 1.0])
    mean = (3.5**2 + 1.5**2 + 1.0) / 3 / 4  # the losses' mean is 2
    weights = steps(weighting(decay=0.75, gamma=2.0), ([5.0], [0]), ([8.0, 1.0], [0, 1]), ([3.0], [1]))
    assert weights.tolist() == pytest.approx([x * x / 4 / mean for x in (3.5, 1.5, 1.0)]), "unseen labels count as 1"


def test_the_warmup_ends_in_plain_means():
    """Whatever the decay: the mean of all losses of a label, not of its steps, and 1 for a label without any."""
    given = weighting(3, warmup_steps=2, decay=0.5)
    assert steps(given, ([1.0, 2.0, 9.0], [0, 0, 1])).tolist() == [1.0, 1.0, 1.0]
    assert given.running.tolist() == [1.0, 1.0, 1.0]
    given.weigh(torch.tensor([6.0], requires_grad=True), torch.tensor([0]))
    given.after_step(ALONE, 2)
    assert given.running.tolist() == [3.0, 9.0, 1.0] and given.weights.argmax() == 1
    given.weigh(torch.tensor([5.0, 7.0], requires_grad=True), torch.tensor([2, 2]))
    given.after_step(ALONE, 3)
    assert given.running.tolist() == [3.0, 9.0, 3.5]


def test_bounds():
    """Weights are bounded after they are scaled: their mean is not 1 then."""
    given = weighting(2, warmup_steps=1, bounds=[0.5, 1.25])
    steps(given, ([1.0, 99.0], [0, 1]))
    assert given.weights.tolist() == [0.5, 1.25]
    values = given.weigh(torch.tensor([2.0, 2.0, 4.0]), torch.tensor([1, 0, 1]))
    assert values.tolist() == [2.5, 1.0, 5.0]


def test_the_state_does_not_depend_on_how_a_step_is_divided():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(64, generator=generator) * 3
    labels = torch.randint(0, 5, (64,), generator=generator)
    whole, parts = weighting(5), weighting(5)
    whole.weigh(losses.requires_grad_(), labels)
    order = torch.randperm(64, generator=generator)
    for part in order.split(7):
        parts.weigh(losses[part], labels[part])
    with torch.no_grad():  # looking at losses again, for a message or a preview, changes nothing
        parts.weigh(losses, labels)
    for given in (whole, parts):
        given.after_step(ALONE, 1)
    assert torch.equal(whole.running, parts.running) and torch.equal(whole.weights, parts.weights)


RANK_SCRIPT = """
import json, torch
from mmfm import config
from mmfm.infra.distributed import process_group
from mmfm.training.weighting import LossWeighting
losses = torch.rand(64, generator=torch.Generator().manual_seed(0)).requires_grad_()
with process_group() as ranks:
    given = LossWeighting(config.build(config.LossWeighting, {keys}, "w"), 5, 0, "cpu")
    for step in (1, 2):
        own = torch.arange(64)[ranks.rank :: ranks.world]
        given.weigh(losses[own] * step, own % 5)
        given.after_step(ranks, step)
    print(json.dumps([given.state(), given.weights.tolist()]))
"""


def test_processes_agree(tmp_path):
    """Two processes with half of the images each come to the weights of one, bit for bit, both of them."""
    with reserve_port() as reserved:
        script = RANK_SCRIPT.replace("{keys}", repr(KEYS))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **meeting_point(reserved)}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", script], stdout=subprocess.PIPE,
                env={**environment, "RANK": str(rank), "WORLD_SIZE": str(world)},
            )
            for rank, world in ((0, 1), (0, 2), (1, 2))
        ]  # fmt: skip
        alone, *both = [json.loads(process.communicate(timeout=600)[0].splitlines()[-1]) for process in processes]
    assert both == [alone, alone] and len(set(alone[1])) == 5


def test_the_state_survives_json():
    given = weighting()
    steps(given, ([0.1, 0.7], [0, 2]), ([0.3, 1 / 3], [0, 1]))
    other = weighting()
    other.load(json.loads(json.dumps(given.state())), 2)
    assert torch.equal(other.weights, given.weights) and torch.equal(other.running, given.running)
    warming, resumed = weighting(warmup_steps=2), weighting(warmup_steps=2)
    steps(warming, ([0.1, 0.7], [0, 2]))
    resumed.load(json.loads(json.dumps(warming.state())), 1)
    for each in (warming, resumed):
        each.weigh(torch.tensor([0.3, 0.5], requires_grad=True), torch.tensor([0, 1]))
        each.after_step(ALONE, 2)
    assert torch.equal(resumed.weights, warming.weights) and warming.running.tolist() == pytest.approx([0.2, 0.5, 0.7])
    with pytest.raises(ValueError, match=r"of an earlier version \(no sums, counts\); remove the state directory"):
        weighting().load({"running": [1.0] * 3, "seen": [True] * 3}, 2)
    with pytest.raises(ValueError, match="of 3 labels, not of 4"):
        weighting(4).load(given.state(), 2)


def test_an_interrupted_weighted_run_ends_like_an_undisturbed_one(tiny_pipeline, tmp_path, monkeypatch):
    keys = {"loss_weighting": {**KEYS, "warmup_epochs": 1, "by": "mode"}, "flip": False}
    run(tiny_pipeline, tmp_path / "whole", "gmm", **keys)
    run(tiny_pipeline, tmp_path / "parts", "gmm", **{**keys, "epochs": 2, "micro_batch": 8})
    run(tiny_pipeline, tmp_path / "parts", "gmm", **keys)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    kept = checkpoint.find(state_of(tmp_path / "whole"), 15).values["companion"]
    assert min(kept["counts"]) > 0 and 1.0 not in kept["running"]
    plain = run(tiny_pipeline, tmp_path / "plain", "gmm", flip=False)
    with pytest.raises(AssertionError):
        assert_same(plain, tmp_path / "whole")


def test_weighting_by_what_a_setting_lacks_is_refused(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"'uncond' has no modes; set it to class"):
        run(tiny_pipeline, tmp_path, "uncond", loss_weighting=KEYS)
    run(tiny_pipeline, tmp_path, "uncond", loss_weighting={**KEYS, "by": "class"}, epochs=1)


@pytest.mark.parametrize(("keys", "message"), [({"bounds": [0, 2]}, "smallest"), ({"decay": 1.0}, r"in \[0, 1\)")])
def test_impossible_keys_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        weighting(**keys)
