"""``sample``: image sets from trained weights.

Reads EMA weights, decoder, latent statistics, the encoder's pixel normalisation; in the settings with a mixture the
spatial mixture, for autoguidance the guide's weights. Writes ``images.npz``, ``grid.png``, ``samples.json`` and, where
a detector is given, ``features.safetensors``.

The unit of work is a shard of consecutive numbers: ``shard-00003.npz`` in the state holds its images, and
``shard-00003.safetensors``, written before it, what is not in them: evaluations of a solver that chooses its steps, and
features. A kill leaves whole shards. An image is a function of its number, so none is made twice or left out.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfm import data
from mmfm.config import StageConfig
from mmfm.evaluation.detector import Detector
from mmfm.evaluation.features import sampled_features
from mmfm.generation.grid import draw_grid
from mmfm.generation.sampler import SampleFiles, Sampler, setting_of
from mmfm.infra import npz, store
from mmfm.infra.distributed import Ranks
from mmfm.infra.pictures import save_picture
from mmfm.stages import provenance, runner
from mmfm.stages.runner import Advance, Context

FEATURES = "features.safetensors"
"""Name of the detector's features beside ``images.npz``."""

_OUTPUTS = ("images.npz", "grid.png", FEATURES, "samples.json")


def sample(
    config: StageConfig, files: SampleFiles, seed: int | None, out_dir: Path, ranks: Ranks,
    detector: Detector | None = None,
) -> None:  # fmt: skip
    """Generate the images of a set.

    Args:
        seed: of noise, modes and labels; None: that of the training.
        detector: its features of the images are written too, also beside images that were finished without them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: files that do not belong together, or a flow that ends in values that are not finite.
    """
    inputs = ranks.from_main(lambda: belonging(files))
    expected = config.setting
    sampler = Sampler(files, config.sample, config.encoder, config.image.size, seed, ranks.device, expected)
    config = replace(config, setting=sampler.weights["setting"])
    outputs = {name: out_dir / name for name in _OUTPUTS}
    with Context.open(config, ranks, inputs, outputs, identity(config, sampler)) as context:
        shards = _Shards(context, sampler, detector)
        if shards.run() and detector is not None and ranks.from_main(lambda: not shards.has_features()):
            shards.add_features(outputs["images.npz"])
            ranks.from_main(lambda: runner.amend(context, shards.write_features))


def belonging(files: SampleFiles) -> provenance.Inputs:
    """Return digests and places of the files, after checking that the weights were trained with them.

    Raises:
        ValueError: the weights, or the guide's, belong to another encoder, other statistics or another mixture.
    """
    ema = provenance.weights(files.ema)
    read = [
        ema,
        provenance.decoder(files.decoder),
        provenance.statistics(files.stats),
        provenance.encoder(files.encoder_weights),
    ]
    if files.spatial_gmm is not None and setting_of(ema.about).mixture:
        read.append(provenance.spatial_mixture(files.spatial_gmm))
    if files.guide is not None:
        read.append(provenance.weights(files.guide, "guide"))
    return provenance.belong_together(*read)


def identity(config: StageConfig, sampler: Sampler) -> dict[str, Any]:
    """Return what the images depend on besides the files."""
    found = {"setting": config.setting, **config.identity(), "seed": sampler.seed, "precision": sampler.precision}
    if sampler.means_precision == "bf16":  # `auto` means another one on another device
        found["means"] = "bf16"
    if sampler.generator.is_adaptive:  # the images of a batch share the solver's steps
        found["batch_size"] = config.sample.batch_size
    return found


class _Shards:
    """The images of one run as files of consecutive numbers."""

    def __init__(self, context: Context, sampler: Sampler, detector: Detector | None) -> None:
        self.context, self.sampler, self.detector = context, sampler, detector
        self.settings, self.state, self.ranks = context.config.sample, context.state, context.ranks
        self.ranges = data.ranges(0, self.settings.n_images, self.settings.shard_size)

    def run(self) -> bool:
        """Make the shards that are missing, and the set; return whether it was finished before."""
        return runner.run_units(
            self.context,
            self.ranges,
            make=self.make,
            is_done=self.is_whole,
            publish=self.publish,
            # Every image lies in its shard and, once all are there, in the set.
            bytes_written=lambda: 2 * math.prod(self.shape(range(self.settings.n_images))),
            complete=self.add_features,
        )

    def shape(self, numbers: range) -> tuple[int, int, int, int]:
        """Shape (n, S, S, 3) of the images with these numbers."""
        return (len(numbers), self.sampler.image_size, self.sampler.image_size, 3)

    def file(self, numbers: range) -> Path:
        """The images of a shard."""
        return self.state / f"shard-{numbers.start // self.settings.shard_size:05d}.npz"

    def beside(self, numbers: range) -> dict[str, np.ndarray]:
        """Return what lies beside a shard's images, features only if they are of this detector; damaged is nothing."""
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
        """Whether the images of a shard are there, and the evaluations that go with them."""
        if self.sampler.generator.is_adaptive and "evaluations" not in self.beside(numbers):
            return False
        return npz.is_whole(self.file(numbers), self.shape(numbers), np.uint8)

    def make(self, shards: list[range], advance: Advance) -> None:
        """Make shards, or take them from a finished set of another number of images."""
        # A solver that chooses its steps makes images that depend on their batches, which end with the set.
        adaptive = self.sampler.generator.is_adaptive
        earlier = None if adaptive else self.ranks.from_main(self.finished_set)
        known = npz.map_array(earlier) if earlier else ()
        common = data.ranges(0, len(known), self.settings.shard_size)
        for numbers in shards:
            if numbers in common:
                self.write(numbers, known[numbers.start : numbers.stop])
                advance(len(numbers))
            else:
                self.generate(numbers, advance)

    def generate(self, numbers: range, advance: Advance) -> None:
        """Generate the images of a shard, and their features on the way."""
        block = np.empty(self.shape(numbers), np.uint8)
        evaluations, features = np.zeros(len(numbers), np.int64), []
        for batch in data.ranges(numbers.start, numbers.stop, self.settings.batch_size):
            place = slice(batch.start - numbers.start, batch.stop - numbers.start)
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
        if self.detector is not None or self.sampler.generator.is_adaptive:
            self.write_beside(numbers, beside)
        self.write(numbers, block)

    def write(self, numbers: range, block: np.ndarray) -> None:
        """Write the images of a shard."""
        npz.write_parts(self.file(numbers), block.shape, np.uint8, [block])

    def write_beside(self, numbers: range, arrays: dict[str, np.ndarray]) -> None:
        """Write what lies beside the images of a shard."""
        about = {"detector_digest": self.detector.digest if self.detector else None}
        store.write_arrays(self.file(numbers).with_suffix(".safetensors"), arrays, about)

    def finished_set(self) -> Path | None:
        """Return the largest finished ``images.npz`` of a state that differs in the number of images alone."""

        def subject(folder: Path) -> dict[str, Any]:
            about = store.read_json(folder / "about.json")
            del about["files"], about["identity"]["sample"]["n_images"]
            return about

        found = {}
        for path in self.state.parent.glob("state-*/finished/images.npz"):
            try:
                if subject(path.parents[1]) == subject(self.state):
                    images, about = npz.map_array(path), store.read_json(path.with_name("samples.json"))
                    if store.array_digest(images) == about["images_digest"]:
                        found[len(images)] = path
            except (OSError, ValueError, LookupError, TypeError):  # damaged: its images are made again
                continue
        return found[max(found)] if found else None

    def add_features(self, finished: Path | None = None) -> None:
        """Compute the detector's features of the shards that lack them, each by one process.

        Args:
            finished: ``images.npz``, where the shards' own files are gone.
        """
        if self.detector is None:
            return
        whole = npz.map_array(finished) if finished else None

        def make(shards: list[range], advance: Advance) -> None:
            for rows in shards:
                images = npz.map_array(self.file(rows)) if whole is None else whole[rows.start : rows.stop]
                parts = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).split(self.settings.batch_size)
                features = np.concatenate([self.detector.features(part).cpu().numpy() for part in parts])
                self.write_beside(rows, {**self.beside(rows), "features": features})
                advance(len(rows))

        runner.make_missing(
            self.context,
            self.ranges,
            make=make,
            is_done=lambda rows: "features" in self.beside(rows),
            counted="features",
        )

    def has_features(self) -> bool:
        """Whether finished images have this detector's features beside them."""
        outputs = self.context.outputs
        digest = store.read_json(outputs["samples.json"])["images_digest"]
        return sampled_features(outputs["images.npz"], digest, self.detector) is not None

    def write_features(self, finished: Path) -> None:
        """Write the features of all images beside them."""
        digest = store.read_json(finished / "samples.json")["images_digest"]
        features = np.concatenate([self.beside(rows)["features"] for rows in self.ranges])
        about = {"detector": self.detector.name, "detector_digest": self.detector.digest, "images_digest": digest}
        store.write_arrays(finished / FEATURES, {"features": features}, about)

    def publish(self, finished: Path) -> None:
        """Put the shards together, draw the grid, describe both."""
        images, shape = finished / "images.npz", self.shape(range(self.settings.n_images))
        digest = npz.write_parts(images, shape, np.uint8, self.blocks())
        save_picture(draw_grid(self.sampler.generator, npz.map_array(images)), finished / "grid.png")
        store.write_json(finished / "samples.json", self.describe(digest))
        if self.detector is not None:
            self.write_features(finished)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the images of every shard, (n, S, S, 3) uint8."""
        for rows in self.ranges:
            yield npz.map_array(self.file(rows))

    def evaluations(self) -> float:
        """Return the evaluations of the velocity per image, on average over the images."""
        if self.settings.time_points == 1:
            return 0
        if not self.sampler.generator.is_adaptive:
            return self.sampler.generator.function_evaluations()
        total = sum(int(self.beside(rows)["evaluations"].sum()) for rows in self.ranges)
        return total / self.settings.n_images

    def describe(self, images_digest: str) -> dict[str, Any]:
        """Return ``samples.json``: everything that determined the images, as JSON values."""
        sampler, settings, times = self.sampler, self.settings, self.sampler.times
        source_only, adaptive = settings.time_points == 1, sampler.generator.is_adaptive
        return {
            "stage": "sample",
            "version": self.context.version,
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
            "function_evaluations": self.evaluations(),
            "tolerances": {"rtol": settings.rtol, "atol": settings.atol} if adaptive else None,
            "precision": sampler.precision,
            "means_precision": sampler.means_precision,
            "device": sampler.device.type,
            "weights": _weights(sampler.weights),
            "guidance": None if source_only else _guidance(sampler),
            "inputs": self.context.inputs.digests,
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
