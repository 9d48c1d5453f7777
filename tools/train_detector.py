"""Train the demo's feature detector on the labels of Fashion-MNIST (see ``--help``)."""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from fashion_mnist import (
    DEMO,
    HelpFormatter,
    ProgressLine,
    Split,
    add_common_arguments,
    batch_indices,
    describe_run,
    load_checkpoint,
    load_splits,
    save_checkpoint,
    save_weights,
)
from mmfm.evaluation.detectors.fashion import FashionDetector

DESCRIPTION = """\
Train the small classifier whose 64 features define the demo's Fréchet distance, on the 60,000 labelled training images
of Fashion-MNIST (about five minutes on one core). Then check it as a detector: the distance between two halves of the
test images must be far below the distances of blurred images, noisy images, and images of fewer classes.
"""


def train_step(
    detector: FashionDetector, optimiser: torch.optim.Optimizer, train: Split, step: int, options: argparse.Namespace
) -> float:
    """Take one AdamW step on a batch with random horizontal flips, and return the loss."""
    torch.manual_seed(options.seed * 1_000_003 + step)
    chosen = batch_indices(step, options.batch, len(train.images), options.seed)
    images, labels = train.images[chosen], train.labels[chosen]
    flipped = torch.rand(len(images)) < 0.5
    images = torch.where(flipped[:, None, None, None], images.flip(3), images)
    warm, whole = options.steps // 10 + 1, options.steps
    rate = options.lr * min((step + 1) / warm, (whole - step) / (whole - warm + 1))
    for group in optimiser.param_groups:
        group["lr"] = rate
    loss = functional.cross_entropy(detector(images), labels, label_smoothing=0.05)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


@torch.no_grad()
def accuracy(detector: FashionDetector, split: Split) -> float:
    """Return the share of the images that the detector classifies correctly."""
    detector.eval()
    predicted = torch.cat([detector(images).argmax(1) for images in split.images.split(500)])
    detector.train()
    return (predicted == split.labels).float().mean().item()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Fréchet distance between Gaussians fitted to features (N, D) and (M, D), float64.

    Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", equation 6.
    """
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * cross).item()


@torch.no_grad()
def check(detector: FashionDetector, test: Split) -> dict[str, float]:
    """Measure distances of the second half of the test images, intact and degraded, from the first half, and the
    spread of the features.
    """
    detector.eval()

    def features(images: Tensor) -> Tensor:
        return torch.cat([detector.features(x) for x in images.split(500)]).double()

    half = len(test.images) // 2
    reference, images = features(test.images[:half]), test.images[half:]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator)
    blurred = functional.avg_pool2d(images.float(), 3, stride=1, padding=1).round()
    spectrum = torch.linalg.eigvalsh(reference.T.cov())
    return {
        "distance_real": frechet_distance(reference, features(images)),
        "distance_noise_16": frechet_distance(
            reference, features((images.float() + 16 * noise).round().clamp(0, 255).byte())
        ),
        "distance_blur_3x3": frechet_distance(reference, features(blurred.byte())),
        "distance_nine_classes": frechet_distance(reference, features(images[test.labels[half:] != 5])),
        "distance_five_classes": frechet_distance(reference, features(images[test.labels[half:] < 5])),
        "smallest_feature_deviation": reference.std(0).min().item(),
        "smallest_eigenvalue_share": (spectrum[0] / spectrum.sum()).item(),
        "effective_rank": (spectrum.sum() ** 2 / spectrum.square().sum()).item(),
    }


def parse_options() -> argparse.Namespace:
    """Parse the command line; the defaults are those of the committed weights."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=HelpFormatter)
    add_common_arguments(parser, steps=2400)
    parser.add_argument("--out", type=Path, default=DEMO / "detector" / "detector.safetensors", help="weights file")
    parser.add_argument("--batch", type=int, default=128, help="images per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    train, test = load_splits(options.data)
    run = describe_run(options, train.digest)
    detector = FashionDetector()
    optimiser = torch.optim.AdamW(detector.parameters(), lr=options.lr, weight_decay=0.02)
    checkpoint = options.out.with_suffix(".checkpoint.pt")
    start, seconds = load_checkpoint(checkpoint, run, detector=detector, optimiser=optimiser)
    progress = ProgressLine(options.steps, start, seconds)
    for step in range(start, options.steps):
        loss = train_step(detector, optimiser, train, step, options)
        done = step + 1
        if done % 50 == 0:
            progress.print(done, loss=loss)
        if done % options.evaluate_every == 0:
            print(f"  accuracy on the test images {accuracy(detector, test):.4f}", flush=True)
        if done % options.checkpoint_every == 0:
            save_checkpoint(checkpoint, run, done, progress.seconds(), detector=detector, optimiser=optimiser)

    # The weights are stored as float16, so evaluate them after rounding.
    detector.half().float()
    measures = {"accuracy": accuracy(detector, test), **check(detector, test)}
    minutes = round(progress.seconds() / 60, 1)
    metadata = {"script": "tools/train_detector.py", **run, "measures": measures, "minutes": minutes}
    save_weights(options.out, detector.state_dict(), metadata)
    for name, value in measures.items():
        print(f"{name} {value:.4g}")
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
