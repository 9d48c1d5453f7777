"""The Frechet distance of the average's images during training. Measuring it does not affect the run."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfm import data
from mmfm.config import Preview
from mmfm.data.moments import CovarianceMoments
from mmfm.evaluation.detector import Detector
from mmfm.evaluation.frechet import frechet_distance
from mmfm.evaluation.moments import merged, own_part
from mmfm.evaluation.reference import Reference
from mmfm.infra import memory
from mmfm.infra.distributed import Ranks
from mmfm.training.history import DISTANCES, read_history

Generate = Callable[[nn.Module, range], Tensor]
"""(model, image numbers) -> (B, 3, S, S) uint8; an image depends on the model and its number alone."""

_PROGRESS_EVERY = 15.0  # seconds


class FidCurve:
    """Measures the distance of a model's images at regular steps and at the end of the run.

    Args:
        detector: computes the features.
        open_reference: opens and checks the reference; called for every measurement, because the reference may be
            finished while training runs.
        generate: see :data:`Generate`.
        preview: the section ``train.preview``.
        state: directory of the run.
        title: of the learning curve.
    """

    def __init__(
        self,
        detector: Detector,
        open_reference: Callable[[], Reference],
        generate: Generate,
        preview: Preview,
        state: Path,
        title: str,
        ranks: Ranks,
    ) -> None:
        self.detector, self.open_reference = detector, open_reference
        self.generate, self.preview, self.ranks = generate, preview, ranks
        self.title = title
        self._record = state / DISTANCES
        self._measured: set[int] = set()
        self._said: set[str] = set()

    def resume(self, step: int) -> None:
        """Find out which steps up to ``step`` were measured; a collective call."""
        lines = self.ranks.from_main(lambda: read_history(self._record))
        self._measured = {line["step"] for line in lines if line["step"] <= step}

    def due(self, step: int, last: bool) -> bool:
        """Whether ``step`` has to be measured and was not yet."""
        every = self.preview.fid_every
        return step > 0 and step not in self._measured and (last or step % every == 0)

    def measure(
        self, model: nn.Module, step: int, stopped: Callable[[], bool], say: Callable[[str], None]
    ) -> dict[str, Any] | None:
        """Measure a distance and return the record's line for ``step``; a collective call.

        Args:
            model: the same in every process.
            stopped: whether to stop measuring; a collective call, made between batches.
            say: prints a message: the distance or, once, the reason why there is none.

        Returns:
            None if stopped, or on failure: no matching reference, non-finite images, or too little memory.
        """
        begin = time.perf_counter()
        moments, line = None, None
        problem = self.ranks.from_main(lambda: _tried(self.open_reference)[1])
        if problem is None:
            moments, problem = self._moments(model, stopped, say)
        if moments is not None and problem is None:
            line, problem = self.ranks.from_main(lambda: _tried(partial(self._line, moments, step)))
        if problem is not None:
            self._once(say, f"no Frechet distance at step {step:,}: {problem}. Training goes on", problem)
        if line is None:
            return None
        self._measured.add(step)
        n, features = line["n_images"], self.detector.dimension
        say(f"step {step:,}: {line['measure']} {line['distance']:.4g} ({n:,} images)")
        if n <= features:
            few = f"{n:,} images are too few for {features:,} features: compare these distances only with each other"
            self._once(say, f"{few}, or raise train.preview.fid_images")
        return {**line, "seconds": round(time.perf_counter() - begin, 3)}

    def _once(self, say: Callable[[str], None], message: str, topic: str = "") -> None:
        """Say a message unless one with the same topic, by default the message itself, was said before."""
        if (topic or message) not in self._said:
            say(message)
        self._said.add(topic or message)

    def _moments(
        self, model: nn.Module, stopped: Callable[[], bool], say: Callable[[str], None]
    ) -> tuple[CovarianceMoments | None, str | None]:
        """Return the moments of all images' features and the problem that occurred; (None, None) if stopped."""
        said = time.monotonic()
        n, batch = self.preview.fid_images, self.preview.fid_batch_size
        own = own_part(n, self.ranks)
        batches = data.ranges(own.start, own.stop, batch)
        moments, problem = CovarianceMoments.zeros(self.detector.dimension, self.ranks.device), None
        # Processes can differ by one batch, but all have to call `stopped` equally often.
        for turn in range(math.ceil(math.ceil(n / self.ranks.world) / batch)):
            if stopped():
                return None, None
            if time.monotonic() - said > _PROGRESS_EVERY:
                said = time.monotonic()
                say(f"measuring a distance: {min(turn * batch * self.ranks.world, n):,} of {n:,} images")
            if turn < len(batches) and problem is None:
                _, problem = _tried(partial(self._add, moments, model, batches[turn]))
        problem = next((found for found in self.ranks.gather(problem) if found is not None), None)
        return merged(moments, self.ranks), problem

    @memory.explained("Lower train.preview.fid_batch_size; it changes no result")
    def _add(self, moments: CovarianceMoments, model: nn.Module, numbers: range) -> None:
        with torch.no_grad():
            moments.update(self.detector.features(self.generate(model, numbers)))

    def _line(self, moments: CovarianceMoments, step: int) -> dict[str, Any]:
        reference = self.open_reference()
        return {
            "step": step,
            "distance": frechet_distance(moments.mean, moments.covariance(), reference.mu, reference.sigma),
            "measure": "FID" if self.detector.standard else "Frechet distance",
            "n_images": self.preview.fid_images,
            "time_points": self.preview.time_points,
            "detector_digest": self.detector.digest,
            "reference_digest": reference.about["digest"],
        }


def _tried(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return a function's result and None, or None and the message of its error."""
    try:
        return function(), None
    except (ValueError, OSError, torch.linalg.LinAlgError) as error:
        return None, " ".join(str(error).split())
