"""Trainings that measure distances on the way, and the event files that boards read."""

from pathlib import Path

import pytest

from mmfm.cli import fid_reference
from mmfm.infra import store
from mmfm.training.history import read_history
from support.places import DETECTOR
from support.tiny import SECTIONS, Pipeline, settings

N, SHAPE = 70, (32, 4, 4)


def preview(**keys) -> dict:
    return {**SECTIONS["train"]["preview"], "fid_every": 4, "fid_images": N, "fid_batch_size": 16, **keys}


@pytest.fixture(scope="module")
def reference(tiny_pipeline, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    fid = {"detector": "fashion", "weights": "unused", "reference": "train", "batch_size": 16, "workers": 0}
    sections = settings(("image",))[:-1] + f', "fid": {store.canonical_json(fid)}' + "}"
    files = ["--train-listing", tiny_pipeline.listing, "--detector-weights", DETECTOR, "--out", out]
    assert fid_reference.main(["--settings", sections, *map(str, files)]) == 0
    return out


@pytest.fixture
def measured(tiny_pipeline, reference) -> Pipeline:
    """The files of training, with those of the distances."""
    return with_distances(tiny_pipeline, reference)


def with_distances(files: Pipeline, reference: Path, detector: Path = DETECTOR) -> Pipeline:
    class Measured(Pipeline):
        @property
        def train_arguments(self) -> list[str]:
            named = {"--detector": "fashion", "--detector-weights": detector, "--fid-reference": reference}
            return [*super().train_arguments, *(str(part) for pair in named.items() for part in pair)]

    return Measured(**vars(files))


def distances(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["distance"]) for line in read_history(out / "fid.jsonl")]


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
