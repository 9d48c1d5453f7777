"""Inception Score, in one pass and without keeping the class probabilities."""

import math
from typing import Self

import torch
from torch import Tensor

SPLIT_SIZE = 5000
"""Images per split in the ADM evaluator."""


class InceptionScore:
    """Running sums of the class probabilities of images, split by split.

    The score of a split is exp(mean KL(p_i || q)) with q = mean p_i. The exponent is the entropy of q less the mean
    entropy of the p_i, which follow from sums. Splits are consecutive images, the last may be smaller, and all count
    equally, as in the ADM evaluator. With ``samples_shuffle=False``, torch-fidelity's score is the same if its splits
    divide the number of images; it needs all logits in memory, 200 MB for 50,000 images.

    Source: Salimans et al. 2016, "Improved techniques for training GANs", section 4; the splits and the logits without
    the bias of the last layer are those of guided-diffusion/evaluations/evaluator.py.

    Args:
        first: index of the first image among all processes' images.
        split_size: images per split.
    """

    def __init__(self, first: int = 0, split_size: int = SPLIT_SIZE) -> None:
        self.next, self.split_size = first, split_size
        self._splits: dict[int, tuple[int, Tensor, Tensor]] = {}

    def update(self, logits: Tensor) -> Self:
        """Add the next images' logits (B, C) of any float type, and return self.

        Raises:
            ValueError: the logits have another shape, or are not finite.
        """
        if logits.ndim != 2:
            raise ValueError(f"logits have shape {tuple(logits.shape)}, but they must be (images, classes)")
        if not logits.isfinite().all():
            raise ValueError("logits contain NaN or Inf; check the images and the detector's weights")
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        while len(p):
            split = self.next // self.split_size
            rows = min(len(p), (split + 1) * self.split_size - self.next)
            self._add(split, rows, p[:rows].sum(0).cpu(), (p[:rows] * log_p[:rows]).sum().cpu())
            p, log_p, self.next = p[rows:], log_p[rows:], self.next + rows
        return self

    def merge(self, other: Self) -> Self:
        """Add the images that ``other`` has seen, which follow this one's, and return self.

        Raises:
            ValueError: ``other`` has splits of another size.
        """
        if self.split_size != other.split_size:
            raise ValueError(f"splits have {self.split_size} and {other.split_size} images; use the same size")
        for split, sums in other._splits.items():
            self._add(split, *sums)
        self.next = max(self.next, other.next)
        return self

    def _add(self, split: int, count: int, p: Tensor, negative_entropy: Tensor) -> None:
        if split in self._splits:
            seen, sum_p, sum_negative = self._splits[split]
            count, p, negative_entropy = seen + count, sum_p + p, sum_negative + negative_entropy
        self._splits[split] = count, p, negative_entropy

    def result(self) -> tuple[float, float]:
        """Return the mean score of the splits, and its population standard deviation over them.

        Raises:
            ValueError: no image was seen.
        """
        if not self._splits:
            raise ValueError("an Inception Score needs images; there are none")
        scores = []
        for _, (count, sum_p, negative_entropy) in sorted(self._splits.items()):
            q = sum_p / count
            scores.append(math.exp((negative_entropy / count - torch.xlogy(q, q).sum()).item()))
        mean = sum(scores) / len(scores)
        return mean, math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))


def inception_score(logits: Tensor, split_size: int = SPLIT_SIZE) -> tuple[float, float]:
    """Return mean and standard deviation over splits for logits (n, C); see :class:`InceptionScore`."""
    return InceptionScore(split_size=split_size).update(logits).result()
