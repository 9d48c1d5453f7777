"""Frechet distance of the average's images as training goes. It looks at the run and changes nothing in it."""

import math
import time
from collections.abc import Callable
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
"""(model, numbers of the images) -> (B, 3, S, S) uint8; an image depends on the model and its number alone."""

_SILENCE = 15.0  # seconds


class FidCurve:
    """Measures a model every so many steps, and at the end.

    Args:
        detector: whose features distances are taken in.
        open_reference: opens and checks the reference as it lies there at that moment: it may come while training runs.
        generate: see :data:`Generate`.
        settings: the section ``train.preview``.
        state: directory of the run.
        title: of the learning curve.
    """

    def __init__(
        self, detector: Detector, open_reference: Callable[[], Reference], generate: Generate, settings: Preview,
        state: Path, title: str, ranks: Ranks,
    ) -> None:  # fmt: skip
        self.detector, self.open_reference = detector, open_reference
        self.generate, self.settings, self.ranks = generate, settings, ranks
        self.title = title
        self._log_of_run = state / DISTANCES
        self._measured: set[int] = set()
        self._said: set[str] = set()

    def resume(self, step: int) -> None:
        """Find out what was measured up to ``step``; a collective call."""
        lines = self.ranks.from_main(lambda: read_history(self._log_of_run))
        self._measured = {line["step"] for line in lines if line["step"] <= step}

    def due(self, step: int, last: bool) -> bool:
        """Whether ``step`` is to be measured, and was not."""
        every = self.settings.fid_every
        return step > 0 and step not in self._measured and (last or step % every == 0)

    def measure(
        self, model: nn.Module, step: int, stopped: Callable[[], bool], say: Callable[[str], None]
    ) -> dict[str, Any] | None:
        """Return the line of the record for ``step``; a collective call.

        Args:
            model: the same in every process.
            stopped: whether to give up; a collective call, made between batches.
            say: prints a line: the distance, or once why there is none.

        Returns:
            None if it was given up, or if something was wrong: no reference that fits, images that are not finite, too
            little memory.
        """
        begin = time.perf_counter()
        problem = self.ranks.from_main(lambda: _tried(self.open_reference)[1])
        if problem is None:
            moments, problem = self._moments(model, stopped, say)
            if problem is None and moments is None:
                return None
        if problem is None:
            line, problem = self.ranks.from_main(lambda: _tried(lambda: self._line(moments, step)))
        if problem is not None:
            self._once(say, f"no Frechet distance at step {step:,}: {problem}. Training goes on", problem)
            return None
        self._measured.add(step)
        n, features = line["n_images"], self.detector.dimension
        say(f"step {step:,}: {line['measure']} {line['distance']:.4g} ({n:,} images)")
        if n <= features:
            few = f"{n:,} images are too few for {features:,} features: compare these distances among themselves"
            self._once(say, f"{few}, or raise train.preview.fid_images")
        return {**line, "seconds": round(time.perf_counter() - begin, 3)}

    def _once(self, say: Callable[[str], None], message: str, what: str = "") -> None:
        """Say a message, unless ``what`` it is about (by default itself) was said before."""
        if (what or message) not in self._said:
            say(message)
        self._said.add(what or message)

    def _moments(
        self, model: nn.Module, stopped: Callable[[], bool], say: Callable[[str], None]
    ) -> tuple[CovarianceMoments | None, str | None]:
        """Moments of all images' features, and what went wrong; neither if it was given up."""
        said = time.monotonic()
        n, batch = self.settings.fid_images, self.settings.fid_batch_size
        own = own_part(n, self.ranks)
        batches = data.ranges(own.start, own.stop, batch)
        moments, problem = CovarianceMoments.zeros(self.detector.dimension, self.ranks.device), None
        # One process may have a batch less than another, but all ask as often whether to stop.
        for turn in range(math.ceil(math.ceil(n / self.ranks.world) / batch)):
            if stopped():
                return None, None
            if time.monotonic() - said > _SILENCE:
                said = time.monotonic()
                say(f"measuring a distance: {min(turn * batch * self.ranks.world, n):,} of {n:,} images")
            if turn < len(batches) and problem is None:
                _, problem = _tried(lambda rows=batches[turn]: self._add(moments, model, rows))
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
            "n_images": self.settings.fid_images,
            "time_points": self.settings.time_points,
            "detector_digest": self.detector.digest,
            "reference_digest": reference.about["digest"],
        }


def _tried(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return what a function returns, and what it says if it can't."""
    try:
        return function(), None
    except (ValueError, OSError, torch.linalg.LinAlgError) as error:
        return None, " ".join(str(error).split())
