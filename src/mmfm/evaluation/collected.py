"""What metrics need to know of a set of images, collected in one pass over them.

Each metric needs one kind of statistics (:data:`mmfm.config.choices.METRICS`):

* ``gaussian``: mean and covariance of the features, 34 MB for 2048;
* ``spatial``: those of the spatial features, 33 MB;
* ``logits``: the running sums of the Inception Score, 80 kB;
* ``bank``: the features themselves, in float32: 8 kB an image, 410 MB for 50,000. The only kind that grows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from torch import Tensor

from mmfm.data.moments import CovarianceMoments
from mmfm.evaluation.detector import Detector, Outputs
from mmfm.evaluation.inception_score import InceptionScore
from mmfm.evaluation.neighbours import Bank
from mmfm.infra.distributed import Ranks

KINDS = ("gaussian", "spatial", "logits", "bank")


class Gaussian(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D), float64."""

    mean: np.ndarray | Tensor
    covariance: np.ndarray | Tensor


@dataclass(frozen=True)
class Statistics:
    """What is known of a set of images; None for what was not asked for or is not in a file.

    Attributes:
        count: number of images; None if unknown.
        gaussian: of the features.
        spatial: of the spatial features.
        inception_score: mean and standard deviation over splits.
        bank: features (n, D) float32.
    """

    count: int | None = None
    gaussian: Gaussian | None = None
    spatial: Gaussian | None = None
    inception_score: tuple[float, float] | None = None
    bank: Bank | None = None


class Collected:
    """Statistics of consecutive images, so far.

    Args:
        kinds: which of :data:`KINDS`.
        rows: indices of the images among those of all processes.
        detector: whose outputs they are.

    Raises:
        ValueError: the detector does not give what a kind needs.
    """

    def __init__(self, kinds: Iterable[str], rows: range, detector: Detector) -> None:
        wanted = frozenset(kinds)
        if unknown := wanted.difference(KINDS):
            raise ValueError(f"unknown statistics {', '.join(sorted(unknown))}; they are {', '.join(KINDS)}")
        if wanted & {"spatial", "logits"} and not detector.spatial_dimension:
            raise ValueError(f"sFID and the Inception Score need the detector `inception`, not {detector.name}")
        self.rows, self.count = rows, 0
        dimension, device = detector.dimension, detector.device
        self.gaussian = CovarianceMoments.zeros(dimension, device) if "gaussian" in wanted else None
        self.spatial = CovarianceMoments.zeros(detector.spatial_dimension, device) if "spatial" in wanted else None
        self.score = InceptionScore(rows.start) if "logits" in wanted else None
        self.bank = np.empty((len(rows), dimension), np.float32) if "bank" in wanted else None

    def update(self, outputs: Outputs) -> Self:
        """Add the next images, and return self.

        Raises:
            ValueError: there are more images than ``rows``.
        """
        start, stop = self.count, self.count + len(outputs.features)
        if stop > len(self.rows):
            raise ValueError(f"{stop} images are more than the {len(self.rows)} that were announced")
        if self.gaussian is not None:
            self.gaussian.update(outputs.features)
        if self.spatial is not None and outputs.spatial is not None:
            self.spatial.update(outputs.spatial)
        if self.score is not None and outputs.logits is not None:
            self.score.update(outputs.logits)
        if self.bank is not None:
            self.bank[start:stop] = outputs.features.cpu().numpy()
        self.count = stop
        return self

    @property
    def needs_features_only(self) -> bool:
        """Whether neither spatial features nor logits are wanted."""
        return self.spatial is None and self.score is None

    def see(self, images: Tensor, detector: Detector) -> Self:
        """Run the detector over the next images (B, 3, S, S) uint8, and return self."""
        only = self.needs_features_only
        return self.update(Outputs(detector.features(images)) if only else detector.outputs(images))

    def statistics(self) -> Statistics:
        """Return the statistics of all images.

        Raises:
            ValueError: images are missing, there are fewer than two, or all have the same features.
        """
        if self.count != len(self.rows):
            raise ValueError(f"{self.count} of {len(self.rows)} images were seen; add the others")
        return Statistics(
            self.count,
            _gaussian(self.gaussian),
            _gaussian(self.spatial),
            self.score.result() if self.score is not None else None,
            self.bank,
        )

    def of_all(self, ranks: Ranks) -> Statistics | None:
        """Merge the parts of all processes: return the statistics on the main process, None on the others.

        A collective call. The main process holds the whole bank, twice while it is put together.

        Raises:
            ValueError: see :meth:`statistics`, on every process.
        """
        parts = ranks.gather_to_main(self.on_host())
        found: list[Statistics] = []
        ranks.from_main(lambda: found.append(self.merged(parts or []).statistics()))
        return found[0] if found else None

    def on_host(self) -> Self:
        """Move everything to the CPU, to be sent to another process, and return self."""
        for moments in (self.gaussian, self.spatial):
            if moments is not None:
                moments.mean, moments.m2 = moments.mean.cpu(), moments.m2.cpu()
        return self

    @classmethod
    def merged(cls, parts: Sequence["Collected"]) -> "Collected":
        """Merge the parts of consecutive images in their order. The first part takes up the sums of the others.

        Raises:
            ValueError: images between two parts are missing.
        """
        whole, *others = parts
        for part in others:
            if part.rows.start != whole.rows.stop:
                raise ValueError(f"images {whole.rows.stop} to {part.rows.start - 1} are missing; merge parts in order")
            for mine, theirs in ((whole.gaussian, part.gaussian), (whole.spatial, part.spatial)):
                if mine is not None and theirs is not None:
                    mine.merge(theirs)
            if whole.score is not None and part.score is not None:
                whole.score.merge(part.score)
            whole.rows, whole.count = range(whole.rows.start, part.rows.stop), whole.count + part.count
        if whole.bank is not None:
            whole.bank = np.concatenate([part.bank for part in parts if part.bank is not None])
        return whole


def _gaussian(moments: CovarianceMoments | None) -> Gaussian | None:
    if moments is None:
        return None
    covariance = moments.covariance()
    if not covariance.diagonal().any():
        raise ValueError(
            f"all {moments.count:,} images have the same features: the images are constant, or the detector's weights "
            "are not its own"
        )
    return Gaussian(moments.mean, covariance)


def collect(batches: Iterable[Tensor], kinds: Iterable[str], rows: range, detector: Detector) -> Collected:
    """Run a detector once over batches of images (B, 3, S, S) uint8, the images ``rows``."""
    collected = Collected(kinds, rows, detector)
    for batch in batches:
        collected.see(batch, detector)
    return collected
