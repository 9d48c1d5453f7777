"""Score a set of images of any system against a reference."""

import importlib.metadata
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmfm.config.choices import METRICS, did_you_mean
from mmfm.evaluation.adm import AdmFile
from mmfm.evaluation.collected import Statistics, collect
from mmfm.evaluation.detector import Detector
from mmfm.evaluation.image_sets import ImageSet
from mmfm.evaluation.moments import own_part
from mmfm.evaluation.reconstruction import PAIRED, means
from mmfm.evaluation.reference import Reference
from mmfm.evaluation.scores import SETTINGS, cautions, kinds, reference_kinds, scores
from mmfm.infra import store
from mmfm.infra.distributed import Ranks
from mmfm.infra.progress import Progress

ADM_METRICS = ("frechet", "sfid", "inception_score", "precision", "recall")
"""What the ADM evaluator prints."""

TITLES = {**{name: metric.title for name, metric in METRICS.items()}, "psnr": "PSNR in dB", "ssim": "SSIM"}
"""Names of the metrics in results."""


class _Reference:
    """A reference: what its file has, and its images, if there are any, for the rest."""

    def __init__(self, path: Path, detector: Detector | None, size: tuple[int, int]) -> None:
        self.path, self.images = path, None
        if path.suffix == ".safetensors":
            reference = Reference.open(path)
            self.known = reference.statistics()
            self.source, side = reference.about["source"], reference.about["image_size"]
            if detector is not None and reference.about["detector_digest"] != detector.digest:
                raise ValueError(
                    f"the reference '{path}' was made with another detector ({reference.about['detector']}) than "
                    f"{detector.name}; give --detector and --detector-weights of that one"
                )
            other = None if side is None else (side, side)
        else:
            file = AdmFile.open(path) if path.is_file() else None
            self.images = ImageSet.open(path) if file is None or file.images is not None else None
            self.known = Statistics(gaussian=file.gaussian, spatial=file.spatial) if file else Statistics()
            self.source = path.name
            other = self.images.size if self.images is not None else None
            if detector is not None:
                self._check_moments(detector)
        if other not in (None, size):
            raise ValueError(
                f"the samples have {size[0]} x {size[1]} pixels, the reference {other[0]} x {other[1]}; resize one of "
                "them as its authors do, because the size changes the features"
            )

    def _check_moments(self, detector: Detector) -> None:
        for moments, dimension in (
            (self.known.gaussian, detector.dimension),
            (self.known.spatial, detector.spatial_dimension or None),
        ):
            if moments is not None and dimension is not None and len(moments.mean) != dimension:
                raise ValueError(
                    f"the moments in '{self.path}' have {len(moments.mean)} dimensions, those of {detector.name} "
                    f"{dimension}; give the --detector that made the file"
                )

    def missing(self, wanted: Iterable[str]) -> frozenset[str]:
        """Return the kinds that the file lacks."""
        has = {"gaussian": self.known.gaussian, "spatial": self.known.spatial, "bank": self.known.bank}
        return frozenset(kind for kind in wanted if has.get(kind) is None)

    def completed(self, computed: Statistics | None) -> Statistics:
        """Return what the file has, and of its images what it lacks; on the main process, which alone computed that."""
        known, own = self.known, computed or Statistics()
        assert self.images is not None
        return replace(
            known,
            # Moments in a file are of more images than it has.
            count=len(self.images) if known.gaussian is None and known.spatial is None else None,
            bank=known.bank if known.bank is not None else own.bank,
            gaussian=known.gaussian or own.gaussian,
            spatial=known.spatial or own.spatial,
        )

    def digest(self) -> str:
        """Return the SHA-256 of a file; see :meth:`ImageSet.digest` for a folder."""
        return store.file_digest(self.path) if self.images is None else self.images.digest()

    def can_serve(self, metric: str) -> bool:
        """Whether the file or its images have what a metric needs."""
        return self.images is not None or (metric not in PAIRED and not self.missing(reference_kinds([metric])))


def needs_detector(metrics: Iterable[str]) -> bool:
    """Whether any metric compares features; those of pairs of images do not. None given: the default ones.

    Raises:
        ValueError: an unknown metric.
    """
    wanted = _named(metrics)
    return not wanted or not PAIRED.keys() >= set(wanted)


def _named(metrics: Iterable[str]) -> list[str]:
    """Return the metrics by their own names, each once."""
    wanted = list(dict.fromkeys("frechet" if name == "fid" else name for name in metrics))
    for name in wanted:
        if name not in TITLES:
            raise ValueError(
                f"unknown metric '{name}'{did_you_mean(name, TITLES)}; it must be one of {', '.join(TITLES)}"
            )
    return wanted


def _served(real: "_Reference", detector: Detector | None) -> list[str]:
    """Return those of the ADM evaluator's metrics that reference and detector can serve."""
    spatial = detector is not None and detector.spatial_dimension
    return [
        name
        for name in ADM_METRICS
        if real.can_serve(name) and (spatial or METRICS[name].needs not in ("spatial", "logits"))
    ]


def evaluate(
    samples: str | Path,
    reference: str | Path,
    detector: Detector | None,
    ranks: Ranks,
    metrics: Iterable[str] = (),
    batch_size: int = 64,
) -> dict[str, Any]:
    """Score images and return the numbers and how they were measured as JSON values, the same on every process.

    The processes share the images in contiguous parts; the detector sees each image once.

    Args:
        samples: see :meth:`mmfm.evaluation.image_sets.ImageSet.open`.
        reference: an ``.npz`` for the ADM evaluator, a ``reference.safetensors``, or images. Moments in the file are
            used as they are, and what they can't serve is computed from its images.
        detector: None suffices for metrics of which :func:`needs_detector` is false.
        metrics: of :data:`mmfm.config.choices.METRICS` and :data:`PAIRED`, and ``fid`` for ``frechet``; none: the ADM
            evaluator's, as far as detector and reference can serve them. The paired ones need the originals in the same
            order as reference.
        batch_size: images per call of the detector.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a metric is unknown or can't be served, a file is damaged, or samples, reference and detector don't
            fit each other.
    """
    wanted = _named(metrics)
    if detector is None and needs_detector(wanted):
        raise ValueError(f"give a detector; only {' and '.join(PAIRED)} need none")
    images = ImageSet.open(samples)
    if len(images) < 2:
        raise ValueError(f"'{samples}' holds {len(images)} image; give at least 2")
    real = _Reference(Path(reference), detector, images.size)
    wanted = wanted or _served(real, detector)
    paired = [name for name in wanted if name in PAIRED]
    wanted = [name for name in wanted if name not in PAIRED]
    needed = kinds(wanted)
    for name in [*wanted, *paired]:
        if not real.can_serve(name):
            raise ValueError(
                f"{name} can't be computed from the reference '{reference}', which lacks images; give one with images "
                "(arr_0), or leave the metric out"
            )
    if paired and real.images is not None:
        _check_pairs(images, real.images)
    generated: Statistics | None = Statistics(len(images))
    if detector is not None and wanted:
        generated = _collected(images, needed, detector, ranks, batch_size, "samples")
    known = real.known
    if detector is not None and real.images is not None and (missing := real.missing(reference_kinds(wanted))):
        known = real.completed(_collected(real.images, missing, detector, ranks, batch_size, "reference"))
    pairs = _pairs(paired, images, real.images, ranks, batch_size) if paired and real.images is not None else {}

    def measure() -> dict[str, Any]:
        """Return the whole record; called on the main process, which alone has the statistics."""
        assert generated is not None  # on the main process
        closeness, lines = means(pairs, images.size)
        moments = "of the file" if real.known.gaussian is not None else "of its images"
        return {
            "metrics": {**scores(wanted, generated, known, ranks.device), **closeness},
            "cautions": _cautions(detector, wanted, generated, known) + lines,
            "samples": {
                "path": str(samples), "digest": images.digest(), "n_images": len(images), "size": list(images.size),
            },
            "reference": {
                "path": str(reference), "source": real.source, "digest": real.digest(),
                "moments": moments if wanted else None,
                "n_images": len(real.images) if real.images is not None else real.known.count,
            },
            "detector": detector
            and {"name": detector.name, "digest": detector.digest, "standard": detector.standard},
            "settings": SETTINGS,
            "versions": {name: importlib.metadata.version(name) for name in ("mmfm", "torch", "torch-fidelity")},
        }  # fmt: skip

    result: dict[str, Any] = ranks.from_main(measure)
    return result


def _collected(
    images: ImageSet, wanted: frozenset[str], detector: Detector, ranks: Ranks, batch_size: int, what: str
) -> Statistics | None:
    """Return the statistics of images on the main process, None on the others."""
    rows = own_part(len(images), ranks)
    with Progress(f"evaluate {what}", len(images), "images", enabled=ranks.is_main) as progress:

        def shown() -> Iterator[Tensor]:
            for batch in images.batches(rows, batch_size):
                yield batch
                progress.advance(min(len(batch) * ranks.world, len(images) - progress.done))

        return collect(shown(), wanted, rows, detector).of_all(ranks)


def _check_pairs(decoded: ImageSet, originals: ImageSet) -> None:
    """Raise ValueError unless two sets have the same number of images and, if they are pictures, the same names."""
    if len(decoded) != len(originals):
        raise ValueError(
            f"'{decoded.path}' has {len(decoded):,} images and '{originals.path}' {len(originals):,}, but PSNR and "
            "SSIM compare each with its original; give as many"
        )
    for ours, theirs in zip(decoded.names, originals.names, strict=False):
        if ours != theirs:
            raise ValueError(
                f"'{ours}' in '{decoded.path}' stands where '{originals.path}' has '{theirs}', but PSNR and SSIM "
                "compare each image with its original; name them alike"
            )


def _pairs(
    metrics: Iterable[str], decoded: ImageSet, originals: ImageSet, ranks: Ranks, batch_size: int
) -> dict[str, np.ndarray]:
    """Return the values of all images in their order, (n,) float64, on every process."""
    rows, n = own_part(len(decoded), ranks), len(decoded)
    found: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    with Progress("evaluate pairs", n, "images", enabled=ranks.is_main) as progress:
        for ours, theirs in zip(decoded.batches(rows, batch_size), originals.batches(rows, batch_size), strict=True):
            for name, parts in found.items():
                parts.append(PAIRED[name](theirs.to(ranks.device), ours.to(ranks.device)).cpu().numpy())
            progress.advance(min(len(ours) * ranks.world, n - progress.done))
    gathered = ranks.gather({name: np.concatenate(parts or [np.empty(0)]) for name, parts in found.items()})
    return {name: np.concatenate([part[name] for part in gathered]) for name in found}


def _cautions(
    detector: Detector | None, metrics: Iterable[str], generated: Statistics, reference: Statistics
) -> list[str]:
    if detector is None:
        return []
    lines = cautions(metrics, generated, reference, published=detector.standard)
    if not detector.standard:
        lines.insert(
            0,
            "These numbers are not those of the Inception network and can't be compared with published ones, only with "
            "those of the same detector, reference and number of images: fewer images give larger distances.",
        )
    return lines


def render(result: dict[str, Any]) -> str:
    """Return the result of :func:`evaluate` as text."""
    found, rows = result["metrics"], {}
    for name, value in found.items():
        if name in TITLES:
            spread = f" +- {found[f'{name}_std']:.4g}" if f"{name}_std" in found else ""
            rows[TITLES[name]] = f"{value:.6g}{spread}"
    samples, reference = result["samples"], result["reference"]
    width, height = samples["size"]
    moments = f", moments {reference['moments']}" if reference["moments"] else ""
    about = {
        "samples": f"{samples['n_images']:,} of {width} x {height} pixels, {samples['path']}",
        "samples digest": samples["digest"],
        "reference": f"{reference['source']}{moments}",
        "reference digest": reference["digest"],
    }
    if detector := result["detector"]:
        about |= {"detector": detector["name"], "detector weights": f"sha256 {detector['digest']}"}
    width = max(map(len, (*rows, *about))) + 2
    lines = [f"{name:<{width}}{value}" for name, value in rows.items()]
    lines += ["", *(f"{name:<{width}}{value}" for name, value in about.items())]
    return "\n".join([*lines, *(f"CAUTION: {line}" for line in result["cautions"])]) + "\n"
