"""``sample``: generate a set of images from trained weights.

Reads: the EMA weights, the decoder, the latent statistics and the encoder's pixel normalisation; the spatial mixture
    in settings with a mixture, the guide's weights for autoguidance, and the detector if features are wanted.
Writes: ``images.npz``, ``grid.png``, ``samples.json`` and, with a detector, ``features.safetensors``.
Unit of work: a shard of images with consecutive numbers, ``shard-00003.npz`` in the state. What belongs to these images
    is written before them, to ``shard-00003.safetensors``: the evaluations of an adaptive solver, and features.
After a kill: whole shards are kept. An image depends on the seed and its number alone (with an adaptive solver also on
    its batch), so the missing shards come out as they would have.
"""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfm import data
from mmfm.config import StageConfig
from mmfm.evaluation.detector import Detector
from mmfm.evaluation.features import sampled_features
from mmfm.generation import conditioning
from mmfm.generation.grid import draw_grid
from mmfm.generation.sampler import SampleFiles, Sampler, setting_of
from mmfm.generation.trajectory import mean_straightness
from mmfm.infra import npz, store
from mmfm.infra.distributed import Ranks
from mmfm.infra.pictures import save_picture
from mmfm.stages import provenance, runner
from mmfm.stages.runner import Advance, Context, Work

_FEATURES = "features.safetensors"
_STRAIGHTNESS_IMAGES = 16
_OUTPUTS = ("images.npz", "grid.png", _FEATURES, "samples.json")


def sample(
    config: StageConfig, files: SampleFiles, seed: int | None, out_dir: Path, ranks: Ranks,
    detector: Detector | None = None,
) -> None:  # fmt: skip
    """Generate the images of a set.

    Args:
        seed: seed of noise, modes and labels; None for the seed of the training.
        detector: writes its features of the images, also if the images were finished without them; None for none.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files do not belong together, or the flow ends in values that are not finite.
    """
    inputs = ranks.from_main(lambda: belonging(files))
    expected = config.setting
    sampler = Sampler(files, config.sample, config.encoder, config.image.size, seed, ranks.device, expected)
    config = replace(config, setting=sampler.weights["setting"])
    outputs = {name: out_dir / name for name in _OUTPUTS}
    with Context.open(config, ranks, inputs, outputs, identity(config, sampler)) as context:
        shards = _Shards(context, sampler, detector)
        was_finished = shards.run()
        if detector is not None and was_finished and ranks.from_main(lambda: not shards.has_features(detector)):
            shards.add_features(outputs["images.npz"])
            ranks.from_main(lambda: runner.amend(context, lambda finished: shards.write_features(finished, detector)))


def belonging(files: SampleFiles) -> provenance.Inputs:
    """Return digests and paths of the files, after checking that the weights were trained with them.

    Raises:
        ValueError: the weights or the guide were trained with another encoder, other statistics or another mixture.
    """
    ema = provenance.weights(files.ema)
    read = [
        ema,
        provenance.decoder(files.decoder),
        provenance.statistics(files.stats),
        provenance.processor(files.encoder_weights),
    ]
    if files.spatial_gmm is not None and setting_of(ema.about).mixture:
        read.append(provenance.spatial_mixture(files.spatial_gmm))
    if files.guide is not None:
        read.append(provenance.weights(files.guide, "guide"))
    return provenance.belong_together(*read)


def identity(config: StageConfig, sampler: Sampler) -> dict[str, Any]:
    """Return everything besides the files that determines the images."""
    found = {"setting": config.setting, **config.identity(), "seed": sampler.seed, "precision": sampler.precision}
    if sampler.means_precision not in (None, "float32"):  # configured as `auto`, it depends on the device
        found["means"] = sampler.means_precision
    # Earlier versions rounded state and time only; their shards must not be mixed in.
    if sampler.precision == "reference":
        found["rounded"] = "all"
    if sampler.generator.is_adaptive:  # the images of a batch share the solver's step sizes
        found["batch_size"] = config.sample.batch_size
    return found


class _Shards:
    """The images of one run, in files of consecutive numbers."""

    def __init__(self, context: Context, sampler: Sampler, detector: Detector | None) -> None:
        self.context, self.sampler, self.detector = context, sampler, detector
        self.section, self.state, self.ranks = context.config.sample, context.state, context.ranks
        self.ranges = data.ranges(0, self.section.n_images, self.section.shard_size)
        self.made, self.spent = 0, 0.0  # images that this process has generated, and the seconds that they took

    def run(self) -> bool:
        """Make the missing shards and publish the set; return whether it was already finished."""
        return runner.run_units(
            self.context,
            Work(self.ranges, self.make, self.is_whole),
            publish=self.publish,
            # Every image is in its shard and, in the end, also in the set.
            bytes_written=lambda: 2 * math.prod(self.shape(range(self.section.n_images))),
            complete=self.add_features,
        )

    def shape(self, numbers: range) -> tuple[int, int, int, int]:
        """Return the shape (n, S, S, 3) of the images with these numbers."""
        return (len(numbers), self.sampler.image_size, self.sampler.image_size, 3)

    def file(self, numbers: range) -> Path:
        """Return the path of a shard's images."""
        return self.state / f"shard-{numbers.start // self.section.shard_size:05d}.npz"

    def extras(self, numbers: range) -> dict[str, np.ndarray]:
        """Read ``evaluations`` (n,) int64 and ``features`` (n, D) float32 of a shard's images, as far as they exist.

        Damaged arrays and the features of another detector count as missing.
        """
        try:
            arrays, about = store.map_arrays(self.file(numbers).with_suffix(".safetensors"))
        except (OSError, ValueError):
            return {}
        if about.get("digest") != store.array_digest(*(arrays[name] for name in sorted(arrays))):
            return {}
        if self.detector is None or about.get("detector_digest") != self.detector.digest:
            arrays.pop("features", None)
        return arrays

    def is_whole(self, numbers: range) -> bool:
        """Whether a shard's images are there and, with an adaptive solver, their evaluations."""
        if self.sampler.generator.is_adaptive and "evaluations" not in self.extras(numbers):
            return False
        return npz.is_whole(self.file(numbers), self.shape(numbers), np.uint8)

    def make(self, shards: list[range], advance: Advance) -> None:
        """Generate shards, or copy them from a finished set with another number of images."""
        # With an adaptive solver an image depends on its batch, and the last batch of a set is smaller.
        adaptive = self.sampler.generator.is_adaptive
        earlier = None if adaptive else self.ranks.from_main(self.finished_set)
        known = npz.map_array(earlier) if earlier else np.empty(self.shape(range(0)), np.uint8)
        common = data.ranges(0, len(known), self.section.shard_size)
        for numbers in shards:
            if numbers in common:
                block = known[numbers.start : numbers.stop]
                npz.write_parts(self.file(numbers), block.shape, np.uint8, [block])
                advance(len(numbers))
            else:
                self.generate(numbers, advance)

    def generate(self, numbers: range, advance: Advance) -> None:
        """Generate the images of a shard, and their features while they are in memory."""
        block = np.empty(self.shape(numbers), np.uint8)
        evaluations, features = np.zeros(len(numbers), np.int64), []
        for batch in data.ranges(numbers.start, numbers.stop, self.section.batch_size):
            rows, start = slice(batch.start - numbers.start, batch.stop - numbers.start), time.monotonic()
            images, evaluations[rows] = self.sampler.generate(
                batch, lambda evaluations: advance(0, f"{evaluations} evaluations of a batch")
            )
            block[rows] = images.permute(0, 2, 3, 1).cpu().numpy()
            self.made, self.spent = self.made + len(batch), self.spent + time.monotonic() - start
            if self.detector is not None:
                features.append(self.detector.features(images).cpu().numpy())
            advance(len(batch))
        extras = {"evaluations": evaluations}
        if self.detector is not None:
            extras["features"] = np.concatenate(features)
        if self.detector is not None or self.sampler.generator.is_adaptive:
            self.write_extras(numbers, extras)
        npz.write_parts(self.file(numbers), block.shape, np.uint8, [block])

    def write_extras(self, numbers: range, arrays: dict[str, np.ndarray]) -> None:
        """Write evaluations and features of a shard's images."""
        about = {"detector_digest": self.detector.digest if self.detector else None}
        store.write_arrays(self.file(numbers).with_suffix(".safetensors"), arrays, about)

    def finished_set(self) -> Path | None:
        """Return the largest finished ``images.npz`` whose state differs from this one in ``n_images`` only."""

        def without_number(folder: Path) -> dict[str, Any]:
            about = store.read_json(folder / "about.json")
            del about["files"], about["identity"]["sample"]["n_images"]
            return about

        found = {}
        for path in self.state.parent.glob("state-*/finished/images.npz"):
            try:
                if without_number(path.parents[1]) == without_number(self.state):
                    images, about = npz.map_array(path), store.read_json(path.with_name("samples.json"))
                    if store.array_digest(images) == about["images_digest"]:
                        found[len(images)] = path
            except (OSError, ValueError, LookupError, TypeError):  # damaged, so its images are not used
                continue
        return found[max(found)] if found else None

    def add_features(self, finished: Path | None = None) -> None:
        """Compute the detector's features for the shards that lack them; a collective call.

        Args:
            finished: the published ``images.npz``, if the files of the shards are gone.
        """
        detector = self.detector
        if detector is None:
            return
        published = npz.map_array(finished) if finished else None

        def make(shards: list[range], advance: Advance) -> None:
            for numbers in shards:
                images = self.images(numbers) if published is None else published[numbers.start : numbers.stop]
                batches = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).split(self.section.batch_size)
                features = np.concatenate([detector.features(batch).cpu().numpy() for batch in batches])
                self.write_extras(numbers, {**self.extras(numbers), "features": features})
                advance(len(numbers))

        work = Work(self.ranges, make, lambda numbers: "features" in self.extras(numbers), counted="features")
        runner.make_missing(self.context, work)

    def has_features(self, detector: Detector) -> bool:
        """Whether the published images have this detector's features beside them."""
        outputs = self.context.outputs
        digest = store.read_json(outputs["samples.json"])["images_digest"]
        return sampled_features(outputs["images.npz"], digest, detector) is not None

    def write_features(self, finished: Path, detector: Detector) -> None:
        """Write the features of all images into the folder of the finished results."""
        digest = store.read_json(finished / "samples.json")["images_digest"]
        features = np.concatenate([self.extras(numbers)["features"] for numbers in self.ranges])
        about = {"detector": detector.name, "detector_digest": detector.digest, "images_digest": digest}
        store.write_arrays(finished / _FEATURES, {"features": features}, about)

    def publish(self, finished: Path) -> None:
        """Join the shards, draw the grid, and describe the set."""
        images, shape = finished / "images.npz", self.shape(range(self.section.n_images))
        digest = npz.write_parts(images, shape, np.uint8, map(self.images, self.ranges))
        grid = draw_grid(self.sampler.generator, npz.map_array(images), self.section.batch_size)
        save_picture(grid, finished / "grid.png")
        store.write_json(finished / "samples.json", self.describe(digest))
        if self.detector is not None:
            self.write_features(finished, self.detector)

    def images(self, numbers: range) -> np.ndarray:
        """Map the images of a shard, (n, S, S, 3) uint8."""
        return npz.map_array(self.file(numbers))

    def evaluations(self) -> float:
        """Return the evaluations of the velocity per image; with an adaptive solver their mean over the images."""
        if self.section.time_points == 1:
            return 0
        fixed = self.sampler.generator.function_evaluations()
        if fixed is not None:
            return fixed
        return sum(int(self.extras(numbers)["evaluations"].sum()) for numbers in self.ranges) / self.section.n_images

    def seconds(self) -> float | None:
        """Return how long all images take at the mean rate of this run, without features; None if it made none."""
        if not self.made:
            return None
        return round(self.section.n_images * self.spent / self.made / self.ranks.world, 3)

    def straightness(self) -> dict[str, Any] | None:
        """Return how far the paths of the first images are from their chords; None for images of the source alone."""
        if self.section.time_points == 1:
            return None
        n = min(_STRAIGHTNESS_IMAGES, self.section.n_images)
        deviation = mean_straightness(self.sampler.generator, self.sampler.field, n, self.section.batch_size)
        return {"deviation": deviation, "n_images": n}

    def describe(self, images_digest: str) -> dict[str, Any]:
        """Return ``samples.json``: everything that determined the images, and their time, as JSON values."""
        sampler, section, times = self.sampler, self.section, self.sampler.times
        source_only, adaptive = section.time_points == 1, sampler.generator.is_adaptive
        return {
            "stage": "sample",
            "version": self.context.version,
            "images_digest": images_digest,
            "n_images": section.n_images,
            "image_size": sampler.image_size,
            "seed": sampler.seed,
            "setting": sampler.weights["setting"],
            "encoder": sampler.weights.get("encoder"),
            "mode_draw": f"{conditioning.BY_WEIGHTS}{section.mode_draw}" if sampler.source.num_modes else None,
            "label_draw": section.label_draw if sampler.setting.condition == "class" else None,
            "n_labels": sampler.model.config.num_classes,
            "n_modes": sampler.source.num_modes,
            "source_only": source_only,
            "solver": None if source_only else section.solver,
            "time_points": section.time_points,
            "first_time": times[0].item(),
            "last_time": times[0].item() if source_only else times[-1].item(),
            "function_evaluations": self.evaluations(),
            "seconds": self.seconds(),
            "straightness": self.straightness(),
            "tolerances": {"rtol": section.rtol, "atol": section.atol} if adaptive else None,
            "precision": sampler.precision,
            "means_precision": sampler.means_precision,
            "device": sampler.device.type,
            "quantisation": "truncated to 8 bits",
            "weights": _weights(sampler.weights),
            "guidance": None if source_only else _guidance(sampler),
            "inputs": self.context.inputs.digests,
        }


def _guidance(sampler: Sampler) -> dict[str, Any] | None:
    if sampler.guidance is None:
        return None
    about = sampler.config.guidance
    described = {"kind": sampler.guidance, "scale": about.scale, "interval": list(about.interval)}
    return {**described, "guide": None if sampler.guide_weights is None else _weights(sampler.guide_weights)}


def _weights(metadata: dict[str, Any]) -> dict[str, Any]:
    names = ("digest", "step", "epochs", "seed", "images_seen", "model")
    return {name: metadata.get(name) for name in names}
