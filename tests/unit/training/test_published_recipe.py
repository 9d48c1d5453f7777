"""Learning rate, EMA decay and loss weights of the published recipes, against tables of the published code's values.

An epoch of ImageNet has 1251 steps of 1024 images, so the initial phase of 20 epochs ends before step 25,020, and the
learning rate falls from step 50,040 (epoch 40) to 1,000,800 (epoch 800).
"""

import pytest
import torch

from mmfm import config
from mmfm.infra.distributed import Ranks
from mmfm.training import setup
from mmfm.training.weighting import LossWeighting
from support.places import DEFAULTS
from support.tiny import SECTIONS

STEPS_PER_EPOCH = 1_281_167 // 1024
STEPS = (0, 77, 78, 79, 1250, 25_019, 25_020, 50_040, 100_000, 1_000_800)
FALLEN = 2e-4 - 1.8e-4 * 49_960 / 950_760
"""At step 100,000: 1.905e-4."""

LATER = (2e-4, 2e-4, FALLEN, 2e-5)
RECIPES = {
    "XL uncond": ((2e-4, 0.995), (2e-4,) * 6 + LATER, (0.995,) * 6 + (0.9995,) * 4),
    "XL gmm, XL mode": ((4e-4, 0.999), (4e-4,) * 6 + LATER, (0.999,) * 6 + (0.9995,) * 4),
    "S": ((2e-4, 0.9995), (2e-4,) * 6 + LATER, (0.9995,) * 10),
}
"""Learning rate and EMA decay of the initial phase; both at the steps."""


def published(lr: float, ema_decay: float, **train) -> config.Train:
    keys = {
        "model": "XL", "global_batch": 1024, "epochs": 80, "lr": 2e-4, "final_lr": 2e-5, "constant_epochs": 40,
        "decay_end_epoch": 800, "ema_decay": 0.9995, "betas": [0.9, 0.95],
        "initial_phase": {"epochs": 20, "lr": lr, "ema_decay": ema_decay},
    }  # fmt: skip
    return config.build(config.Train, {**SECTIONS["train"], **keys, **train}, "train")


@pytest.mark.parametrize("name", RECIPES)
def test_rates_and_decays(name):
    assert STEPS_PER_EPOCH == 1251 and pytest.approx(1.905e-4, rel=1e-3) == FALLEN
    phase, rates, decays = RECIPES[name]
    options = setup.optimizer_options(published(*phase), STEPS_PER_EPOCH)
    assert [options.lr(step) for step in STEPS] == pytest.approx(list(rates), rel=1e-12)
    assert [options.ema_decay(step) for step in STEPS] == list(decays)


def test_a_phase_longer_than_the_constant_epochs_delays_the_fall():
    options = setup.optimizer_options(published(4e-4, 0.9, constant_epochs=10), 100)
    assert [options.lr(step) for step in (999, 1999, 2000)] == pytest.approx([4e-4, 4e-4, 2e-4])
    middle = (2000 + 80_000) // 2
    assert options.lr(middle) == pytest.approx(1.1e-4)


def test_without_a_phase_all_is_as_before():
    options = setup.optimizer_options(published(0.0, 0.0, initial_phase={"epochs": 0, "lr": 1.0, "ema_decay": 0.5}), 10)
    assert (options.lr(0), options.ema_decay(0)) == (2e-4, 0.9995)


def label_weights(warmup: int, decay: float, steps: list[tuple[list[float], list[int]]]) -> dict[int, list[float]]:
    """Return the weights of four labels in every step."""
    keys = {"rule": "focal", "by": "mode", "decay": decay, "gamma": 2.0, "warmup_epochs": 1, "bounds": [0.3, 3.0]}
    built = config.build(config.LossWeighting, {**keys, "warmup_steps": warmup}, "train.loss_weighting")
    given, found = LossWeighting(built, 4, warmup, "cpu"), {}
    for number, (losses, labels) in enumerate(steps):
        found[number] = given.weights.tolist()
        given.weigh(torch.tensor(losses, requires_grad=True), torch.tensor(labels))
        given.after_step(Ranks(0, 1, torch.device("cpu")), number + 1)
    return found


@pytest.mark.parametrize("warmup", [78, 313, 625, 1250])
def test_label_weights_after_the_published_warmups(warmup):
    """Weights are 1 in the warm-up; then (L / mean L)^2 over the mean of these squares, within [0.3, 3].

    L: means 0.5, 1.5 and 2 of labels 0 to 2, and 1 of label 3, which does not occur; a step then moves label 0.
    """
    decay = 0.9995 ** (1 / 8)
    steps = [([0.25, 0.75, 1.5, 2.0], [0, 0, 1, 2])] * warmup + [([4.5], [0])] * 2
    found = label_weights(warmup, decay, steps)
    assert all(found[step] == [1.0] * 4 for step in (0, 77, warmup - 1))
    moved = 0.5 + (1 - decay) * 4.0
    for step, first in ((warmup, 0.5), (warmup + 1, moved)):
        running = [first, 1.5, 2.0, 1.0]
        squares = [(x / (sum(running) / 4)) ** 2 for x in running]
        expected = [min(3.0, max(0.3, square / (sum(squares) / 4))) for square in squares]
        assert found[step] == pytest.approx(expected, rel=1e-6)
    assert found[warmup][0] == pytest.approx(0.3) and found[warmup] != found[warmup + 1]


def test_warmup_steps_replace_the_epochs():
    def keys(**weighting):
        return config.load([DEFAULTS], [f"train.loss_weighting.{key}={value}" for key, value in weighting.items()])

    def weighting(loaded):
        return config.StageConfig.of(loaded, "train", encoder="dinov2", setting="mode").parameter()["train"][
            "loss_weighting"
        ]

    one, other = (weighting(keys(rule="focal", warmup_steps=78, warmup_epochs=n)) for n in (1, 5))
    assert one == other and one["warmup_steps"] == 78
    assert "warmup_steps" not in weighting(keys(rule="focal", warmup_epochs=5))
