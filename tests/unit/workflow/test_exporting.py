"""The model card of an export."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from mmfm import config
from mmfm.workflow.exporting import _card
from support.places import DEFAULTS

WEIGHTS = {"digest": "d" * 64, "encoder_digest": "e" * 64, "step": 124, "images_seen": 15872}
RESULT = {
    "measure": "Frechet distance", "frechet_distance": 3.25, "detector": {"name": "cells"},
    "samples": {"n_images": 2000, "seed": 0},
    "warnings": ["This number is NOT an ImageNet FID.", "frechet: 9 images are too few.", "sfid: 9 are too few.",
                 "precision, recall: of 9 real images."],
}  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "said"),
    [("hf:some/model", "| encoder | some/model |"), ("my/private/folder", "| encoder | dinov2, digest eeeeeeeeeeee |")],
)
def test_the_card_names_the_encoder_and_keeps_the_warnings_on_its_number(weights, said):
    encoder = replace(config.load([DEFAULTS]).encoders["dinov2"], weights=weights)
    found = SimpleNamespace(names={"encoder": "dinov2", "setting": "mode"}, image_size=32, encoder=encoder)
    lines = _card(found, WEIGHTS, RESULT, False, "mit").splitlines()
    assert said in lines and not any("private" in line for line in lines)
    assert "| Frechet distance | 3.2500, cells |" in lines
    assert [line for line in lines if line.startswith("> ")] == [f"> {line}" for line in RESULT["warnings"][:2]]
    assert not any(line.startswith("> ") for line in _card(found, WEIGHTS, None, False, "mit").splitlines())
