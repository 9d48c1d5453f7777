"""The stage ``sample``: image sets from trained weights."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mmfm import config, data
from mmfm.evaluation.detector import Detector
from mmfm.evaluation.fid import sampled_features
from mmfm.infra import npz, space, stage_state, store
from mmfm.infra.distributed import Ranks
from mmfm.infra.progress import Progress
from mmfm.pictures import image_grid, save_picture
from mmfm.sampler import Sampler
from mmfm.settings import effective

VERSION = config.VERSIONS["sample"]
FEATURES = "features.safetensors"
"""Name of the detector's features beside ``images.npz``."""

_GRID_IMAGES = 32
_GRID_COLUMNS = 4


def sample(
    sampler: Sampler, out_dir: str | Path, sections: dict[str, Any], ranks: Ranks, detector: Detector | None = None
) -> None:
    """Generate the images and write ``images.npz``, ``grid.png`` and ``samples.json``; contract in docs/stages.md.

    Shards of consecutive numbers are dealt to the processes in turn, each is one file, and a restarted run makes only
    those that are missing or damaged. An image is a function of its number, so none is made twice or left out.

    Args:
        out_dir: gets the outputs; unfinished shards lie in a state directory inside it.
        sections: built sections ``image``, ``encoder``, ``sample``. One time point is no step of the flow: the images
            are then the decoded sources.
        detector: its features of the images are written to ``features.safetensors``, also beside images that were
            finished without them; None: no features are made.
    """
    settings: config.Sample = sections["sample"]
    out_dir = Path(out_dir)
    setting = sampler.weights["setting"]
    identity = {"setting": setting, **effective(setting, config.identity(sections))}
    identity |= {"seed": sampler.seed, "precision": sampler.precision}
    if sampler.means_precision == "bf16":  # `auto` means another one on another device
        identity["means"] = "bf16"
    if sampler.is_adaptive:  # the images of a batch share the solver's steps
        identity["batch_size"] = settings.batch_size
    state = ranks.from_main(
        lambda: stage_state.state_directory(
            out_dir / "images.npz", "sample", VERSION, identity, sampler.digests, sampler.files
        )
    )
    outputs = {name: out_dir / name for name in ("images.npz", "grid.png", FEATURES, "samples.json")}
    shards = Shards(sampler, settings, state, detector)
    if ranks.from_main(lambda: stage_state.restore(state, outputs)):
        Progress("sample", settings.n_images, "images", done=settings.n_images, enabled=ranks.is_main)
        if detector is not None and ranks.from_main(lambda: not _has_features(outputs, detector)):
            ranks.from_main(lambda: stage_state.lock(state, "sample"))
            shards.add_features(ranks, outputs["images.npz"])
            ranks.from_main(lambda: _publish_features(shards, outputs))
        return
    # Every image lies in its shard and, once all are there, in the set.
    size = 2 * math.prod(shards.shape(range(settings.n_images)))
    ranks.from_main(lambda: space.require(state, "sample", size))
    # A solver that chooses its steps makes images that depend on their batches, which end with the set.
    earlier = None if sampler.is_adaptive else ranks.from_main(lambda: _finished_set(state))
    shards.make_missing(ranks, earlier)
    if detector is not None:
        shards.add_features(ranks)
    ranks.from_main(lambda: _publish(shards, outputs))


def _finished_set(state: Path) -> Path | None:
    """Return the largest finished ``images.npz`` whose state beside this one differs in the number of images alone."""

    def subject(folder: Path) -> dict[str, Any]:
        about = store.read_json(folder / "about.json")
        del about["files"], about["identity"]["sample"]["n_images"]
        return about

    found = {}
    for path in state.parent.glob("state-*/finished/images.npz"):
        try:
            if subject(path.parents[1]) == subject(state):
                images, about = npz.map_array(path), store.read_json(path.with_name("samples.json"))
                if store.array_digest(images) == about["images_digest"]:
                    found[len(images)] = path
        except (OSError, ValueError, LookupError, TypeError):  # damaged: its images are made again
            continue
    return found[max(found)] if found else None


def _publish(shards: "Shards", outputs: dict[str, Path]) -> None:
    """Put the shards together, draw the grid, publish both with their description."""
    sampler = shards.sampler
    with stage_state.finishing(shards.state, outputs) as finished:
        images = finished / "images.npz"
        digest = npz.write_parts(images, shards.shape(range(shards.settings.n_images)), np.uint8, shards.images())
        if shards.detector is not None:
            _write_features(shards, digest, finished)
        save_picture(draw_grid(sampler, images, shards.source_only), finished / "grid.png")
        store.write_json(finished / "samples.json", describe(sampler, digest, shards.evaluations()))


def _has_features(outputs: dict[str, Path], detector: Detector) -> bool:
    digest = store.read_json(outputs["samples.json"])["images_digest"]
    return sampled_features(outputs["images.npz"], digest, detector) is not None


def _publish_features(shards: "Shards", outputs: dict[str, Path]) -> None:
    """Publish finished images once more, with the features that they lack."""
    with stage_state.finishing(shards.state, outputs) as finished:
        for name in outputs.keys() - {FEATURES}:
            store.place_linked(outputs[name], finished / name)
        _write_features(shards, store.read_json(outputs["samples.json"])["images_digest"], finished)


def _write_features(shards: "Shards", images_digest: str, finished: Path) -> None:
    detector = shards.detector
    about = {"detector": detector.name, "detector_digest": detector.digest, "images_digest": images_digest}
    store.write_arrays(finished / FEATURES, {"features": shards.features()}, about)


@dataclass(frozen=True)
class Shards:
    """The image set as files of consecutive numbers in a state directory, each made by one process.

    ``shard-00003.npz`` holds the images. ``shard-00003.safetensors``, written before it, holds what is not in them: the
    evaluations of a solver that chooses its steps, and the features of a detector.
    """

    sampler: Sampler
    settings: config.Sample
    state: Path
    detector: Detector | None

    @property
    def source_only(self) -> bool:
        """Whether no step of the flow is taken."""
        return self.settings.time_points == 1

    @property
    def ranges(self) -> list[range]:
        """The numbers of every shard's images."""
        return data.ranges(0, self.settings.n_images, self.settings.shard_size)

    def shape(self, numbers: range) -> tuple[int, int, int, int]:
        """Shape (n, S, S, 3) of the images with these numbers."""
        return (len(numbers), self.sampler.image_size, self.sampler.image_size, 3)

    def make_missing(self, ranks: Ranks, earlier: Path | None = None) -> None:
        """Write the shards that are missing, each by one process.

        Args:
            earlier: ``images.npz`` of another number of images; shards that the two have in common are taken from it.
        """
        known = npz.map_array(earlier) if earlier else ()
        common = data.ranges(0, len(known), self.settings.shard_size)
        missing = ranks.from_main(lambda: [number for number in range(len(self.ranges)) if not self._is_whole(number)])
        total = self.settings.n_images
        done = total - sum(len(self.ranges[i]) for i in missing)
        with Progress("sample", total, "images", done=done, enabled=ranks.is_main) as progress:

            def advance(images: int, note: str = "") -> None:
                progress.advance(min(images * ranks.world, total - progress.done), note)

            for number in missing[ranks.rank :: ranks.world]:
                rows = self.ranges[number]
                if rows in common:
                    block = known[rows.start : rows.stop]
                    npz.write_parts(self._file(number), block.shape, np.uint8, [block])
                    advance(len(rows))
                else:
                    self._make(number, advance)
        ranks.barrier()

    def _make(self, number: int, advance: Callable[..., None]) -> None:
        numbers = self.ranges[number]
        block = np.empty(self.shape(numbers), np.uint8)
        evaluations, features = np.zeros(len(numbers), np.int64), []
        for batch in data.ranges(numbers.start, numbers.stop, self.settings.batch_size):
            place = slice(batch.start - numbers.start, batch.stop - numbers.start)
            if self.source_only:
                images = self.sampler.source_images(batch)
            else:
                images, evaluations[place] = self.sampler.generate(
                    batch, lambda evaluations: advance(0, f"{evaluations} evaluations of a batch")
                )
            if self.detector is not None:
                features.append(self.detector.features(images).cpu().numpy())
            block[place] = images.permute(0, 2, 3, 1).cpu().numpy()
            advance(len(batch))
        beside = {"evaluations": evaluations}
        if self.detector is not None:
            beside["features"] = np.concatenate(features)
        if self.detector is not None or self.sampler.is_adaptive:
            self._write_beside(number, beside)
        npz.write_parts(self._file(number), block.shape, np.uint8, [block])

    def _file(self, number: int) -> Path:
        return self.state / f"shard-{number:05d}.npz"

    def _extra(self, number: int) -> Path:
        return self.state / f"shard-{number:05d}.safetensors"

    def _is_whole(self, number: int) -> bool:
        if self.sampler.is_adaptive and "evaluations" not in self._beside(number):
            return False
        return npz.is_whole(self._file(number), self.shape(self.ranges[number]), np.uint8)

    def _write_beside(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        about = {"detector_digest": self.detector.digest if self.detector else None}
        store.write_arrays(self._extra(number), arrays, about)

    def _beside(self, number: int) -> dict[str, np.ndarray]:
        """Return what lies beside a shard's images, features only if they are of this detector; damaged is nothing."""
        try:
            arrays, about = store.map_arrays(self._extra(number))
        except (OSError, ValueError):
            return {}
        if about.get("digest") != store.array_digest(*(arrays[name] for name in sorted(arrays))):
            return {}
        if self.detector is None or about.get("detector_digest") != self.detector.digest:
            arrays.pop("features", None)
        return arrays

    def images(self) -> Iterator[np.ndarray]:
        """Yield the images of every shard, (n, S, S, 3) uint8."""
        for number in range(len(self.ranges)):
            yield npz.map_array(self._file(number))

    def add_features(self, ranks: Ranks, finished: Path | None = None) -> None:
        """Compute the detector's features of the shards that lack them, each by one process.

        Args:
            finished: ``images.npz``, where the shards' own files are gone.
        """
        numbers = range(len(self.ranges))
        missing = ranks.from_main(lambda: [number for number in numbers if "features" not in self._beside(number)])
        total = sum(len(self.ranges[number]) for number in missing)
        if not missing:
            return
        whole = npz.map_array(finished) if finished else None
        with Progress("sample", total, "features", enabled=ranks.is_main) as progress:
            for number in missing[ranks.rank :: ranks.world]:
                rows = self.ranges[number]
                images = npz.map_array(self._file(number)) if whole is None else whole[rows.start : rows.stop]
                parts = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).split(self.settings.batch_size)
                features = np.concatenate([self.detector.features(part).cpu().numpy() for part in parts])
                self._write_beside(number, {**self._beside(number), "features": features})
                progress.advance(min(len(rows) * ranks.world, total - progress.done))
        ranks.barrier()

    def features(self) -> np.ndarray:
        """Return the detector's features of all images, (n, D) float32."""
        return np.concatenate([self._beside(number)["features"] for number in range(len(self.ranges))])

    def evaluations(self) -> float:
        """Return the evaluations of the velocity per image, on average over the images."""
        if self.source_only:
            return 0
        if not self.sampler.is_adaptive:
            return self.sampler.function_evaluations()
        total = sum(int(self._beside(n)["evaluations"].sum()) for n in range(len(self.ranges)))
        return total / self.settings.n_images


def describe(sampler: Sampler, images_digest: str, evaluations: float) -> dict[str, Any]:
    """Return ``samples.json``: everything that determined the images, as JSON values.

    Args:
        evaluations: of the velocity, per image.
    """
    settings, times = sampler.settings, sampler.times
    source_only = settings.time_points == 1
    return {
        "stage": "sample",
        "version": VERSION,
        "images_digest": images_digest,
        "n_images": settings.n_images,
        "image_size": sampler.image_size,
        "seed": sampler.seed,
        "setting": sampler.weights["setting"],
        "encoder": sampler.weights.get("encoder"),
        "mode_draw": f"k ~ mixture weights, {settings.mode_draw}" if sampler.source.num_modes else None,
        "label_draw": settings.label_draw if sampler.setting.condition == "class" else None,
        "n_labels": sampler.model.config.num_classes,
        "n_modes": sampler.source.num_modes,
        "source_only": source_only,
        "solver": None if source_only else settings.solver,
        "time_points": settings.time_points,
        "first_time": times[0].item(),
        "last_time": times[0].item() if source_only else times[-1].item(),
        "function_evaluations": evaluations,
        "tolerances": {"rtol": settings.rtol, "atol": settings.atol} if sampler.is_adaptive else None,
        "precision": sampler.precision,
        "means_precision": sampler.means_precision,
        "device": sampler.device.type,
        "weights": _weights(sampler.weights),
        "guidance": None if source_only else _guidance(sampler),
        "inputs": sampler.digests,
    }


def _guidance(sampler: Sampler) -> dict[str, Any] | None:
    if sampler.guidance is None:
        return None
    about = sampler.settings.guidance
    described = {"kind": sampler.guidance, "scale": about.scale, "interval": list(about.interval)}
    return {**described, "guide": None if sampler.guide_weights is None else _weights(sampler.guide_weights)}


def _weights(metadata: dict[str, Any]) -> dict[str, Any]:
    names = ("digest", "step", "epochs", "seed", "images_seen", "model")
    return {name: metadata.get(name) for name in names}


def draw_grid(sampler: Sampler, images: Path, source_only: bool) -> Image.Image:
    """Draw the first images, and beside them what their sources decode to, image for image in the same places."""
    generated = npz.map_array(images)[:_GRID_IMAGES].transpose(0, 3, 1, 2)
    if source_only:
        return _panels({"Decoded source (no step of the flow)": generated})
    source = sampler.source_images(range(len(generated))).cpu().numpy()
    steps = sampler.function_evaluations()
    how = sampler.settings.solver if steps is None else f"{steps} evaluations"
    return _panels({f"Generated, {how}": generated, "The source each started from, decoded": source})


def _panels(panels: dict[str, np.ndarray]) -> Image.Image:
    """Lay grids of images (n, 3, S, S) uint8 side by side, each under its title."""
    grids = {title: image_grid(images, _GRID_COLUMNS) for title, images in panels.items()}
    margin, head = 12, 28
    font = ImageFont.load_default(size=15)
    widths = [max(grid.width, int(font.getlength(title))) for title, grid in grids.items()]
    height = head + max(grid.height for grid in grids.values())
    sheet = Image.new("RGB", (sum(widths) + margin * (len(widths) + 1), height + margin), "white")
    pen, left = ImageDraw.Draw(sheet), margin
    for (title, grid), width in zip(grids.items(), widths, strict=True):
        pen.text((left, 5), title, fill="black", font=font)
        sheet.paste(grid, (left, head))
        left += width + margin
    return sheet
