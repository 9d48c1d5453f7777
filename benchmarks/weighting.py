"""Compare the loss weights of the published code, on 8 GPUs, with ours, on the same losses.

python benchmarks/weighting.py                  the published configurations, K = 8192: a few minutes
python benchmarks/weighting.py --quick          small numbers, in seconds
python benchmarks/weighting.py --recorded results/fid/dinov2_mode.txt
                                                losses of a trained model on its training images, not made up

The published weighter is written out below: every GPU has its own, which sees its micro-batches one by one and is never
averaged with the others. Ours counts once per step. Labels are drawn with log-normal frequencies; the loss of an image
is the level of the step, times a factor of its label, times a factor of its own, both log-normal. Recorded losses are
drawn with their labels from those of all training images, at random times, times the level of the step. Losses do not
depend on the weights here. Writes benchmarks/results/weighting.json and .md.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfm import config
from mmfm.infra.distributed import Ranks
from mmfm.training.weighting import LossWeighting
from runs import RESULTS, publish

RANKS, BATCH, DECAY, WARMUP = 8, 1024, 0.9995, 2500
"""Of the published configurations; the warm-up is in micro-batches."""

GAMMA, BOUNDS = 2.0, (0.3, 3.0)
FREQUENCY_SPREAD, LABEL_SPREAD, IMAGE_SPREAD = 0.5, 0.2, 0.5
"""Standard deviations of the logarithms of the labels' frequencies, the labels' factors and the images' factors."""


class Published:
    """The published weighter of one GPU, rule `focal`; float32."""

    def __init__(self, labels: int, decay: float, warmup: int) -> None:
        self.decay, self.warmup = np.float32(decay), warmup
        self.ema = np.ones(labels, np.float32)
        self.sums, self.counts = np.zeros(labels, np.float32), np.zeros(labels, np.float32)
        self.seen = 0  # micro-batches

    def weights(self) -> np.ndarray:
        """Return the labels' weights for the next micro-batch."""
        if self.seen <= self.warmup:
            return np.ones_like(self.ema)
        raw = (self.ema / (self.ema.mean() + np.float32(1e-8))) ** np.float32(GAMMA)
        return np.clip(raw / (raw.mean() + np.float32(1e-8)), *BOUNDS)

    def update(self, losses: np.ndarray, labels: np.ndarray) -> None:
        """Take the unweighted losses of a micro-batch."""
        self.seen += 1
        if self.seen <= self.warmup:
            np.add.at(self.sums, labels, losses)
            np.add.at(self.counts, labels, 1)
            if self.seen == self.warmup:
                self.ema = np.where(self.counts > 0, self.sums / np.maximum(self.counts, 1), self.ema)
            return
        for label in np.unique(labels):
            mean = losses[labels == label].mean()
            self.ema[label] = self.decay * self.ema[label] + (1 - self.decay) * mean


def ours(labels: int, decay: float, warmup_steps: int) -> LossWeighting:
    """Return the project's weighter with the same rule and bounds."""
    keys = {"rule": "focal", "by": "mode", "decay": decay, "gamma": GAMMA, "warmup_epochs": 0, "bounds": list(BOUNDS)}
    section = config.build(config.LossWeighting, {**keys, "warmup_steps": warmup_steps}, "train.loss_weighting")
    return LossWeighting(section, labels, warmup_steps, "cpu")


def equivalent(accumulation: int, labels: int, decay: float = DECAY, warmup: int = WARMUP) -> dict[str, float]:
    """Return our warm-up and decay for a published number of micro-batches per step and GPU.

    A GPU's weighter decays by ``decay`` in every micro-batch with the label, ours in every step with the label. For
    equally frequent labels, the time constants in steps are equal if ours decays by ``decay`` to the power of
    the expected number of a GPU's micro-batches with the label in a step over the chance of a step with it. The rarer
    the label, the closer that is to 1 / 8.
    """
    absent, micro = 1 - 1 / labels, BATCH // (RANKS * accumulation)
    power = accumulation * (1 - absent**micro) / (1 - absent**BATCH)
    found = {"warmup_steps": max(1, round(warmup / accumulation + 1e-9)), "decay": decay ** (1 / RANKS)}
    return {**found, "decay_for_equal_frequencies": decay**power}


class Losses:
    """Labels and losses of the images of a step."""

    def __init__(self, labels: int, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        frequency = np.exp(FREQUENCY_SPREAD * self.draw.standard_normal(labels))
        self.shares = np.cumsum(frequency / frequency.sum())
        self.factors = np.exp(LABEL_SPREAD * self.draw.standard_normal(labels))

    @staticmethod
    def level(step: int) -> float:
        """Mean loss of a step: it falls from 2 to 1, half of it within 200 steps."""
        return float(1 + 0.5 ** (step / 200))

    def step(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return labels and losses (BATCH,) of a step, by GPU and micro-batch."""
        labels = np.minimum(np.searchsorted(self.shares, self.draw.random(BATCH)), len(self.shares) - 1)
        own = np.exp(IMAGE_SPREAD * self.draw.standard_normal(BATCH) - IMAGE_SPREAD**2 / 2)
        return labels, (self.level(step) * self.factors[labels] * own).astype(np.float32)


class Recorded(Losses):
    """Labels and losses as a trained model had them, drawn at random.

    Args:
        recorded: labels and losses, (M,).
    """

    def __init__(self, recorded: tuple[np.ndarray, np.ndarray], labels: int, seed: int) -> None:
        self.draw, (self.labels, self.losses) = np.random.default_rng(seed), recorded
        counts = np.bincount(self.labels, minlength=labels)
        mean = float(self.losses.mean())
        sums = np.bincount(self.labels, self.losses, labels) / mean
        self.factors = np.where(counts > 0, sums / np.maximum(counts, 1), 1.0)
        self.relative = self.losses / mean

    def step(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return labels and losses (BATCH,) of a step, by GPU and micro-batch."""
        rows = self.draw.integers(0, len(self.labels), BATCH)
        return self.labels[rows], (self.level(step) * self.relative[rows]).astype(np.float32)


def record(target: Path, draws: int = 8) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the modes and losses of a trained model's training images, (M,), at ``draws`` times each, and K."""
    import mmfm
    from mmfm.data import read_image
    from mmfm.data.listing import Listing
    from mmfm.flow.path import interpolate, target_velocity, time_shift, train_times

    model = mmfm.open(target, "cpu")
    listing, sampler = Listing.open(model._found.file("listing")), model._sampler
    modes, losses, generator = [], [], torch.Generator().manual_seed(0)
    for start in range(0, len(listing), 250):
        images = [read_image(listing.path(i)) for i in range(start, min(start + 250, len(listing)))]
        latent, token = model.encode(images)
        posterior = model.mixture.posterior(token)
        for _ in range(draws):
            k = torch.multinomial(posterior, 1, generator=generator).squeeze(1)
            t = train_times(torch.rand(len(k), generator=generator), time_shift(model.latent_shape))
            source = sampler.source.draw(k, torch.randn(latent.shape, generator=generator))
            with torch.no_grad():
                labels = k if sampler.setting.condition == "mode" else None
                velocity = sampler.model(interpolate(latent, source, t), t, labels)
            losses.append((velocity - target_velocity(latent, source)).square().mean((1, 2, 3)).numpy())
            modes.append(k.numpy())
    return np.concatenate(modes), np.concatenate(losses), model.num_modes


def compare(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Return the correlation of two sets of weights and their mean absolute difference."""
    flat = np.ptp(one) == 0 or np.ptp(other) == 0
    correlation = 0.0 if flat else float(np.corrcoef(one, other)[0, 1])
    return {"correlation": correlation, "difference": float(np.abs(one - other).mean())}


def simulate(
    accumulation: int,
    labels: int,
    steps: list[int],
    decay: float,
    warmup: int,
    seed: int,
    recorded: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Run both on the same losses; return how they compare before the given steps.

    Weights are compared with those of the GPUs on average, a GPU's with another's, and both with the weights that
    follow from the labels' true factors.
    """
    values = equivalent(accumulation, labels, decay, warmup)
    mine = ours(labels, values["decay"], int(values["warmup_steps"]))
    theirs = [Published(labels, decay, warmup) for _ in range(RANKS)]
    losses = Losses(labels, seed) if recorded is None else Recorded(recorded, labels, seed)
    alone, found = Ranks(0, 1, torch.device("cpu")), {}
    exact = (losses.factors / losses.factors.mean()) ** GAMMA
    true = np.clip(exact / exact.mean(), *BOUNDS)
    for step in range(max(steps) + 1):
        if step in steps:
            each, own = np.stack([one.weights() for one in theirs]), mine.weights.numpy()
            found[step] = {
                "ours_theirs": compare(own, each.mean(0)),
                "theirs_theirs": compare(each[0], each[1]),
                "ours_true": compare(own, true),
                "theirs_true": compare(each[0], true),
            }
        drawn, values_of_step = losses.step(step)
        parts = zip(*(np.split(x, RANKS * accumulation) for x in (drawn, values_of_step)), strict=True)
        for number, (of_labels, of_losses) in enumerate(parts):
            theirs[number % RANKS].update(of_losses, of_labels)
        mine.weigh(torch.from_numpy(values_of_step), torch.from_numpy(drawn))
        mine.after_step(alone, step + 1)
    return {**values, "steps": found}


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Loss weights: the published code on 8 GPUs, and ours", "",
        f"{found['labels']} labels, {BATCH} images a step, focal with gamma {GAMMA:g}, weights in {list(BOUNDS)}. "
        "Correlation over the labels and mean absolute difference of the weights.", "",
        "| micro-batches a step and GPU | our `warmup_steps` | our `decay` | step | ours, mean of the GPUs | "
        "one GPU, another | ours, true | one GPU, true |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for accumulation, values in found["accumulations"].items():
        for step, at in values["steps"].items():
            pairs = ("ours_theirs", "theirs_theirs", "ours_true", "theirs_true")
            cells = [f"{at[pair]['correlation']:.2f}, {at[pair]['difference']:.2f}" for pair in pairs]
            first = f"| {accumulation} | {values['warmup_steps']} | {values['decay']:.7f} | {step} "
            lines.append(f"{first}| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--accumulation", type=int, nargs="+", default=[32, 8, 4, 2], help="micro-batches a step and GPU"
    )
    parser.add_argument("--labels", type=int, default=8192)
    parser.add_argument("--steps", type=int, nargs="+", default=[1300, 2500], help="steps at which to compare")
    parser.add_argument("--warmup", type=int, default=WARMUP, help="micro-batches of the published warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recorded", type=Path, metavar="TARGET", help="result of a model with modes, on this machine")
    parser.add_argument("--quick", action="store_true", help="16 labels, 40 steps")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.labels, options.steps, options.warmup, options.accumulation = 16, [20, 40], 20, [2]
    recorded = None
    if options.recorded:
        *recorded, options.labels = record(options.recorded)
    given = (options.labels, options.steps, DECAY, options.warmup, options.seed, recorded)
    found = {str(number): simulate(number, *given) for number in options.accumulation}
    about = {"labels": options.labels, "warmup": options.warmup, "seed": options.seed, "accumulations": found}
    publish("weighting", about, table(about), options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
